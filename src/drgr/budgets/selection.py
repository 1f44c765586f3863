"""Which assignments run: the optimal plan inside a budget, and its causal form at evaluation.

Equal costs make the feasible plans the independent sets of a laminar matroid (a cap for each token
inside a cap for the batch), so a greedy pass is optimal: every token's best ``minimum`` experts
first, then the best of all remaining candidates, wherever they are.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from drgr.budgets.marginal_price import price_between
from drgr.budgets.token_budget import TokenBudget
from drgr.collectives import gather_rows, sum_over_processes


@dataclass(frozen=True, slots=True, kw_only=True)
class Selection:
    """The experts chosen for each token.

    Attributes:
        expert_ids: Candidate experts of each token, best first, shape ``(T, maximum)``, int64.
        keep: Which candidates run, shape ``(T, maximum)``, bool; true entries come first in a row.
        spend: Assignments kept over all processes, int64 scalar.
        limit: Assignments allowed over all processes, int64 scalar.
        price: The value that an extra expert had to exceed, scalar in units of the scores; NaN
            where no extra was possible.
    """

    expert_ids: Tensor
    keep: Tensor
    spend: Tensor
    limit: Tensor
    price: Tensor


def rank_experts(values: Tensor, maximum: int) -> tuple[Tensor, Tensor]:
    """Returns each token's ``maximum`` best values and expert ids, best first, ``(T, maximum)``.

    Examples:
        >>> import torch
        >>> worth, expert_ids = rank_experts(torch.tensor([[0.1, 0.6, 0.3]]), 2)
        >>> worth, expert_ids
        (tensor([[0.6000, 0.3000]]), tensor([[1, 2]]))
    """
    if maximum > values.shape[1]:
        raise ValueError(
            f"budget.maximum must be at most the number of experts, got {maximum} for "
            f"{values.shape[1]} experts; lower the maximum"
        )
    best = values.topk(maximum, dim=1)
    return best.values, best.indices


def select_exactly(
    values: Tensor,
    budget: TokenBudget,
    *,
    valid: Tensor | None = None,
    group: ProcessGroup | None = None,
) -> Selection:
    r"""Selects the best plan inside a budget, spending all of it.

    Solves, with ``n`` the number of valid tokens over all processes,

    .. math:: \max_{m \in \{0,1\}^{T \times E}} \sum_{te} v_{te} m_{te}
              \quad\text{s.t.}\quad k_{min} \le \sum_e m_{te} \le k_{max},\;
              \sum_{te} m_{te} = \min(\lfloor k n \rfloor, k_{max} n) .

    The batch is that of one forward pass over all processes of ``group``: they agree on one price.
    A token with fewer than ``k_min`` permitted experts gets all of them, and what a token cannot
    use goes to others, as far as their own ``k_max`` and permitted experts allow: with ``p_t``
    permitted experts of token ``t`` the sum is ``min(floor(k n), sum_t min(k_max, p_t))``.

    Args:
        values: Worth of each assignment ``v``, shape ``(T, E)``; ``-inf`` forbids one.
        budget: Bounds ``k_min``, ``k_max`` and the average ``k``, in experts.
        valid: Which tokens are real, shape ``(T,)``, bool; padding gets no expert and no budget.
        group: Processes that share the batch.

    Returns:
        The selection. Equal values are kept in the order of rank, token, then position.

    Raises:
        ValueError: If ``budget.maximum`` exceeds the number of experts.

    Gradients:
        None: a selection is piecewise constant.

    Complexity:
        O(TE + S log S) time with ``S = T (k_max - k_min)`` summed over the processes, O(TE) memory,
        four small collectives, no host synchronisation in one process.

    Examples:
        >>> import torch
        >>> from drgr.budgets import TokenBudget
        >>> values = torch.tensor([[0.9, 0.6, 0.1], [0.5, 0.4, 0.3]])
        >>> chosen = select_exactly(values, TokenBudget(minimum=1, maximum=2, average=1.5))
        >>> chosen.expert_ids, chosen.keep, chosen.price
        (tensor([[0, 1],
                [0, 1]]), tensor([[ True,  True],
                [ True, False]]), tensor(0.5000))
    """
    values = values.detach()
    ranked, expert_ids = rank_experts(values, budget.maximum)
    allowed = torch.isfinite(ranked)
    if valid is not None:
        allowed &= valid.unsqueeze(1)
    num_valid = (
        allowed.new_tensor(values.shape[0], dtype=torch.int64) if valid is None else valid.sum()
    )
    counts = torch.stack([num_valid, allowed[:, : budget.minimum].sum()])
    num_valid, num_base = sum_over_processes(counts, group)
    limit = budget.total_on_device(num_valid)

    extras = ranked[:, budget.minimum :].masked_fill(~allowed[:, budget.minimum :], -torch.inf)
    candidates, start = gather_rows(extras.reshape(-1), group)
    num_extras = torch.minimum(limit - num_base, torch.isfinite(candidates).sum())
    order = torch.argsort(candidates, descending=True, stable=True)
    kept = torch.empty_like(candidates, dtype=torch.bool)
    kept[order] = torch.arange(candidates.shape[0], device=order.device) < num_extras

    keep = allowed.clone()
    keep[:, budget.minimum :] = kept[start : start + extras.numel()].view_as(extras)
    return Selection(
        expert_ids=expert_ids,
        keep=keep,
        spend=sum_over_processes(keep.sum(), group),
        limit=limit,
        price=price_between(candidates[order], num_extras),
    )


def select_at_price(
    values: Tensor, budget: TokenBudget, *, price: Tensor | None, valid: Tensor | None = None
) -> Selection:
    """Selects each token's experts from its own values alone, at a price fixed beforehand.

    A token keeps its best ``minimum`` experts and those of the next that are worth more than
    ``price``. No other token has a say, so decoding token by token gives the same plan as one pass.
    Where the average is one of the bounds every token has that many experts, whatever the price.
    A token with fewer permitted experts than that gets all of them.

    Args:
        values: Worth of each assignment, shape ``(T, E)``; ``-inf`` forbids one.
        budget: Bounds in experts. The average is met as well as the price predicts it, not exactly.
        price: Price of an extra expert in units of ``values``, scalar; ``None`` where none was
            learned yet, which gives every token ``floor(average)`` experts.
        valid: Which tokens are real, shape ``(T,)``, bool; padding gets no expert.

    Returns:
        The selection of this process; ``spend`` may exceed ``limit``, and both are reported.

    Raises:
        ValueError: If ``budget.maximum`` exceeds the number of experts.

    Complexity:
        O(TE) time and memory, no communication and no host synchronisation.

    Examples:
        >>> import torch
        >>> from drgr.budgets import TokenBudget
        >>> values = torch.tensor([[0.9, 0.6, 0.1], [0.5, 0.4, 0.3]])
        >>> budget = TokenBudget(minimum=1, maximum=2, average=1.5)
        >>> select_at_price(values, budget, price=torch.tensor(0.5)).keep
        tensor([[ True,  True],
                [ True, False]])
    """
    values = values.detach()
    ranked, expert_ids = rank_experts(values, budget.maximum)
    position = torch.arange(budget.maximum, device=values.device)
    if price is None or budget.rate in (budget.minimum, budget.maximum):
        keep = (position < budget.total(1)).expand_as(ranked)
    else:
        keep = (position < budget.minimum) | (ranked > price)
    keep = keep & torch.isfinite(ranked)
    num_valid = torch.full((), values.shape[0], dtype=torch.int64, device=values.device)
    if valid is not None:
        keep = keep & valid.unsqueeze(1)
        num_valid = valid.sum()
    return Selection(
        expert_ids=expert_ids,
        keep=keep,
        spend=keep.sum(),
        limit=budget.total_on_device(num_valid),
        price=values.new_tensor(torch.nan) if price is None else price,
    )
