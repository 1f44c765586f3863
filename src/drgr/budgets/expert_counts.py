"""Bounds of a budget in whole experts, where all experts cost the same.

With one cost ``c`` a plan is a choice of how many experts: between ``ceil(low / c)`` and
``floor(high / c)`` for a token and at most ``floor(C / c)`` for the batch.
"""

import math
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

_SLACK_FLOAT64 = 2.0**-40
_SLACK_FLOAT32 = 2.0**-21


def relative_slack(*amounts: float | Tensor) -> float:
    """Returns how far beyond a bound a cost may lie and still count as inside, as a share of it.

    Decimal costs are not exact in binary: three times 0.1 exceeds 0.3. The slack is four roundings
    of float32, ``2**-21``, where a tensor is float32, and ``2**-40``, the rounding of a long sum,
    for numbers and float64 tensors. Half types hold the amount that was meant or are far from it:
    they count as float32.
    """
    coarse = any(isinstance(a, Tensor) and a.dtype != torch.float64 for a in amounts)
    return _SLACK_FLOAT32 if coarse else _SLACK_FLOAT64


@final
@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ExpertCounts:
    """Bounds in experts; numbers, so that using them never waits for a device."""

    cost: float
    """Cost ``c`` of any expert on one token."""
    fewest: int | Tensor
    """Least experts of a token; int64 of shape ``(T,)`` where bounds differ between tokens."""
    most: int | Tensor
    """Most experts of a token, at most ``E``; int64 of shape ``(T,)`` likewise."""
    widest: int
    """The largest entry of ``most``."""
    total: int | None
    """Most assignments of the batch; None for no bound."""
    sum_fewest: int | None
    """Sum of ``fewest`` where that is a tensor."""
    conflict: tuple[int, int] | None
    """``fewest`` and ``most`` of the first token where the former is larger; None if none is."""

    def least_total(self, num_tokens: int) -> int:
        """Returns the least assignments that ``num_tokens`` tokens have together."""
        return self.fewest * num_tokens if isinstance(self.fewest, int) else self.sum_fewest or 0


def expert_counts(
    costs: Tensor, per_token: tuple[float | Tensor, float | Tensor], per_batch: float | Tensor
) -> ExpertCounts | None:
    """Turns bounds in cost into bounds in experts.

    Args:
        costs: Cost of each expert, above 0, shape ``(E,)``.
        per_token: Least and most cost of a token, each a number or of shape ``()`` or ``(T,)``.
        per_batch: Most cost of the batch, a number or of shape ``()``.

    Returns:
        The counts, or None where the costs differ. Reads the tensors: meant for construction.
    """
    values = costs.detach().double().cpu()
    cost = values[0].item()
    if not bool((values == cost).all()):
        return None
    slack = relative_slack(costs, *per_token, per_batch)
    low, high = (torch.as_tensor(b, dtype=torch.float64).detach().cpu() for b in per_token)
    fewest = (low / cost * (1 - slack)).ceil().long()
    most = (high / cost * (1 + slack)).floor().clamp_max(len(values)).long()
    is_one = fewest.dim() == most.dim() == 0
    fewest, most = torch.broadcast_tensors(fewest, most)
    bound = torch.as_tensor(per_batch, dtype=torch.float64).detach().item()
    return ExpertCounts(
        cost=cost,
        fewest=int(fewest) if is_one else fewest.to(costs.device),
        most=int(most) if is_one else most.to(costs.device),
        widest=int(most.max()) if most.numel() else 0,
        total=None if math.isinf(bound) else math.floor(bound / cost * (1 + slack)),
        sum_fewest=None if is_one else int(fewest.sum()),
        conflict=_first_conflict(fewest.reshape(-1), most.reshape(-1)),
    )


def _first_conflict(fewest: Tensor, most: Tensor) -> tuple[int, int] | None:
    wrong = (fewest > most).nonzero()
    return (int(fewest[wrong[0]]), int(most[wrong[0]])) if wrong.numel() else None
