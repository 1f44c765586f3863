"""What scorer, controller and selector promise together, in a layer of experts."""

import copy
from collections.abc import Sequence

import torch
from torch import Tensor

from drgr.models import GatedExperts, MoELayer
from drgr.routing import ControllerFactory, LayerRouting, RoutingPolicy
from drgr.routing.scores import ScorerFactory
from drgr.routing.selection import SelectorFactory
from drgr.testing.batches import check_close, fail
from drgr.testing.scorers import PLACE

_LENGTH, _SEQUENCES = 8, 6
_EXPERTS, _WIDTH = PLACE.num_experts, PLACE.width


def check_router(
    scorer: ScorerFactory,
    selector: SelectorFactory,
    controller: ControllerFactory,
    *,
    trains_router: bool = True,
) -> None:
    """Checks that scorer, selection and prices work together in a :class:`~drgr.models.MoELayer`.

    Counts add up; in float64 the output is the dense sum over experts of the plan's weights, and
    the grouped products agree with it; gradients reach the experts that ran, the router and
    nothing else; padding changes no output and no count; at evaluation sequences in another order
    have the same outputs, nothing changes, and a state that was saved and restored gives the same
    outputs; bfloat16 autocast is finite.

    Args:
        scorer: Builds the scorer.
        selector: Builds the selection.
        controller: Builds the prices.
        trains_router: Whether the router weight learns by gradients; centroids do not.

    Raises:
        ConformanceError: With the promise that is broken.
    """

    def build(dtype: torch.dtype = torch.float64) -> MoELayer:
        torch.manual_seed(0)
        layer = MoELayer(
            GatedExperts(_EXPERTS, width=_WIDTH, expert_width=12, dtype=dtype),
            policy=RoutingPolicy(
                selector=selector(PLACE), controller=controller(_EXPERTS, PLACE.device)
            ),
            scorer=scorer(PLACE).to(dtype),
        )
        return _trained(layer, dtype)

    with torch.random.fork_rng(devices=[]):  # the caller's generator stays as it is
        layer = build()
        for training in (True, False):
            _check_output(layer.train(training))
            _check_padding(layer.train(training))
        _check_gradients(layer.train(), trains_router=trains_router)
        _check_evaluation(layer.eval(), build().eval())
        _check_half_precision(build(torch.float32).train())


def _hidden(*, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(_SEQUENCES, _LENGTH, _WIDTH, generator=generator).to(dtype)


def _run(layer: MoELayer, hidden: Tensor, **options: Tensor) -> tuple[Tensor, LayerRouting]:
    torch.manual_seed(1)  # scorers with noise draw the same again
    output, routing = layer(hidden, **options)
    return output, routing


def _trained(layer: MoELayer, dtype: torch.dtype) -> MoELayer:
    layer.train()
    for step in range(3):
        _, routing = _run(layer, _hidden(seed=step + 5, dtype=dtype))
        layer.observe(routing)
        layer.update()
    return layer


def _dense(layer: MoELayer, hidden: Tensor, routing: LayerRouting) -> Tensor:
    """The sum over all experts of weight times output, from the definition."""
    plan = routing.plan
    weights = torch.zeros(len(hidden), _EXPERTS, dtype=hidden.dtype)
    weights = weights.scatter_add(1, plan.expert_ids, plan.combine_weights.to(hidden.dtype))
    gate, up = layer.experts.gate_up.chunk(2, dim=1)
    inner = torch.nn.functional.silu(torch.einsum("td,eid->tei", hidden, gate))
    inner = inner * torch.einsum("td,eid->tei", hidden, up)
    outputs = torch.einsum("tei,edi->ted", inner, layer.experts.down)
    return torch.einsum("te,ted->td", weights, outputs)


def _check_output(layer: MoELayer) -> None:
    hidden = _hidden()
    output, routing = _run(layer, hidden)
    plan, selection = routing.plan, routing.selection
    promise = "assignments by expert, kept candidates and spend are the same number"
    counts = (int(plan.expert_load.sum()), int(plan.keep.sum()), int(selection.spend))
    if len(set(counts)) != 1:
        fail(layer.scorer, promise, f"got {counts}")
    if bool((plan.combine_weights[~plan.keep] != 0).any()):
        fail(layer.scorer, "an expert that does not run has no weight", "one has")
    promise = "the output is the sum over the plan of weights times experts, in float64"
    expected = _dense(layer, hidden.view(-1, _WIDTH), routing).view(hidden.shape)
    check_close(layer.scorer, promise, output, expected, tolerance=1e-9)


def _check_padding(layer: MoELayer) -> None:
    hidden = _hidden()
    valid = torch.ones(_SEQUENCES, _LENGTH, dtype=torch.bool)
    valid[-2:] = False
    garbage = torch.where(valid.unsqueeze(2), hidden, torch.nan)
    # Noise depends on the number of tokens, so that it is compared without.
    noiseless = layer.scorer.training
    layer.scorer.eval()
    padded, routing = _run(layer, garbage, valid=valid)
    plain, expected = _run(layer, hidden[:-2])
    layer.scorer.train(noiseless)
    promise = "padding changes no output and no count"
    check_close(layer.scorer, promise, padded[:-2], plain, tolerance=1e-9)
    check_close(
        layer.scorer, promise, routing.plan.expert_load, expected.plan.expert_load, tolerance=0.0
    )


def _check_gradients(layer: MoELayer, *, trains_router: bool) -> None:
    output, routing = _run(layer, _hidden())
    layer.zero_grad(set_to_none=True)
    output.square().sum().backward()
    ran = routing.plan.expert_load > 0
    for name, weight in (("gate_up", layer.experts.gate_up), ("down", layer.experts.down)):
        assert weight.grad is not None
        reached = weight.grad.flatten(1).abs().sum(dim=1) > 0
        if not torch.equal(reached, ran):
            promise = f"gradients reach {name} of the experts that ran, and of no other"
            fail(layer.scorer, promise, f"ran {ran.tolist()}, reached {reached.tolist()}")
    gradient = layer.router.weight.grad
    is_reached = gradient is not None and bool((gradient != 0).any() & gradient.isfinite().all())
    if is_reached != trains_router:
        fail(layer.scorer, "a finite gradient reaches a router that trains", f"it is {gradient}")


def _check_evaluation(layer: MoELayer, other: MoELayer) -> None:
    before = copy.deepcopy(layer.state_dict())
    hidden = _hidden(seed=3)
    output, _ = _run(layer, hidden)
    _same_state(layer, before)
    order = torch.randperm(_SEQUENCES, generator=torch.Generator().manual_seed(0))
    moved, _ = _run(layer, hidden[order])
    promise = "at evaluation sequences in another order have the same outputs"
    check_close(layer.scorer, promise, moved, output[order], tolerance=1e-9)
    other.load_state_dict(before)
    again, _ = _run(other, hidden)
    promise = "a layer that was restored from state_dict gives the same outputs"
    check_close(layer.scorer, promise, again, output, tolerance=0.0)


def _same_state(layer: MoELayer, before: dict[str, Tensor]) -> None:
    flat = _tensors(layer.state_dict())
    for (name, tensor), (_, kept) in zip(flat, _tensors(before), strict=True):
        promise = f"evaluation leaves {name} alone"
        check_close(layer.scorer, promise, tensor, kept, tolerance=0.0)


def _tensors(state: object, prefix: str = "") -> Sequence[tuple[str, Tensor]]:
    if isinstance(state, Tensor):
        return [(prefix, state)]
    if isinstance(state, dict):
        return [one for key, part in state.items() for one in _tensors(part, f"{prefix}.{key}")]
    return []


def _check_half_precision(layer: MoELayer) -> None:
    with torch.autocast("cpu", torch.bfloat16):
        output, _ = _run(layer, _hidden(dtype=torch.float32))
    layer.zero_grad(set_to_none=True)
    output.float().square().sum().backward()
    gradients = [weight.grad for weight in layer.parameters() if weight.grad is not None]
    if not all(bool(tensor.isfinite().all()) for tensor in (output, *gradients)):
        fail(layer.scorer, "outputs and gradients in bfloat16 autocast are finite", "some are not")
