"""How many experts a batch may use: bounds for each token and an exact average over the batch."""

import math
from dataclasses import dataclass
from fractions import Fraction

from torch import Tensor

from drgr._checks import check_positive
from drgr.errors import InfeasibleBudgetError

# Averages are given as decimals; a fraction with this denominator recovers what was meant (2.3 is
# 23/10), so that the floor below is never one assignment short through binary rounding.
_LARGEST_DENOMINATOR = 10**6


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenBudget:
    """The set of routing plans that one MoE layer may use, with every expert costing the same.

    A plan is inside the budget when each of its ``T`` tokens has between ``minimum`` and
    ``maximum`` experts and all tokens together have at most ``floor(average * T)`` assignments.

    Args:
        minimum: Fewest experts of a token, at least 0.
        maximum: Most experts of a token.
        average: Most assignments per token over the whole batch (all processes), within
            ``[minimum, maximum]``.

    Raises:
        ValueError: If ``minimum`` is negative or ``average`` is not a positive finite number.
        InfeasibleBudgetError: If the three do not satisfy ``minimum <= average <= maximum``.

    Examples:
        >>> TokenBudget(minimum=1, maximum=4, average=2.3).total(7)
        16
    """

    minimum: int
    maximum: int
    average: float

    def __post_init__(self) -> None:
        if self.minimum < 0:
            raise ValueError(f"budget.minimum must be at least 0, got {self.minimum}")
        check_positive("budget.average", self.average)
        if self.minimum > self.maximum:
            raise InfeasibleBudgetError(
                f"budget.minimum must be at most budget.maximum, got minimum {self.minimum} and "
                f"maximum {self.maximum}; lower the minimum or raise the maximum"
            )
        if self.average < self.minimum:
            raise InfeasibleBudgetError(
                f"budget.average must be at least budget.minimum, got average {self.average} and "
                f"minimum {self.minimum}; every token has {self.minimum} experts already"
            )
        if self.average > self.maximum:
            raise InfeasibleBudgetError(
                f"budget.average must be at most budget.maximum, got average {self.average} and "
                f"maximum {self.maximum}; a token cannot use the rest"
            )

    @property
    def rate(self) -> Fraction:
        """The average as an exact fraction of assignments per token, never above the average."""
        meant = Fraction(self.average).limit_denominator(_LARGEST_DENOMINATOR)
        if float(meant) == self.average:
            return meant
        scaled = math.floor(Fraction(self.average) * _LARGEST_DENOMINATOR)
        return Fraction(scaled, _LARGEST_DENOMINATOR)

    def total(self, num_tokens: int) -> int:
        """Returns the most assignments that ``num_tokens`` tokens may have together."""
        return math.floor(self.rate * num_tokens)

    def total_on_device(self, num_tokens: Tensor) -> Tensor:
        """Returns :meth:`total` for an int64 count on any device, without a host sync."""
        return num_tokens * self.rate.numerator // self.rate.denominator


def budget_from_flops(
    *, minimum: float, maximum: float, average: float, flops_per_assignment: float
) -> TokenBudget:
    """Turns bounds in FLOPs per token and layer into the equivalent bounds in experts.

    Args:
        minimum: Fewest expert FLOPs a token must receive (forward, one layer); rounded up.
        maximum: Most expert FLOPs a token may receive; rounded down to experts.
        average: Most expert FLOPs per token over the batch.
        flops_per_assignment: Forward FLOPs of one expert on one token, above 0.

    Returns:
        The budget in experts. It never allows more FLOPs than asked for.

    Raises:
        ValueError: If ``flops_per_assignment`` is not positive.
        InfeasibleBudgetError: If no plan satisfies the bounds.

    Examples:
        >>> budget_from_flops(minimum=5.0, maximum=45.0, average=20.0, flops_per_assignment=10.0)
        TokenBudget(minimum=1, maximum=4, average=2.0)
    """
    check_positive("flops_per_assignment", flops_per_assignment)
    return TokenBudget(
        minimum=math.ceil(minimum / flops_per_assignment),
        maximum=math.floor(maximum / flops_per_assignment),
        average=average / flops_per_assignment,
    )
