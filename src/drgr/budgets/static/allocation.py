r"""Which option each item takes under hard budgets, found with a differentiable loss of the gates.

The answer comes with a certificate: what is spent, whether the relaxation met its budgets, and a
lower bound on the loss of any choice inside the budgets,

    loss(z) >= loss(p) + min_z' <grad loss(p), z' - p>        for all z, where loss is convex

whose minimum over whole choices is one more knapsack, solved exactly.
"""

from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from drgr.budgets.static.choice_knapsack import ChoiceKnapsack
from drgr.budgets.static.choices import ChoiceBudgets, checked_logits
from drgr.budgets.static.relaxation import relax
from drgr.budgets.static.search import (
    GatesLoss,
    Sample,
    SearchResult,
    SearchSettings,
    checked_loss,
    gradient_of_gates,
    search,
)
from drgr.numerics import Status

_DECIDED = 0.9
_DEFAULT = SearchSettings()


@final
@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Certificate:
    """What is known of a choice: its cost for certain, its loss against a bound."""

    spend: Tensor
    """Cost of the choice, shape ``(m,)``, int64; never above ``limits``, equal where asked for."""
    limits: Tensor
    """Shape ``(m,)``, float64."""
    loss: float
    """Loss of the choice."""
    relaxed_loss: float
    """Loss at the probabilities that the search ended with, which meet the budgets on average."""
    lower_bound: float
    """No choice inside the budgets has a smaller loss, provided the loss is convex in the gates."""
    decided: float
    """Share of items with an option above a probability of 0.9."""
    residual: float
    """Largest ``|C_j - B_j| / max(1, |B_j|)`` of the relaxation at the end."""
    status: Status
    """That of the last retraction; the search stops at the first that does not converge."""

    @property
    def gap(self) -> float:
        """``loss - lower_bound``: 0 proves the choice optimal where the loss is convex."""
        return self.loss - self.lower_bound


@final
@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Allocation:
    """Result of :func:`allocate_experts`."""

    options: Tensor
    """The option of each item, int64, shape ``(N,)``."""
    probabilities: Tensor
    """What the search ended with, shape ``(N, K)``, float64."""
    losses: tuple[float, ...]
    """Mean loss of the sampled choices of each step."""
    certificate: Certificate


def allocate_experts(
    loss_of_gates: GatesLoss,
    costs: Tensor,
    limits: float | Tensor,
    *,
    generator: torch.Generator,
    exactly: bool = False,
    prior: Tensor | None = None,
    settings: SearchSettings = _DEFAULT,
) -> Allocation:
    r"""Chooses one option for each item, with the least loss that the search finds in the budgets.

    .. math:: \min_z loss(z) \ \text{s.t.}\ z_i \ \text{one-hot},\
              \sum_{ik} c_{jik} z_{ik} \le B_j \ \text{(or } =\text{)} .

    An item is whatever has a choice: an expert that is kept or dropped (:func:`prune_experts`), a
    layer that gets 1, 2, ... experts, a matrix with several precisions. Every gate that the loss
    ever sees as a sample is inside the budgets.

    Args:
        loss_of_gates: Maps gates ``(N, K)``, float64, to a scalar loss through operations that are
            differentiable in them. It sees one-hot rows during the search and once probabilities.
            It may draw a mini-batch of its own at each call.
        costs: Cost of each option in whole units, shape ``(N, K)`` for one budget or ``(m, N, K)``.
        limits: Most that each budget may spend, a number or of shape ``(m,)``.
        generator: Source of the Gumbel noise, on the CPU; the result repeats with its state.
        exactly: Whether limits must be spent to the last unit.
        prior: First logits, finite, or ``-inf`` to forbid an option, shape ``(N, K)``; None favours
            no option. They are shifted along the costs onto the budgets.
        settings: Steps, learning rate, temperatures and samples.

    Returns:
        The better of two choices, the likeliest one at the end and the best that was sampled, with
        its certificate. Where the loss is drawn anew at each call, so are the losses of that.

    Raises:
        ValueError: If a shape or value is out of range, costs are not whole, or the loss is not a
            scalar that depends on the gates.
        InfeasibleBudgetError: If no choice is inside the budgets.
        NonFiniteLossError: If the loss is not finite.

    Gradients:
        None; the gradient of the loss is an estimate through straight-through gates.

    Complexity:
        ``num_steps * num_samples + 3`` losses, and as many knapsacks (:class:`ChoiceKnapsack`).

    References:
        RCO, *Riemannian Constrained Optimization*, arXiv 2605.00649. One budget and the search are
        published; several budgets, limits that need not be spent, the look back at samples and the
        bound are derived here.

    Examples:
        >>> import torch
        >>> worth = torch.tensor([[0.0, 1.0], [0.0, 3.0], [0.0, 2.5]], dtype=torch.float64)
        >>> found = allocate_experts(
        ...     lambda gates: -(worth * gates).sum(),
        ...     torch.tensor([[0, 1], [0, 3], [0, 2]]),
        ...     3,
        ...     generator=torch.Generator().manual_seed(0),
        ... )
        >>> found.options, found.certificate.spend, found.certificate.gap < 1e-9
        (tensor([1, 0, 1]), tensor([3]), True)
    """
    knapsack = ChoiceKnapsack(costs, limits, exactly=exactly)
    budgets = ChoiceBudgets(knapsack.costs.double(), torch.as_tensor(knapsack.limits))
    start = torch.zeros(budgets.costs.shape[1:]) if prior is None else prior.detach().cpu()
    start = checked_logits(start, budgets)
    knapsack.best(start)  # fails here, before any loss is paid for, where nothing is inside
    relaxation = relax(start, budgets, exactly=exactly)
    found = search(loss_of_gates, relaxation, knapsack, settings, generator=generator)
    logits = found.state.logits[: relaxation.num_items]
    likeliest = knapsack.best(torch.log_softmax(logits, dim=-1)).options
    chosen = _better(loss_of_gates, likeliest, found.best, logits.shape[1])
    probabilities = torch.softmax(logits, dim=-1)
    relaxed_loss, bound = _linear_bound(loss_of_gates, probabilities, start, knapsack)
    return Allocation(
        options=chosen.options,
        probabilities=probabilities,
        losses=found.losses,
        certificate=Certificate(
            spend=knapsack.spend(chosen.options),
            limits=budgets.limit_vector,
            loss=chosen.loss,
            relaxed_loss=relaxed_loss,
            lower_bound=bound,
            decided=float((probabilities.amax(dim=-1) > _DECIDED).double().mean()),
            residual=_largest_residual(found, relaxation.budgets),
            status=found.state.retraction.status,
        ),
    )


def _better(
    loss_of_gates: GatesLoss, likeliest: Tensor, sampled: Sample | None, num_options: int
) -> Sample:
    """Returns the choice of less loss, both evaluated now: a sampled loss may have been lucky."""
    candidates = [likeliest]
    if sampled is not None and not sampled.options.equal(likeliest):
        candidates.append(sampled.options)
    judged = []
    for options in candidates:
        gates = torch.nn.functional.one_hot(options, num_options).double()
        with torch.no_grad():
            judged.append(Sample(options, checked_loss(loss_of_gates, gates).item()))
    return min(judged, key=lambda sample: sample.loss)


def _linear_bound(
    loss_of_gates: GatesLoss, probabilities: Tensor, start: Tensor, knapsack: ChoiceKnapsack
) -> tuple[float, float]:
    """Returns the loss at the probabilities, and the least of its linearisation over choices."""
    leaf = probabilities.detach().requires_grad_()
    loss = checked_loss(loss_of_gates, leaf)
    slope = gradient_of_gates(loss, leaf)
    least = -knapsack.best(torch.where(start > -torch.inf, -slope, -torch.inf)).value
    return loss.item(), loss.item() + least - float((slope * probabilities).sum())


def _largest_residual(found: SearchResult, budgets: ChoiceBudgets | None) -> float:
    if budgets is None:
        return 0.0
    scale = budgets.limit_vector.abs().clamp(min=1.0)
    return float((found.state.retraction.residual.abs() / scale).max())
