"""The record of a plan inside a budget, with the prices and the certificate that belong to it."""

from dataclasses import dataclass
from typing import final

from torch import Tensor

from drgr.numerics import Status


@final
@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class BudgetSelection:
    """Result of :func:`select`: which assignments run, and how good that is.

    All tensors are detached, on the device of the scores, and in float64 unless stated. Prices are
    in units of score per unit of cost. With equal costs they explain the plan: ``s_te - c
    (batch_price + token_price_t + expert_price_e)`` is at least 0 where an assignment is kept and
    at most 0 where it is refused, and a bound that is not reached has price 0 (bounds in whole
    experts). With unequal costs they do so for the best fractional plan.
    """

    mask: Tensor
    """Which experts run for each token, shape ``(T, E)``, bool."""
    token_price: Tensor
    """Price of its own bounds, shape ``(T,)``: above 0 only at ``high``, below at ``low``."""
    batch_price: Tensor
    """Price of the batch bound, at least 0, shape ``()``; 0 where the bound costs nothing."""
    expert_price: Tensor
    """Price of each expert's bound, at least 0, shape ``(E,)``."""
    spend: Tensor
    """Cost of the plan, shape ``()``."""
    value: Tensor
    """Sum of the scores of the plan, shape ``()``."""
    upper_bound: Tensor
    """A proven bound on the value of every plan in the budget, at least ``value``, shape ``()``."""
    gap: Tensor
    """``upper_bound - value``, shape ``()``; exactly 0 where the plan is proven optimal."""
    meets_low: Tensor
    """Whether the token reaches its lower bound, shape ``(T,)``, bool."""

    @property
    def status(self) -> Status:
        """INFEASIBLE where a token misses its lower bound, CONVERGED otherwise.

        Every upper bound holds in any case; which tokens are short stands in ``meets_low``, and the
        certificate is that of the budget with their lower bounds at what they got. A gap above 0 is
        a matter of whole experts, not of convergence. Reading it waits for the device.
        """
        return Status.CONVERGED if bool(self.meets_low.all()) else Status.INFEASIBLE
