"""What every loss of one layer's routing promises."""

from dataclasses import replace

import torch
import torch.distributed as dist
from torch import Tensor

from drgr.collectives import rank, world_size
from drgr.routing import LossInputs, RoutingLoss
from drgr.testing.batches import check_close, fail, random_mask, routed, rows_of, skewed_logits

_EXPERTS, _LENGTH, _SEQUENCES = 6, 8, 8
_TOKENS = _LENGTH * _SEQUENCES


def check_loss(
    loss: RoutingLoss, *, keeps_order: bool = False, shares_processes: bool = True
) -> None:
    """Checks that a loss keeps what :class:`~drgr.routing.RoutingLoss` promises.

    A finite scalar in float32 at least, also for half-precision scores and for a batch of padding;
    a gradient with respect to the logits that equals differences of the loss; padding, NaN
    included, changes neither; experts in another order have the same loss, and so have tokens
    unless their order means something. In a process of a group, also: the mean over processes, of
    values and of gradients, is that of the whole batch.

    Args:
        loss: The loss; parameters are bound.
        keeps_order: Whether the order of tokens means something; sequences as a whole never do.
        shares_processes: Whether it is meant for the batch of all processes.

    Raises:
        ConformanceError: With the promise that is broken.
    """
    _check_value(loss)
    _check_gradient(loss)
    _check_padding(loss)
    _check_order(loss, keeps_order=keeps_order)
    if shares_processes and world_size() > 1:
        _check_processes(loss)


def _inputs(logits: Tensor, *, valid: Tensor | None = None) -> LossInputs:
    routing = routed(logits, valid=valid)
    scores = logits.softmax(dim=1)
    return LossInputs(
        scores=scores,
        plan=routing.plan,
        valid=valid,
        logits=logits,
        sequence_length=_LENGTH,
    )


def _draw(*, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return skewed_logits(_TOKENS, _EXPERTS, seed=seed).to(dtype)


def _value_and_gradient(
    loss: RoutingLoss, logits: Tensor, valid: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    leaf = logits.detach().clone().requires_grad_()
    value = loss(_inputs(leaf, valid=valid))
    (gradient,) = torch.autograd.grad(value, leaf, allow_unused=True, materialize_grads=True)
    return value.detach(), gradient


def _check_value(loss: RoutingLoss) -> None:
    promise = "the loss is a finite scalar in float32 at least"
    cases = {
        "float64": (_draw(), None),
        "bfloat16": (_draw(dtype=torch.bfloat16), None),
        "a batch of padding": (_draw(), torch.zeros(_TOKENS, dtype=torch.bool)),
    }
    for name, (logits, valid) in cases.items():
        value, gradient = _value_and_gradient(loss, logits, valid)
        if value.dim() != 0 or value.dtype not in (torch.float32, torch.float64):
            fail(loss, promise, f"got {value.dtype} of shape {tuple(value.shape)} for {name}")
        if not bool(value.isfinite()) or not bool(gradient.isfinite().all()):
            fail(loss, promise, f"got {value.item()} for {name}, or a gradient that is not finite")


def _check_gradient(loss: RoutingLoss) -> None:
    promise = "the gradient with respect to the logits is that of the value at a fixed plan"
    logits = _draw()
    fixed = _inputs(logits)
    _, gradient = _value_and_gradient(loss, logits)
    if not bool((gradient != 0).any()):
        fail(loss, promise, "it is zero")
    direction = torch.randn(logits.shape, generator=torch.Generator().manual_seed(1)).double()

    def at(step: float) -> Tensor:
        moved = logits + step * direction
        return loss(replace(fixed, logits=moved, scores=moved.softmax(dim=1)))

    difference = (at(1e-5) - at(-1e-5)) / 2e-5
    check_close(loss, promise, (gradient * direction).sum(), difference, tolerance=1e-4)


def _check_padding(loss: RoutingLoss) -> None:
    promise = "padding changes neither the loss nor its gradient"
    valid = random_mask(_TOKENS, seed=2)
    clean = _draw()
    garbage = torch.where(valid.unsqueeze(1), clean, torch.full_like(clean, torch.nan))
    value, gradient = _value_and_gradient(loss, clean, valid)
    planned = _inputs(clean, valid=valid)
    leaf = garbage.requires_grad_()
    again = loss(replace(planned, logits=leaf, scores=leaf.softmax(dim=1)))
    (also,) = torch.autograd.grad(again, leaf, allow_unused=True, materialize_grads=True)
    check_close(loss, promise, again.detach(), value)
    check_close(loss, promise, also.nan_to_num(0.0), gradient)
    if bool((gradient[~valid] != 0).any()):
        fail(loss, promise, "padding has a gradient")


def _check_order(loss: RoutingLoss, *, keeps_order: bool) -> None:
    logits, generator = _draw(), torch.Generator().manual_seed(0)
    value = loss(_inputs(logits))
    experts = torch.randperm(_EXPERTS, generator=generator)
    promise = "experts in another order have the same loss"
    check_close(loss, promise, loss(_inputs(logits[:, experts])), value)
    if keeps_order:
        order = torch.randperm(_SEQUENCES, generator=generator)
        moved = logits.view(_SEQUENCES, _LENGTH, _EXPERTS)[order].reshape(_TOKENS, _EXPERTS)
        promise = "sequences in another order have the same loss"
    else:
        moved = logits[torch.randperm(_TOKENS, generator=generator)]
        promise = "tokens in another order have the same loss"
    check_close(loss, promise, loss(_inputs(moved)), value)


def _check_processes(loss: RoutingLoss) -> None:
    logits, valid = _draw(), random_mask(_TOKENS, seed=2)
    value, gradient = _value_and_gradient(loss, logits, valid)
    size = _SEQUENCES // world_size() * _LENGTH
    rows = slice(rank() * size, (rank() + 1) * size)
    leaf = logits.requires_grad_()
    whole = routed(logits.detach(), valid=valid)
    part = loss(
        LossInputs(
            scores=leaf[rows].softmax(dim=1),
            plan=rows_of(whole, rows).plan,
            valid=valid[rows],
            group=dist.group.WORLD,
            logits=leaf[rows],
            sequence_length=_LENGTH,
        )
    )
    (mine,) = torch.autograd.grad(part, leaf, allow_unused=True, materialize_grads=True)
    for name, own, expected in (
        ("loss", part.detach(), value),
        ("gradient", mine, gradient),
    ):
        total = own.clone()
        dist.all_reduce(total)
        promise = f"the mean {name} over processes is that of the whole batch"
        check_close(loss, promise, total / world_size(), expected)
