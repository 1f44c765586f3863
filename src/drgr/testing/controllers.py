"""What every price controller promises."""

import torch
import torch.distributed as dist
from torch import Tensor

from drgr.collectives import rank, world_size
from drgr.routing import ControllerFactory, PriceController, max_violation
from drgr.testing.batches import (
    check_close,
    fail,
    random_mask,
    routed,
    rows_of,
    skewed_logits,
)

_EXPERTS, _TOKENS, _STEPS = 8, 512, 4


def check_controller(
    build: ControllerFactory, *, balances: bool = True, exact_over_processes: bool = True
) -> None:
    """Checks that a controller keeps what :class:`~drgr.routing.PriceController` promises.

    Prices are finite, float32, with mean zero. Splitting a step into micro-batches changes nothing,
    nor does padding; an update without observations and a selection leave the state alone; the
    state goes through ``state_dict``; experts are treated alike, whatever their order; the load of
    a skewed router becomes more even. In a process of a group, also: all processes together equal
    one.

    Args:
        build: Builds a controller for a number of experts on a device.
        balances: Whether prices are meant to even out the load.
        exact_over_processes: Whether several processes give the prices of one.

    Raises:
        ConformanceError: With the promise that is broken.
    """
    _check_prices(build)
    _check_micro_batches(build)
    _check_padding(build)
    _check_untouched(build)
    _check_state(build)
    _check_order_of_experts(build)
    if balances:
        _check_balance(build)
    if exact_over_processes and world_size() > 1:
        _check_processes(build)


def _new(build: ControllerFactory) -> PriceController:
    return build(_EXPERTS, torch.device("cpu"))


def _logits(step: int) -> Tensor:
    # The favourites of one seed, so that steps have one router.
    favours = skewed_logits(1, _EXPERTS, seed=0)
    return favours + 0.5 * skewed_logits(_TOKENS, _EXPERTS, seed=step + 1)


def _trained(build: ControllerFactory, *, steps: int = _STEPS) -> PriceController:
    controller = _new(build)
    for step in range(steps):
        controller.observe(routed(_logits(step), prices=controller.prices))
        controller.update()
    return controller


def _check_prices(build: ControllerFactory) -> None:
    promise = "prices are float32 of shape (E,), finite, with mean zero"
    for controller in (_new(build), _trained(build)):
        prices = controller.prices
        if prices.shape != (_EXPERTS,) or prices.dtype != torch.float32:
            fail(controller, promise, f"got {prices.dtype} of shape {tuple(prices.shape)}")
        if not bool(prices.isfinite().all()) or abs(float(prices.mean())) > 1e-5:
            fail(controller, promise, f"got {prices.tolist()}")


def _check_micro_batches(build: ControllerFactory) -> None:
    whole, split = _trained(build), _trained(build)
    logits = _logits(99)
    # In an order in which no part has the load of the whole.
    logits = logits[logits.argmax(dim=1).argsort(stable=True)]
    routing = routed(logits, prices=whole.prices)
    whole.observe(routing)
    for rows in (slice(0, _TOKENS // 2), slice(_TOKENS // 2, _TOKENS)):
        split.observe(rows_of(routing, rows))
    whole.update()
    split.update()
    promise = "a step in micro-batches moves prices like the step in one batch"
    check_close(whole, promise, split.prices, whole.prices)


def _check_padding(build: ControllerFactory) -> None:
    valid = random_mask(_TOKENS, seed=3)
    plain, padded = _trained(build), _trained(build)
    logits = _logits(98)
    plain.observe(routed(logits[valid], prices=plain.prices))
    garbage = torch.where(valid.unsqueeze(1), logits, 50.0)
    padded.observe(routed(garbage, prices=padded.prices, valid=valid))
    plain.update()
    padded.update()
    check_close(plain, "padding moves no price", padded.prices, plain.prices)


def _check_untouched(build: ControllerFactory) -> None:
    controller = _trained(build)
    before = {name: tensor.clone() for name, tensor in controller.state_dict().items()}
    routed(_logits(97), prices=controller.prices)
    promise = "a selection leaves the state alone"
    for name, tensor in controller.state_dict().items():
        check_close(controller, promise, tensor, before[name], tolerance=0.0)


def _check_state(build: ControllerFactory) -> None:
    one, other = _trained(build), _new(build)
    other.load_state_dict(one.state_dict())
    promise = "a controller that was restored from state_dict goes on like the one that was saved"
    check_close(one, promise, other.prices, one.prices, tolerance=0.0)
    for controller in (one, other):
        controller.observe(routed(_logits(96), prices=controller.prices))
        controller.update()
    check_close(one, promise, other.prices, one.prices, tolerance=0.0)
    try:
        other.load_state_dict({"of another kind": torch.zeros(1)})
    except ValueError:
        return
    fail(one, "the state of another kind is refused with ValueError", "it was taken")


def _check_order_of_experts(build: ControllerFactory) -> None:
    order = torch.randperm(_EXPERTS, generator=torch.Generator().manual_seed(0))
    plain, permuted = _new(build), _new(build)
    for step in range(_STEPS):
        plain.observe(routed(_logits(step), prices=plain.prices))
        permuted.observe(routed(_logits(step)[:, order], prices=permuted.prices))
        plain.update()
        permuted.update()
    promise = "experts in another order have the same prices in that order"
    check_close(plain, promise, permuted.prices, plain.prices[order], tolerance=1e-4)


def _check_balance(build: ControllerFactory, *, steps: int = 40) -> None:
    controller = _trained(build, steps=steps)
    before = max_violation(routed(_logits(0)).plan.expert_load)
    after = max_violation(routed(_logits(0), prices=controller.prices).plan.expert_load)
    if not float(after) < float(before):
        found = f"MaxVio is {float(after):.3f} after {steps} steps, {float(before):.3f} without"
        fail(controller, "prices make the load of a skewed router more even", found)


def _check_processes(build: ControllerFactory) -> None:
    alone, together = _new(build), _new(build)
    size = _TOKENS // world_size()
    rows = slice(rank() * size, (rank() + 1) * size)
    for step in range(_STEPS):
        routing = routed(_logits(step)[: size * world_size()], prices=alone.prices)
        alone.observe(routing)
        together.observe(rows_of(routing, rows))
        alone.update(_alone())
        together.update()
        promise = "several processes move prices like one with the whole batch"
        check_close(alone, promise, together.prices, alone.prices)


def _alone() -> dist.ProcessGroup:
    """A group of this process only; every process of the default group must call it."""
    groups = [dist.new_group([number]) for number in range(world_size())]
    mine = groups[rank()]
    assert isinstance(mine, dist.ProcessGroup)
    return mine
