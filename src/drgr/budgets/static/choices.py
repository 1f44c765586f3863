r"""Choices in logits, and what they cost on average: the surface that a static search moves on.

``N`` items each take one of ``K`` options. With ``p_i = softmax(a_i)`` and costs ``c_jik``,

    C_j(a) = sum_i <p_i, c_ji>          n_jik = dC_j / da_ik = p_ik (c_jik - <p_i, c_ji>)

and the surface is where ``C_j(a) = B_j`` for every budget ``j``. Options with a logit of ``-inf``
are forbidden. An expert that is kept or dropped is an item of two options, of cost 0 and ``c``.
"""

from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from drgr.numerics.inputs import FINITE, check_values


@final
@dataclass(frozen=True, slots=True, eq=False)
class ChoiceBudgets:
    r"""Linear budgets on the expected cost of ``N`` choices, each among ``K`` options.

    .. math:: \sum_{ik} p_{ik} c_{jik} = B_j \ \text{for all } j, \qquad p_i = softmax(a_i) .

    A budget of one layer has costs of 0 for the items of all others.

    Args:
        costs: Cost ``c`` of each option in any unit, floating point, shape ``(N, K)`` for one
            budget or ``(m, N, K)``; kept in float64 as the latter.
        limits: What is spent, ``B``, in the same unit: a number or a tensor of shape ``()`` for one
            budget, else of shape ``(m,)``; kept in float64 as the latter.

    Raises:
        TypeError: If ``costs`` is not a floating-point tensor.
        ValueError: If a shape does not fit or a value is not finite.

    Examples:
        >>> import torch
        >>> budgets = ChoiceBudgets(torch.tensor([[0.0, 1.0], [0.0, 3.0]]), 2.0)
        >>> budgets.costs.shape, budgets.limits
        (torch.Size([1, 2, 2]), tensor([2.], dtype=torch.float64))
    """

    costs: Tensor
    limits: Tensor | float

    def __post_init__(self) -> None:
        if not (isinstance(self.costs, Tensor) and self.costs.is_floating_point()):
            kind = self.costs.dtype if isinstance(self.costs, Tensor) else type(self.costs).__name__
            raise TypeError(f"costs must be a floating-point tensor, got {kind}; convert it")
        if self.costs.dim() not in (2, 3) or 0 in self.costs.shape[-2:]:
            raise ValueError(
                "costs must have shape (N, K) or (m, N, K) with N, K >= 1, "
                f"got {tuple(self.costs.shape)}; give a cost to each option of each item"
            )
        check_values("costs", self.costs, FINITE)
        costs = self.costs.detach().double()
        costs = costs.unsqueeze(0) if costs.dim() == 2 else costs
        limits = torch.as_tensor(self.limits, dtype=torch.float64, device=costs.device).detach()
        if limits.dim() > 1 or limits.numel() != len(costs):
            raise ValueError(
                f"limits must hold one number for each of {len(costs)} budgets, "
                f"got shape {tuple(limits.shape)}"
            )
        check_values("limits", limits, FINITE)
        object.__setattr__(self, "costs", costs)
        object.__setattr__(self, "limits", limits.reshape(len(costs)))

    @property
    def limit_vector(self) -> Tensor:
        """The limits as a float64 tensor of shape ``(m,)``."""
        return torch.as_tensor(self.limits)

    def range_of_items(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Returns least and most cost of each item's allowed options, each of shape ``(m, N)``."""
        allowed = logits > -torch.inf
        low = torch.where(allowed, self.costs, torch.inf).amin(dim=-1)
        high = torch.where(allowed, self.costs, -torch.inf).amax(dim=-1)
        return low, high


def checked_logits(logits: Tensor, budgets: ChoiceBudgets) -> Tensor:
    """Returns logits in float64 after checking shape and values.

    Raises:
        ValueError: If the shape is not ``(N, K)``, an entry is NaN or ``inf``, or every option of
            an item is forbidden.
    """
    if logits.shape != budgets.costs.shape[1:]:
        raise ValueError(
            f"logits must have the shape (N, K) of costs, {tuple(budgets.costs.shape[1:])}, "
            f"got {tuple(logits.shape)}"
        )
    logits = logits.double()
    if not bool((logits < torch.inf).all()):
        index = tuple((~(logits < torch.inf)).nonzero()[0].tolist())
        raise ValueError(
            f"logits must be finite or -inf, got {logits[index].item()} at index {index}; "
            "lower the learning rate or repair that entry"
        )
    stuck = (logits == -torch.inf).all(dim=-1)
    if bool(stuck.any()):
        raise ValueError(
            f"logits must leave an option to every item, got -inf in all of item "
            f"{int(stuck.nonzero()[0])}; allow one"
        )
    return logits


def expected_costs(logits: Tensor, budgets: ChoiceBudgets) -> Tensor:
    r"""Returns what each budget is expected to spend, :math:`C_j = \sum_{ik} p_{ik} c_{jik}`.

    Args:
        logits: Logits ``a``, finite or ``-inf``, shape ``(N, K)``; gradients reach them.
        budgets: Costs of ``m`` budgets.

    Returns:
        Shape ``(m,)``, float64, in the unit of the costs.

    Raises:
        ValueError: If the logits do not fit the budgets.

    Complexity:
        ``O(m N K)``.

    Examples:
        >>> import torch
        >>> budgets = ChoiceBudgets(torch.tensor([[0.0, 1.0], [0.0, 3.0]]), 2.0)
        >>> expected_costs(torch.zeros(2, 2), budgets)
        tensor([2.], dtype=torch.float64)
    """
    probabilities = torch.softmax(checked_logits(logits, budgets), dim=-1)
    low, _ = budgets.range_of_items(logits)
    above = budgets.costs - low.unsqueeze(-1)
    return low.sum(dim=-1) + (probabilities * above).sum(dim=(-2, -1))


def budget_normals(logits: Tensor, budgets: ChoiceBudgets) -> Tensor:
    r"""Returns the gradients of the expected costs, which are normal to the surface.

    .. math:: n_{jik} = p_{ik} (c_{jik} - \langle p_i, c_{ji} \rangle) .

    Costs are taken relative to the likeliest option, so that the digits survive where a choice is
    all but made. Each item's entries add up to 0.

    Args:
        logits: Logits ``a``, finite or ``-inf``, shape ``(N, K)``.
        budgets: Costs of ``m`` budgets.

    Returns:
        Shape ``(m, N, K)``, float64, in the unit of the costs.

    Raises:
        ValueError: If the logits do not fit the budgets.

    Complexity:
        ``O(m N K)``.

    Examples:
        >>> import torch
        >>> budgets = ChoiceBudgets(torch.tensor([[0.0, 1.0], [0.0, 3.0]]), 2.0)
        >>> budget_normals(torch.zeros(2, 2), budgets)
        tensor([[[-0.2500,  0.2500],
                 [-0.7500,  0.7500]]], dtype=torch.float64)
    """
    logits = checked_logits(logits, budgets)
    probabilities = torch.softmax(logits, dim=-1)
    likeliest = logits.argmax(dim=-1).expand(budgets.costs.shape[:2]).unsqueeze(-1)
    relative = budgets.costs - budgets.costs.gather(-1, likeliest)
    mean = (probabilities * relative).sum(dim=-1, keepdim=True)
    return probabilities * (relative - mean)
