"""Checks of the arguments of a worst case."""

import math

import torch
from torch import Tensor

from drgr._checks import check_not_negative, check_positive
from drgr.ambiguity.divergence import Divergence
from drgr.ambiguity.scaling import Level
from drgr.ambiguity.spectral import Spectral

_NOMINAL_SUM_TOLERANCE = 1e-4


def checked_losses(losses: Tensor, *, allow_infinite: bool = False) -> Tensor:
    """Returns the losses in float32 or float64, after checking dtype, shape and values."""
    if not losses.is_floating_point():
        raise TypeError(f"losses must be a floating-point tensor, got {losses.dtype}; convert it")
    if losses.dim() == 0 or losses.shape[-1] == 0:
        raise ValueError(
            f"losses must have shape (..., n) with n >= 1, got {tuple(losses.shape)}; "
            "put the atoms along the last dimension"
        )
    right = losses.isfinite()
    if not bool(right.all()):
        if allow_infinite:
            right = right | losses.isposinf()
        _refuse_wrong_losses(losses, right)
    return losses if losses.dtype in (torch.float32, torch.float64) else losses.float()


def _refuse_wrong_losses(losses: Tensor, right: Tensor) -> None:
    if bool(right.all()):
        return
    index = tuple((~right).nonzero()[0].tolist())
    raise ValueError(
        f"losses must be finite, got {losses[index].item()} at index {_plain(index)}; "
        "drop or repair that entry before weighting"
    )


def checked_nominal(nominal: Tensor | None, losses: Tensor) -> Tensor:
    """Returns nominal probabilities in float64, normalised, of the shape of ``losses``."""
    if nominal is None:
        return torch.full_like(losses, 1 / losses.shape[-1], dtype=torch.float64)
    if not nominal.is_floating_point():
        raise TypeError(f"nominal must be a floating-point tensor, got {nominal.dtype}; convert it")
    if nominal.dim() == 0 or not _expands(nominal.shape, losses.shape):
        raise ValueError(
            f"nominal must have shape (n,) or that of losses {tuple(losses.shape)}, "
            f"got {tuple(nominal.shape)}"
        )
    wrong = ~(nominal.isfinite() & (nominal >= 0))
    if bool(wrong.any()):
        index = tuple(wrong.nonzero()[0].tolist())
        raise ValueError(
            f"nominal must be finite and not negative, got {nominal[index].item()} "
            f"at index {_plain(index)}; give probabilities"
        )
    nominal = nominal.to(torch.float64)
    totals = nominal.sum(dim=-1, keepdim=True)
    if bool(((totals - 1).abs() > _NOMINAL_SUM_TOLERANCE).any()):
        furthest = totals.flatten()[(totals - 1).abs().argmax()].item()
        raise ValueError(
            f"nominal must sum to 1, got a sum of {furthest:.6g}; divide it by its sum"
        )
    return (nominal / totals).expand(losses.shape)


def checked_level(
    divergence: Divergence | Spectral,
    losses: Tensor,
    radius: float | Tensor | None,
    penalty: float | Tensor | None,
) -> Level:
    """Returns the size of the set as float64, one entry per leading index of ``losses``."""
    given = (radius is not None) + (penalty is not None)
    if not divergence.has_level:
        if given:
            raise ValueError(f"{divergence} fixes its own size; give neither radius nor penalty")
        # Its generator is 0 on the set, so any penalty gives the same problem.
        return Level(kind="penalty", value=_batch_of("penalty", 1.0, losses))
    if isinstance(divergence, Spectral) and radius is not None:
        raise ValueError(
            "a smoothed spectral risk takes a penalty and no radius; give one in loss units"
        )
    if given != 1:
        raise ValueError(
            f"exactly one of radius and penalty must be given, got radius={radius}, "
            f"penalty={penalty}"
        )
    if radius is not None:
        return Level(kind="radius", value=_batch_of("radius", radius, losses))
    assert penalty is not None
    return Level(kind="penalty", value=_batch_of("penalty", penalty, losses))


def _batch_of(name: str, value: float | Tensor, losses: Tensor) -> Tensor:
    """Returns a checked level as float64 with the leading shape of ``losses``."""
    allows_zero = name == "radius"
    if isinstance(value, Tensor):
        extreme = float("nan") if bool(value.isnan().any()) else _worst_entry(value, allows_zero)
    else:
        extreme = float(value)
    (check_not_negative if allows_zero else check_positive)(name, extreme)
    level = torch.as_tensor(value, dtype=torch.float64, device=losses.device)
    if not _expands(level.shape, losses.shape[:-1]):
        raise ValueError(
            f"{name} must be a number or broadcast to the leading shape of losses "
            f"{tuple(losses.shape[:-1])}, got shape {tuple(level.shape)}"
        )
    return level.expand(losses.shape[:-1])


def _worst_entry(value: Tensor, allows_zero: bool) -> float:
    """Returns an entry that fails the check of its level if there is one."""
    if value.numel() == 0:
        return 0.0 if allows_zero else 1.0
    smallest, largest = value.min().item(), value.max().item()
    return float(largest if math.isinf(largest) else smallest)


def _expands(shape: torch.Size, target: torch.Size) -> bool:
    """Returns whether a tensor of ``shape`` can be expanded to ``target``."""
    return len(shape) <= len(target) and all(
        have in (1, want) for have, want in zip(reversed(shape), reversed(target), strict=False)
    )


def _plain(index: tuple[int, ...]) -> str:
    return str(index[0]) if len(index) == 1 else str(index)
