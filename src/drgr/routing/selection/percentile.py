r"""A percentile over all scores of a batch, in place of one over a token's own.

DynaMoE runs the experts above the ``tau``-th percentile of their token's scores, or the best where
there is none. A percentile of a token's own ``E`` scores fixes the count, ``E (1 - tau / 100)`` for
every token, whatever their shape. Over all scores of a batch it is an average, and tokens differ:

.. math:: \min = 1, \quad \max = E, \quad k = E (1 - \tau / 100) .
"""

from fractions import Fraction

import torch

from drgr._checks import check_positive
from drgr.budgets import TokenBudget
from drgr.routing.selection.budgeted import BudgetedSelector


def batch_percentile(
    percentile: float,
    *,
    num_experts: int,
    smoothing: float = 0.9,
    device: torch.device | None = None,
) -> BudgetedSelector:
    """Returns the selection of what lies above a percentile of all worths of a batch.

    Published: the percentile and the fallback to the best expert, of DynaMoE (arXiv 2603.01697).
    Derived here: that it is taken over the batch, which is the exact budgeted selection.

    Args:
        percentile: ``tau``, from 0 (all experts run) to the last that leaves one expert a token,
            ``100 (1 - 1 / E)``.
        num_experts: Number of experts ``E``.
        smoothing: Share of the price's average that a step keeps, in [0, 1).
        device: Where the price lives.

    Raises:
        ValueError: If a number is out of range.

    Examples:
        >>> batch_percentile(75, num_experts=8).budget
        TokenBudget(minimum=1, maximum=8, average=2.0)
    """
    check_positive("num_experts", num_experts)
    # In decimals, as given: 90 % of 8 experts leaves 0.8 of one, not 0.7999999999999998.
    average = num_experts * (1 - Fraction(str(percentile)) / 100)
    if not 1 <= average <= num_experts:
        raise ValueError(
            f"percentile must lie in [0, {100 * (1 - 1 / num_experts):g}], so that tokens have one "
            f"to {num_experts} experts on average, got {percentile}"
        )
    budget = TokenBudget(minimum=1, maximum=num_experts, average=float(average))
    return BudgetedSelector(budget, smoothing=smoothing, device=device)
