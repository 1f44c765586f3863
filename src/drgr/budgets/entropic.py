"""Exact Kullback-Leibler projection of routing gates onto a compute budget."""

from torch import Tensor

from drgr.budgets.budget import Budget
from drgr.budgets.geometry import Entropic
from drgr.budgets.projection import BudgetProjection, nearest_plan


def project_entropic(gates: Tensor, budget: Budget) -> BudgetProjection:
    r"""Projects positive gates onto the plans inside a budget, in the Kullback-Leibler divergence.

    Solves, for costs ``c``, with the bounds of ``budget``,

    .. math:: \min_\pi \sum_{te} \pi_{te} \log \frac{\pi_{te}}{v_{te}} - \pi_{te} + v_{te}
              \quad\text{s.t.}\quad 0 \le \pi \le 1,\;
              b_{low} \le \sum_e c_e \pi_{te} \le b_{high},\;
              \sum_{te} c_e \pi_{te} \le C,\; \sum_t c_e \pi_{te} \le C_e .

    The solution is ``pi_te = min(1, v_te exp(-c_e (nu + tau_t + beta_e)))`` with one price for the
    batch, for each token and for each expert, all per unit of cost. It scales gates where the
    Euclidean projection shifts them: equal costs keep their ratios, and no open gate closes. An
    upper bound of 0 has no finite price; it gets one at which its gates are below 1e-299.

    Args:
        gates: Gates ``v``, shape ``(T, E)``, floating point, at least 0; 0 forbids an entry.
        budget: Costs and bounds, on the device of the gates.

    Returns:
        The plan and its prices, float32 or float64 as the gates; float32 for half types.

    Raises:
        TypeError: If the gates are not floating point.
        ValueError: If the gates or a bound have the wrong shape or device, or, on the CPU, a gate
            is negative or not finite.
        InfeasibleBudgetError: As in :func:`project`, on the CPU.

    Gradients:
        In gates, costs and all bounds that are tensors, for plan, prices and spend, exact to
        second order.

    Numerics:
        As :func:`project`; prices are searched on logarithms of costs.

    Complexity:
        As :func:`project`, with one exponential per entry and step.

    References:
        Csiszar, *I-divergence geometry of probability distributions and minimization problems*,
        Annals of Probability 3, 1975, for the form of the solution.

    Examples:
        >>> import torch
        >>> from drgr.budgets.budget import Budget
        >>> budget = Budget(torch.ones(2), per_token=(0.0, 1.0))
        >>> project_entropic(torch.tensor([[0.9, 0.6], [0.5, 0.25]]), budget).gates
        tensor([[0.6000, 0.4000],
                [0.5000, 0.2500]])
    """
    return nearest_plan(Entropic(), gates, budget)
