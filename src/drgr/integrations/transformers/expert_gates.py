"""The gate projections of experts, found by what a block does with its packed weights."""

from typing import Any

import torch
from torch import Tensor

from drgr.errors import UnknownRouterError


def expert_gates(experts: Any, name: str) -> Tensor:
    """Returns the gate projections of a block's experts, a view of its parameter.

    Gated experts pack two projections into one weight, ``[gate; up]`` or the reverse. Their output
    is linear in what the one makes and bent by the other: that is the gate.

    Args:
        experts: The experts module of one MoE block.
        name: Its dotted name, for messages.

    Returns:
        One row for each neuron, shape ``(E, D, d)``; gradients reach the parameter.

    Raises:
        UnknownRouterError: If the experts have no gate, or the halves cannot be told apart.
    """
    if not experts.has_gate:
        raise UnknownRouterError(
            f"{name} ({type(experts).__name__}) has experts without a gate projection, which is "
            f"what couples them to router rows; take a model with gated experts"
        )
    packed: Tensor = experts.gate_up_proj
    packed = packed.transpose(1, 2) if experts.is_transposed else packed
    first, second = packed.chunk(2, dim=1)
    bends = [_bends(experts, half, packed) for half in (0, 1)]
    if bends == [True, False]:
        return first
    if bends == [False, True]:
        return second
    raise UnknownRouterError(
        f"{name} ({type(experts).__name__}) packs gate and up projections in an order that its "
        f"output does not tell (interleaved rows, for instance); take a model that has them one "
        f"after the other"
    )


@torch.no_grad()
def _bends(experts: Any, half: int, packed: Tensor) -> bool:
    """Whether the gated output is no affine function of one half of its input."""
    generator = torch.Generator().manual_seed(0)
    width = packed.shape[1] // 2
    drawn = torch.rand(2, width, generator=generator, dtype=torch.float64) + 0.5
    parts = drawn.to(packed.device, torch.promote_types(packed.dtype, torch.float32))

    def output(sign: float) -> Tensor:
        halves = [parts[0], parts[1]]
        halves[half] = sign * halves[half]
        gated: Tensor = experts._apply_gate(torch.cat(halves).unsqueeze(0))
        return gated

    curvature = output(1.0) + output(-1.0) - 2 * output(0.0)
    return bool(curvature.abs().max() > 1e-3 * output(1.0).abs().max())
