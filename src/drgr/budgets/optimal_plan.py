"""Which experts run: the best plan in whole experts inside a compute budget."""

from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from drgr.budgets.budget import Budget
from drgr.budgets.budget_selection import BudgetSelection
from drgr.budgets.expert_counts import ExpertCounts, relative_slack
from drgr.budgets.knapsack import Solution, best_knapsack_plan
from drgr.budgets.relaxation import ROUNDING, Array, Problem, fractional_rows
from drgr.budgets.transportation import best_assignment, best_whole_assignment
from drgr.budgets.whole_bounds import tightened
from drgr.budgets.whole_plan import best_whole_plan
from drgr.errors import InfeasibleBudgetError
from drgr.numerics.inputs import FINITE_OR_MINUS_INF, checked_point


@torch.no_grad()
def select(scores: Tensor, budget: Budget) -> BudgetSelection:
    r"""Selects the plan of highest total score inside a budget.

    Solves, with costs ``c`` and the bounds of the budget,

    .. math:: \max_{m \in \{0,1\}^{T \times E}} \sum_{te} s_{te} m_{te} \quad\text{s.t.}\quad
              b_{low} \le \sum_e c_e m_{te} \le b_{high},\;
              \sum_{te} c_e m_{te} \le C,\; \sum_t c_e m_{te} \le C_e .

    A budget is not spent for its own sake: beyond ``low`` an assignment is kept only if it raises
    the total, so never at a score below 0. Scores that rank experts but say nothing about running
    none, such as logits, need ``low = high`` (with ``high`` the cost of ``k`` experts that is plain
    top-k), or must be turned into probabilities first.

    Args:
        scores: Worth of each assignment ``s``, shape ``(T, E)``, finite; ``-inf`` forbids one.
        budget: Costs and bounds. A cost counts as inside a bound up to a rounding of the dtype of
            the bounds: three experts of cost 0.1 fit 0.3 (``2**-40`` of the bound, ``2**-21`` with
            float32 tensors among them).

    Returns:
        The plan with its prices and certificate. It is inside every upper bound. With equal costs
        it is optimal, and equal scores are kept in the order of token, then expert (without
        ``per_expert``). With unequal costs ``gap`` bounds what it may fall short of the optimum,
        and ties are broken the same way each time; the bound is close where costs are of a few
        sizes or multiples of one unit, and less so for other costs with ``low`` close to ``high``.
        ``status`` says whether every token reaches its lower bound, which ``-inf`` or the bounds of
        experts may prevent, or, rarely and with unequal costs only, the search may fail to do.

    Raises:
        TypeError: If ``scores`` is not a floating-point tensor.
        ValueError: If a shape does not fit the budget or, on the CPU, a score is NaN or ``inf``.
        InfeasibleBudgetError: If no plan is inside the budget whatever the scores: no number of
            experts lies between ``low`` and ``high``, or the ``low`` of all tokens together exceed
            the bound of the batch or those of the experts.

    Gradients:
        None: a plan is piecewise constant.

    Numerics:
        Scores in half precision are compared in float32. Value, bound and prices are float64.

    Complexity:
        Equal costs without ``per_expert``: O(TE + S log S) time with ``S = T (k_max + 1)``, O(TE)
        memory, no host synchronisation, and no graph break under ``torch.compile``. Everything
        else runs on the host. Unequal costs: O(T E S) with ``S`` different sums of costs up to
        ``high`` where these are few, else O(T E log E), and a local search of O(T E k_max) a sweep.
        ``per_expert``: a shortest path of O(E^2) to O(E^3) and O(T E) updates for each assignment
        that the bounds displace.

    References:
        Edmonds, *Matroids and the greedy algorithm*, Mathematical Programming 1971 (equal costs).
        Dyer, *An O(n) algorithm for the multiple-choice knapsack linear program*, Mathematical
        Programming 1984 (unequal costs). Ahuja, Magnanti, Orlin, *Network Flows*, 1993, chapter 9
        (bounds of experts).

    Examples:
        >>> import torch
        >>> scores = torch.tensor([[0.9, 0.6, 0.1], [0.5, 0.4, 0.3]])
        >>> plan = select(scores, Budget(torch.ones(3), per_token=(1, 2), per_batch=3.0))
        >>> plan.mask.int()
        tensor([[1, 1, 0],
                [1, 0, 0]], dtype=torch.int32)
        >>> plan.gap.item()
        0.0
    """
    _check_shapes(scores, budget)
    work = checked_point("scores", scores, FINITE_OR_MINUS_INF)
    counts = budget.counts
    if counts is None:
        problem = _host_problem(work, budget)
        _check_sums(problem)
        problem = tightened(problem)
        is_free = budget.per_expert is None
        solution = best_knapsack_plan(problem) if is_free else best_assignment(problem)
        return _certified(problem, solution, work.device)
    _check_counts(counts, len(scores))
    plan = best_whole_plan(work, counts)
    if budget.per_expert is None:
        return plan
    whole = _in_experts(_host_problem(work, budget), counts)
    _check_sums(whole, unit=counts.cost)
    price = plan.batch_price.item() * counts.cost
    assignment = best_whole_assignment(whole, plan.mask.cpu().numpy(), price)
    return _certified(whole, assignment, work.device, unit=counts.cost)


def _check_shapes(scores: Tensor, budget: Budget) -> None:
    if scores.dim() != 2 or scores.shape[1] != budget.num_experts:
        raise ValueError(
            f"scores must have shape (T, {budget.num_experts}) for as many costs, "
            f"got {tuple(scores.shape)}; give one column for each expert"
        )
    for bound in budget.per_token:
        if isinstance(bound, Tensor) and bound.dim() == 1 and len(bound) != len(scores):
            raise ValueError(
                f"scores must have a row for each of the {len(bound)} bounds per_token, "
                f"got {len(scores)}; give as many bounds as tokens, or numbers"
            )


def _check_counts(counts: ExpertCounts, num_tokens: int) -> None:
    if counts.conflict is not None:
        fewest, most = counts.conflict
        raise InfeasibleBudgetError(
            "per_token must leave room for a whole number of experts, got bounds of at least "
            f"{fewest} and at most {most} experts of cost {counts.cost:g}; widen the bounds"
        )
    needed = counts.least_total(num_tokens)
    if counts.total is not None and counts.total < needed:
        raise InfeasibleBudgetError(
            f"per_batch must be at least {needed * counts.cost:g}, the cost of {needed} experts "
            f"that {num_tokens} tokens need for low, got room for {counts.total} experts; "
            "raise it or lower low"
        )


def _check_sums(problem: Problem, unit: float = 1.0) -> None:
    """Raises where the lower bounds together exceed what batch or experts can give."""
    needed = float(problem.low.sum())
    reach = float(np.minimum(problem.capacity, len(problem.scores) * problem.costs).sum())
    for name, bound in (("per_batch", problem.total), ("per_expert together", reach)):
        if needed > bound * (1 + problem.slack):
            raise InfeasibleBudgetError(
                f"{name} must give what all tokens need for low, {needed * unit:g}, "
                f"got {bound * unit:g}; raise it or lower low"
            )


def _host_problem(scores: Tensor, budget: Budget) -> Problem:
    def host(bound: float | Tensor, *shape: int) -> Array:
        array = torch.as_tensor(bound, dtype=torch.float64).detach().cpu().expand(shape)
        return np.array(array.numpy(), dtype=np.float64)

    num_tokens, num_experts = scores.shape
    costs = host(budget.costs, num_experts)
    capacity = torch.inf if budget.per_expert is None else budget.per_expert
    amounts = [*budget.per_token, budget.per_batch, capacity]
    return Problem(
        scores=host(scores, num_tokens, num_experts),
        costs=costs,
        low=host(budget.per_token[0], num_tokens),
        high=np.minimum(host(budget.per_token[1], num_tokens), costs.sum()),
        total=float(host(budget.per_batch)),
        capacity=host(capacity, num_experts),
        slack=relative_slack(budget.costs, *amounts),
    )


def _in_experts(problem: Problem, counts: ExpertCounts) -> Problem:
    """Returns the problem in the unit of one expert, with whole bounds."""
    tokens = np.ones(len(problem.low))
    fewest, most = (
        tokens * (bound if isinstance(bound, int) else bound.cpu().numpy())
        for bound in (counts.fewest, counts.most)
    )
    return Problem(
        scores=problem.scores,
        costs=np.ones_like(problem.costs),
        low=fewest,
        high=most,
        total=np.inf if counts.total is None else float(counts.total),
        capacity=np.floor(problem.capacity / counts.cost * (1 + problem.slack)),
        slack=0.0,
    )


def _certified(
    problem: Problem, solution: Solution, device: torch.device, unit: float = 1.0
) -> BudgetSelection:
    """Compares a plan with its bound; both in units of cost of ``unit``."""
    mask = solution.mask
    batch_price, expert_price = solution.batch_price, solution.expert_price
    rows = fractional_rows(replace(problem, low=solution.low), expert_price)
    kept = problem.scores[mask]
    load = mask.sum(axis=0) * problem.costs
    paid = batch_price * load.sum() + (expert_price * load).sum()
    gap = max(0.0, solution.upper_bound - kept.sum())
    gap = gap if gap > ROUNDING * (np.abs(kept).sum() + paid) else 0.0

    def on_device(entries: float | Array) -> Tensor:
        return torch.as_tensor(entries, dtype=torch.float64, device=device)

    return BudgetSelection(
        mask=torch.as_tensor(mask, device=device),
        token_price=on_device(rows.own_price(batch_price) / unit),
        batch_price=on_device(batch_price / unit),
        expert_price=on_device(expert_price / unit),
        spend=on_device(load.sum() * unit),
        value=on_device(kept.sum()),
        upper_bound=on_device(kept.sum() + gap),
        gap=on_device(gap),
        meets_low=torch.as_tensor(mask @ problem.costs >= problem.least, device=device),
    )
