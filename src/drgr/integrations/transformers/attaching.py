"""Attaching: from a transformers MoE model and plain arguments to an :class:`Attachment`."""

from torch import nn
from torch.distributed import ProcessGroup

from drgr._checks import check_shape
from drgr.budgets import TokenBudget
from drgr.integrations.transformers.attached_layer import AttachedLayer
from drgr.integrations.transformers.attachment import Attachment
from drgr.integrations.transformers.contract import find_contract
from drgr.integrations.transformers.experts import IMPLEMENTATION, check_skipping, register
from drgr.integrations.transformers.grouped_experts import (
    GROUPED_IMPLEMENTATION,
    check_grouped,
    register_grouped,
)
from drgr.integrations.transformers.rules import ModelRule, RouterRule, ScorerRule
from drgr.integrations.transformers.sites import MoeSite, find_sites
from drgr.routing import (
    ControllerFactory,
    LinkGates,
    NoPrices,
    RoutingPolicy,
)
from drgr.routing.place import LayerPlace
from drgr.routing.scores import ScorerFactory
from drgr.routing.selection import BudgetedSelector, Selector, SelectorFactory


def attach(
    model: nn.Module,
    *,
    budget: TokenBudget | None = None,
    selector: SelectorFactory | None = None,
    scorer: ScorerFactory | None = None,
    controller: ControllerFactory | None = None,
    price_smoothing: float = 0.9,
    link_gates: LinkGates | None = None,
    grouped: bool = False,
    group: ProcessGroup | None = None,
) -> Attachment:
    """Makes every MoE layer of a transformers model route inside a budget.

    In training mode each forward pass meets the budget exactly; in evaluation mode each token
    decides alone at the price learned so far. Before anything is changed, the router's rule and the
    skipping of experts are verified numerically against the model's own code.

    Args:
        model: A transformers MoE model.
        budget: Bounds in experts, for each layer. Give it or ``selector``.
        selector: Builds a layer's selection in place of the exact budgeted one.
        scorer: Builds a layer's scorer, which takes the place of the model's own rule and uses its
            router weight; the model's rule by default. Build optimizers and data-parallel wrappers
            afterwards: a scorer's parameters become the model's.
        controller: Builds a layer's expert-price controller; none by default.
        price_smoothing: Share of the batch price's average that a step keeps, in [0, 1); used with
            ``budget``.
        link_gates: Gates of the links between sources and experts; none by default. Passes then
            say where tokens come from, see :meth:`Attachment.from_source`.
        grouped: Whether experts run by :func:`drgr.models.grouped_experts`, on the model's own
            weights: with less memory for what lies between, and second derivatives. For experts
            gated by a SiLU, without biases (Mixtral, Qwen3-MoE, OLMoE, DeepSeek-V3).
        group: Processes that share a training batch, preferably a group of their own, so that these
            small collectives never interleave with those of gradients.

    Returns:
        The attachment; :meth:`Attachment.detach` undoes it.

    Raises:
        UnknownRouterError: If the model has no MoE layer, its routing cannot be verified, or its
            experts are not those that ``grouped`` needs.
        ValueError: If the model is attached to already, not exactly one of ``budget`` and
            ``selector`` is given, a token may select more experts than it may use, or the link
            gates are of other layers or experts.
    """
    select = _selector_factory(budget, selector, price_smoothing)
    register()
    register_grouped()
    sites = find_sites(model)
    layers = []
    for number, site in enumerate(sites):
        if site.experts.config._experts_implementation in (IMPLEMENTATION, GROUPED_IMPLEMENTATION):
            raise ValueError(f"{type(model).__name__} is attached already; detach it first")
        check_skipping(site.experts, site.name)
        if grouped:
            check_grouped(site.experts, site.name)
        place = LayerPlace(
            number=number,
            num_layers=len(sites),
            num_experts=site.num_experts,
            width=site.width,
            device=next(site.router.parameters()).device,
        )
        rule = _rule(site, place, scorer)
        layer_selector = select(place)
        _check_maximum(site, rule, layer_selector)
        build = controller or (lambda num_experts, device: NoPrices(num_experts, device=device))
        policy = RoutingPolicy(
            selector=layer_selector,
            controller=build(site.num_experts, place.device),
            group=group,
        )
        layers.append(AttachedLayer(site, rule, policy))
    if link_gates is not None:
        check_shape("link_gates", link_gates.values, (len(sites), None, sites[0].num_experts))
    for layer in layers:
        layer.rule.install()
    implementation = GROUPED_IMPLEMENTATION if grouped else IMPLEMENTATION
    return Attachment(model, tuple(layers), link_gates, implementation)


def _selector_factory(
    budget: TokenBudget | None, selector: SelectorFactory | None, smoothing: float
) -> SelectorFactory:
    if selector is not None and budget is None:
        return selector
    if budget is None or selector is not None:
        raise ValueError(
            f"exactly one of budget and selector must be given, got "
            f"{'neither' if budget is None else 'both'}; a budget is met exactly, a selector is "
            f"for anything else"
        )
    return lambda place: BudgetedSelector(budget, smoothing=smoothing, device=place.device)


def _rule(site: MoeSite, place: LayerPlace, scorer: ScorerFactory | None) -> RouterRule:
    if scorer is None:
        return ModelRule(find_contract(site.router, site.name), site.router)
    return ScorerRule(scorer(place), site.router)


def _check_maximum(site: MoeSite, rule: RouterRule, selector: Selector) -> None:
    usable = rule.usable_experts(site.num_experts)
    if selector.maximum > usable:
        raise ValueError(
            f"budget.maximum must be at most the {usable} experts that a token of {site.name} may "
            f"use, got {selector.maximum}; lower it"
        )
