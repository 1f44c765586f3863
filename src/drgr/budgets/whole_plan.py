r"""The best plan where all experts cost the same: a greedy pass.

With ``k_min`` and ``k_max`` experts a token and ``n`` assignments a batch the plans are the
independent sets of a laminar matroid (a cap for each token inside a cap for the batch), on top of
each token's ``k_min`` best. So it is optimal to give every token its ``k_min`` best experts, and
the rest of ``n`` to the largest of all remaining scores above 0, wherever they are.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from drgr.budgets.budget_selection import BudgetSelection
from drgr.budgets.expert_counts import ExpertCounts


def best_whole_plan(scores: Tensor, counts: ExpertCounts) -> BudgetSelection:
    """Returns the optimal plan for finite or ``-inf`` scores ``(T, E)`` in float32 or float64.

    Equal scores are kept in the order of token, then expert. Only sizes steer the computation, so
    it neither waits for a device nor breaks a graph.
    """
    # One more than a token may have, to see what it is refused.
    ranked = scores.topk(min(counts.widest + 1, scores.shape[1]), dim=1).values
    fewest, most = (_per_row(count, scores) for count in (counts.fewest, counts.most))
    position = torch.arange(ranked.shape[1], device=scores.device)
    is_least = (position < fewest) & (ranked > -torch.inf)
    is_extra = (position >= fewest) & (position < most) & (ranked > 0)
    num_least = is_least.sum(dim=1, keepdim=True)
    limit = scores.numel() if counts.total is None else min(counts.total, scores.numel())
    extras = _chosen(torch.where(is_extra, ranked, 0.0), is_extra, limit, num_least.sum())
    num_kept = num_least + extras.is_kept.sum(dim=1, keepdim=True)
    price = _price_between(extras)
    value = torch.where(position < num_kept, ranked, 0.0).sum(dtype=torch.float64)
    cost = torch.tensor(counts.cost, dtype=torch.float64, device=scores.device)
    worst = _entry(ranked, num_kept - 1)
    return BudgetSelection(
        mask=_leading(scores, worst, num_kept - (ranked > worst).sum(dim=1, keepdim=True)),
        token_price=_token_price(worst, _entry(ranked, num_kept), price) / cost,
        batch_price=price / cost,
        expert_price=torch.zeros(scores.shape[1], dtype=torch.float64, device=scores.device),
        spend=num_kept.sum() * cost,
        value=value,
        upper_bound=value,
        gap=torch.zeros_like(value),
        meets_low=(num_least == fewest).squeeze(1),
    )


class _Extras(NamedTuple):
    """What the batch chooses beyond every token's least."""

    is_kept: Tensor
    """Shape ``(T, K)``."""
    worst_kept: Tensor
    """Lowest score chosen, ``inf`` without any, shape ``()``."""
    best_refused: Tensor
    """Highest score not chosen, 0 without any above 0, shape ``()``."""


def _chosen(extras: Tensor, is_extra: Tensor, limit: int, num_least: Tensor) -> _Extras:
    """Chooses the best ``limit - num_least`` of the extras, which are above 0; others are 0."""
    room = torch.minimum(is_extra.sum(), limit - num_least)
    best = extras.flatten().topk(min(limit + 1, extras.numel())).values
    # Entry ``room`` is the worst chosen, the next the best refused.
    ordered = torch.cat([best.new_full((1,), torch.inf), best, best.new_zeros(1)])
    worst, refused = ordered[torch.stack([room, room + 1])]
    above = extras > worst
    level = is_extra & (extras == worst)
    rank = level.flatten().cumsum(0).view_as(level)
    return _Extras(
        is_kept=above | (level & (rank <= room - above.sum())),
        worst_kept=worst.double(),
        best_refused=refused.double(),
    )


def _per_row(count: int | Tensor, like: Tensor) -> int | Tensor:
    return count if isinstance(count, int) else count.to(like.device).unsqueeze(1)


def _entry(ranked: Tensor, place: Tensor) -> Tensor:
    """Returns the entry at ``place`` of each row, ``inf`` before it and ``-inf`` behind it."""
    ends = ranked.new_tensor([torch.inf, -torch.inf]).expand(len(ranked), 2)
    padded = torch.cat([ends[:, :1], ranked, ends[:, 1:]], dim=1)
    return padded.gather(1, place + 1)


def _leading(scores: Tensor, worst: Tensor, num_level: Tensor) -> Tensor:
    """Marks all above the row's worst, and the first ``num_level`` that equal it."""
    level = scores == worst
    return (scores > worst) | (level & (level.cumsum(dim=1, dtype=torch.int32) <= num_level.int()))


def _price_between(extras: _Extras) -> Tensor:
    """Returns the middle of the worst extra kept and the best refused; 0 if none is refused.

    With no extra kept it is the best refused.
    """
    kept, refused = extras.worst_kept, extras.best_refused
    middle = torch.where(kept < torch.inf, (kept + refused) / 2, refused)
    return torch.where(refused > 0, middle, 0.0)


def _token_price(worst: Tensor, refused: Tensor, price: Tensor) -> Tensor:
    """Returns the least change of the price at which the token alone would choose its experts."""
    zero = torch.zeros(len(worst), dtype=torch.float64, device=worst.device)
    return zero.clamp(min=refused.squeeze(1) - price, max=worst.squeeze(1) - price)
