"""A model's parameters as one vector, moved along a direction and put back bit for bit."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor


def flat(tensors: Sequence[Tensor]) -> Tensor:
    """Returns all entries in one float32 (or wider) vector, detached."""
    return torch.cat([wide(tensor.detach()).reshape(-1) for tensor in tensors])


@contextmanager
def displaced(parameters: Sequence[Tensor], direction: Tensor) -> Iterator[None]:
    """Adds a vector to parameters for the time of a block; afterwards they are what they were."""
    saved = [parameter.detach().clone() for parameter in parameters]
    parts = direction.split([parameter.numel() for parameter in parameters])
    try:
        with torch.no_grad():
            for parameter, part in zip(parameters, parts, strict=True):
                parameter.add_(part.view_as(parameter).to(parameter.dtype))
        yield
    finally:
        with torch.no_grad():
            for parameter, before in zip(parameters, saved, strict=True):
                parameter.copy_(before)


def difference_step(parameters: Sequence[Tensor], direction: Tensor) -> float:
    """Returns the step of a central difference along a direction.

    ``|step * direction| = eps^(1/3) max(1, |parameters|)`` balances, in order of magnitude, the
    rounding of a smooth loss against its third derivatives. For half types, ``eps`` is theirs.

    Raises:
        ValueError: If the direction is 0 or not finite.
    """
    length = direction.norm().item()
    if not (0 < length < torch.inf):
        raise ValueError(f"direction must be finite and not 0, got norm {length}")
    size = torch.linalg.vector_norm(
        torch.stack([wide(parameter.detach()).norm() for parameter in parameters])
    ).item()
    eps = max(torch.finfo(parameter.dtype).eps for parameter in parameters)
    step: float = eps ** (1 / 3) * max(1.0, size) / length
    return step


def wide(tensor: Tensor) -> Tensor:
    """Returns a tensor in float32 if its type is a half one."""
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor
