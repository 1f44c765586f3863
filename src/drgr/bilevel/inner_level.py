"""The inner level: parameters that any torch optimizer trains."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from drgr.bilevel.structures import Layout, Parameters, layout_of, named_leaves, rebuilt
from drgr.errors import NonFiniteLossError

InnerOptimizer = Callable[[list[Tensor]], torch.optim.Optimizer]
"""Makes a ``torch.optim`` optimizer of tensors: ``lambda params: torch.optim.SGD(params, 0.1)``."""


@dataclass(frozen=True, slots=True)
class InnerSolution:
    """Where an optimizer came."""

    params: Parameters
    num_steps: int


def inner_solution(
    loss: Callable[[Parameters, Parameters], Tensor],
    outer: Parameters,
    start: Parameters,
    make_optimizer: InnerOptimizer,
    *,
    max_steps: int,
    tolerance: float,
) -> InnerSolution:
    """Takes steps of a new optimizer on ``loss(outer, .)``.

    Args:
        loss: The inner loss.
        outer: The outer parameters, fixed.
        start: Where to start; left alone.
        make_optimizer: Makes the optimizer.
        max_steps: Most steps.
        tolerance: Norm of the gradient at which to stop.

    Raises:
        NonFiniteLossError: If the steps lead to parameters that are not finite.
    """
    layout = layout_of("inner_params", start)
    trained = trainable_copy(layout, start)
    leaves = [tensor for _, tensor in named_leaves(trained)]
    optimizer = make_optimizer(leaves)
    slope = math.inf

    def closure() -> float:
        nonlocal slope
        with torch.enable_grad():
            value = loss(outer, trained)
        gradients = torch.autograd.grad(value, leaves, materialize_grads=True)
        for tensor, gradient in zip(leaves, gradients, strict=True):
            tensor.grad = gradient
        slope = torch.linalg.vector_norm(
            torch.stack([gradient.norm() for gradient in gradients])
        ).item()
        return value.item()

    num_steps = 0
    while num_steps < max_steps and slope > tolerance:
        optimizer.step(closure)
        num_steps += 1
    check_finite(leaves)
    return InnerSolution(layout.structure(layout.vector(trained)), num_steps)


def trainable_copy(layout: Layout, params: Parameters) -> Parameters:
    """Returns copies of nested parameters that an optimizer may change."""
    structure = layout.structure(layout.vector(params))
    return rebuilt(
        structure,
        (tensor.detach().clone().requires_grad_() for _, tensor in named_leaves(structure)),
    )


def check_finite(inner: list[Tensor]) -> None:
    """Raises ``NonFiniteLossError`` if an optimizer left the finite numbers."""
    if not all(bool(tensor.isfinite().all()) for tensor in inner):
        raise NonFiniteLossError(
            "inner_params are no longer finite after the steps of inner_optimizer; "
            "lower its learning rate"
        )
