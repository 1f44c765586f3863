"""Exact Euclidean projection of routing gates onto a compute budget."""

from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from drgr._checks import check_shape
from drgr.budgets.budget import Budget
from drgr.budgets.geometry import Entropic, Euclidean, Geometry
from drgr.budgets.implicit import Prices, plan_at, with_derivatives
from drgr.budgets.prices import OUTCOMES, budget_prices, opaque_budget_prices
from drgr.budgets.token_prices import Bounds
from drgr.errors import InfeasibleBudgetError
from drgr.numerics import Status

_ROUNDING = 1e-12


@final
@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class BudgetProjection:
    """A plan inside a budget, and the prices that put it there.

    A price is what the distance of the best plan falls by when its bound is raised by one unit of
    cost. Prices of bounds that do not bind are 0. Where a bound binds in a corner, without an
    entry strictly between 0 and 1 that it could move, its price is one of many.

    Attributes:
        gates: The plan ``pi``, shape ``(T, E)``.
        token_price: Price ``tau`` of each token's own bounds, shape ``(T,)``: above 0 where
            ``high`` binds, below 0 where ``low`` binds.
        batch_price: Price ``nu`` of the bound of the batch, at least 0, shape ``()``.
        expert_price: Price ``beta`` of the bound of each expert, at least 0, shape ``(E,)``.
        spend: What the plan costs, shape ``()``.
        outcome: Index of the status, int64, shape ``()``; read ``status`` instead.
    """

    gates: Tensor
    token_price: Tensor
    batch_price: Tensor
    expert_price: Tensor
    spend: Tensor
    outcome: Tensor

    @property
    def status(self) -> Status:
        """How the search ended. Reading it waits for the device; the projection itself does not."""
        return OUTCOMES[int(self.outcome)]


def project(gates: Tensor, budget: Budget) -> BudgetProjection:
    r"""Projects gates onto the plans inside a budget.

    Solves, for costs ``c``, with the bounds of ``budget``,

    .. math:: \min_\pi \tfrac12 \|\pi - v\|^2 \quad\text{s.t.}\quad 0 \le \pi \le 1,\;
              b_{low} \le \sum_e c_e \pi_{te} \le b_{high},\;
              \sum_{te} c_e \pi_{te} \le C,\; \sum_t c_e \pi_{te} \le C_e .

    The solution is ``pi_te = clip(v_te - c_e (nu + tau_t + beta_e), 0, 1)`` with one price for the
    batch, for each token and for each expert, all per unit of cost.

    Args:
        gates: Gates ``v``, shape ``(T, E)``, floating point; ``-inf`` forbids an entry.
        budget: Costs and bounds, on the device of the gates.

    Returns:
        The plan and its prices, float32 or float64 as the gates; float32 for half types, because
        a plan rounded further would leave the budget.

    Raises:
        TypeError: If the gates are not floating point.
        ValueError: If the gates or a bound have the wrong shape or device, or, on the CPU, a gate
            is NaN or infinite.
        InfeasibleBudgetError: On the CPU, if the lower bounds of the tokens exceed the bound of
            the batch, the bounds of the experts, or what the entries of a token that are not
            forbidden cost.

    Gradients:
        In gates, costs and all bounds that are tensors, for plan, prices and spend, exact to
        every order: the derivative on the set of bounds that bind and of entries strictly between
        0 and 1. Where these sets change, it is that of one side.

    Numerics:
        Computed in float64. Bounds are met to about 1e-13 relative to the costs and to
        ``c |price|``, then rounded to the dtype of the result. ``status`` tells whether all bounds
        and the optimality of the prices hold to rounding; bounds that only ``status`` can find to
        contradict one another give INFEASIBLE.

    Complexity:
        O(TE) memory. Each step is O(TE): on the CPU about 10 Newton steps, of which some on a
        sample; on an accelerator 64 bisection steps for the batch and 64 for the tokens, without
        waiting. Bounds of experts add a Newton method on the dual, O(T E^2) and one such
        projection for each of about 10 steps; it waits for the device.

    References:
        Kiwiel, *Breakpoint searching algorithms for the continuous quadratic knapsack problem*,
        Mathematical Programming 112, 2008, for one such bound.

    Examples:
        >>> import torch
        >>> from drgr.budgets.budget import Budget
        >>> budget = Budget(torch.tensor([1.0, 2.0]), per_token=(0.0, 2.0), per_batch=3.0)
        >>> plan = project(torch.tensor([[1.0, 1.0], [0.5, 0.25]]), budget)
        >>> plan.gates
        tensor([[0.8000, 0.6000],
                [0.5000, 0.2500]])
        >>> plan.token_price, plan.spend, plan.status.name
        (tensor([0.2000, 0.0000]), tensor(3.), 'CONVERGED')
    """
    return nearest_plan(Euclidean(), gates, budget)


def nearest_plan(geometry: Geometry, gates: Tensor, budget: Budget) -> BudgetProjection:
    """Projects in a geometry; :func:`project` documents arguments and errors."""
    forbidden = -torch.inf if geometry == Euclidean() else 0.0
    _check_gates(gates, budget, forbidden)
    values, costs, bounds = gates.double(), budget.costs.double(), _bounds_of(budget, gates)
    if gates.is_cpu and not torch.compiler.is_compiling():
        _check_feasible(gates, forbidden, costs, bounds)
    prices, outcome = _prices(geometry, values, costs, bounds)
    sources = (values, costs, bounds.low, bounds.high, bounds.total, bounds.per_expert)
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in sources):
        prices = with_derivatives(geometry, values, costs, bounds, prices)
    plan = plan_at(geometry, values, costs, prices)
    dtype = torch.float64 if gates.dtype == torch.float64 else torch.float32
    expert_price = torch.zeros_like(costs) if prices.expert is None else prices.expert
    return BudgetProjection(
        gates=plan.to(dtype),
        token_price=(prices.token - prices.batch).to(dtype),
        batch_price=prices.batch.to(dtype),
        expert_price=expert_price.to(dtype),
        spend=(plan @ costs).sum().to(dtype),
        outcome=outcome,
    )


def _prices(
    geometry: Geometry, gates: Tensor, costs: Tensor, bounds: Bounds
) -> tuple[Prices, Tensor]:
    """Returns the prices, constant, and the index of the outcome."""
    per_expert = bounds.per_expert
    solve = opaque_budget_prices if torch.compiler.is_compiling() else budget_prices
    nu, mu, beta, side, outcome = solve(
        gates.detach(),
        costs.detach(),
        torch.stack([bounds.low, bounds.high]).detach(),
        bounds.total.detach(),
        None if per_expert is None else per_expert.detach(),
        entropic=isinstance(geometry, Entropic),
        early_exit=gates.is_cpu,
    )
    expert = None if per_expert is None else beta
    return Prices(batch=nu, token=mu, expert=expert, side=side), outcome


def _check_gates(gates: Tensor, budget: Budget, forbidden: float) -> None:
    """Checks the gates; ``forbidden`` is the least value, which closes an entry for good."""
    if not gates.is_floating_point():
        raise TypeError(f"gates must be a floating-point tensor, got {gates.dtype}; convert it")
    check_shape("gates", gates, (None, budget.num_experts))
    if not gates.is_cpu or torch.compiler.is_compiling() or len(gates) == 0:
        return
    least, most = gates.detach().aminmax()
    if not (forbidden <= least.item() and most.item() < torch.inf):
        wrong = ~((gates >= forbidden) & (gates < torch.inf))
        index = tuple(wrong.nonzero()[0].tolist())
        wanted = "finite or -inf" if forbidden < 0 else "finite and at least 0"
        raise ValueError(
            f"gates must be {wanted}, got {gates[index].item()} at index {index}; "
            "repair that entry before projecting"
        )


def _bounds_of(budget: Budget, gates: Tensor) -> Bounds:
    _check_device("costs", budget.costs, gates)
    low, high = budget.per_token
    rows = (gates.shape[0],)
    per_expert = budget.per_expert
    if per_expert is not None:
        _check_device("per_expert", per_expert, gates)
        per_expert = per_expert.double()
    return Bounds(
        low=_bound("per_token low", low, gates, rows),
        high=_bound("per_token high", high, gates, rows),
        total=_bound("per_batch", budget.per_batch, gates, ()),
        per_expert=per_expert,
    )


def _bound(name: str, bound: float | Tensor, gates: Tensor, shape: tuple[int, ...]) -> Tensor:
    if not isinstance(bound, Tensor):
        return torch.full(shape, bound, dtype=torch.float64, device=gates.device)
    _check_device(name, bound, gates)
    if bound.dim() == 1:
        check_shape(f"budget.{name}", bound, shape)
    return bound.double().expand(shape)


def _check_device(name: str, bound: Tensor, gates: Tensor) -> None:
    if bound.device != gates.device:
        raise ValueError(
            f"budget.{name} must be on the device of gates {gates.device}, got {bound.device}; "
            "move the tensors of the budget"
        )


def _check_feasible(gates: Tensor, forbidden: float, costs: Tensor, bounds: Bounds) -> None:
    """Raises where adding up shows that the lower bounds of the tokens cannot be met."""
    needed = bounds.low.sum().item()
    if needed == 0:
        return
    open_gates = (gates.detach() > forbidden).double()
    reachable = open_gates @ costs
    unmet = bounds.low > reachable * (1 + _ROUNDING)
    if bool(unmet.any()):
        token = int(unmet.nonzero()[0])
        raise InfeasibleBudgetError(
            f"per_token low must be at most what the open gates of a token cost, got low "
            f"{bounds.low[token].item():g} for token {token} whose open gates cost "
            f"{reachable[token].item():g}; lower it or open more gates"
        )
    if needed > bounds.total.item() * (1 + _ROUNDING):
        raise InfeasibleBudgetError(
            f"per_batch must be at least the sum of per_token low, got per_batch "
            f"{bounds.total.item():g} and low adding up to {needed:g}; raise the one or lower the "
            "other"
        )
    if bounds.per_expert is None:
        return
    offered = torch.minimum(bounds.per_expert, costs * open_gates.sum(dim=0)).sum().item()
    if needed > offered * (1 + _ROUNDING):
        raise InfeasibleBudgetError(
            f"per_expert must offer at least the sum of per_token low, got {offered:g} in all and "
            f"low adding up to {needed:g}; raise the one or lower the other"
        )
