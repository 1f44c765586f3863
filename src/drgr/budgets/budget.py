"""The set of plans with given costs: bounds for each token, for the batch and for each expert."""

import math
from dataclasses import dataclass, field
from typing import final

import torch
from torch import Tensor

from drgr.budgets.expert_counts import ExpertCounts, expert_counts
from drgr.errors import InfeasibleBudgetError


@final
@dataclass(frozen=True, slots=True, eq=False)
class Budget:
    r"""Bounds on what the plan of a batch may cost, in any unit of cost (FLOPs, bytes, experts).

    A plan ``pi`` of shape ``(T, E)`` with entries in ``[0, 1]`` is inside the budget when

    .. math:: b_{low} \le \sum_e c_e \pi_{te} \le b_{high} \ \text{for all } t, \qquad
              \sum_{te} c_e \pi_{te} \le C, \qquad
              \sum_t c_e \pi_{te} \le C_e \ \text{for all } e .

    All bounds are in the unit of the costs. Numbers and tensors are both taken; derivatives flow to
    tensors that require them.

    Args:
        costs: Cost ``c`` of each expert on one token, above 0, floating point, shape ``(E,)``.
        per_token: ``(low, high)``, least and most cost of one token, each a number or a tensor of
            shape ``()`` or ``(T,)``; ``0 <= low <= high``; ``high`` may be infinite.
        per_batch: Most cost ``C`` of all tokens together, a number or a tensor of shape ``()``, at
            least 0; infinite by default.
        per_expert: Most cost ``C_e`` of each expert over the batch, at least 0, shape ``(E,)``;
            None for no bound. A capacity of ``n`` tokens is ``n * costs``.

    Raises:
        TypeError: If ``costs`` or ``per_expert`` is not a floating-point tensor.
        ValueError: If a shape or a value is out of range; the name, value and remedy are given.
        InfeasibleBudgetError: If ``low`` exceeds ``high`` or the cost of all experts together.

    Examples:
        >>> import torch
        >>> Budget(torch.tensor([1.0, 2.0, 4.0]), per_token=(1, 4), per_batch=20.0).num_experts
        3
    """

    costs: Tensor
    per_token: tuple[float | Tensor, float | Tensor] = (0.0, math.inf)
    per_batch: float | Tensor = math.inf
    per_expert: Tensor | None = None
    counts: ExpertCounts | None = field(init=False, repr=False, default=None)
    """The bounds in whole experts where all cost the same, else None; not an argument."""

    def __post_init__(self) -> None:
        _check_vector("costs", self.costs, lowest=0.0, strict=True, finite=True)
        low, high = self.per_token
        _check_bound("per_token low", low, max_dim=1, finite=True)
        _check_bound("per_token high", high, max_dim=1, finite=False)
        _check_bound("per_batch", self.per_batch, max_dim=0, finite=False)
        if self.per_expert is not None:
            _check_vector("per_expert", self.per_expert, lowest=0.0, strict=False, finite=False)
            if self.per_expert.shape != self.costs.shape:
                raise ValueError(
                    f"per_expert must have the shape of costs {tuple(self.costs.shape)}, "
                    f"got {tuple(self.per_expert.shape)}; give one bound for each expert"
                )
        _check_order(self.costs, low, high)
        counts = expert_counts(self.costs, self.per_token, self.per_batch)
        object.__setattr__(self, "counts", counts)

    @property
    def num_experts(self) -> int:
        """Number of experts ``E``."""
        return self.costs.shape[0]


def _check_vector(name: str, values: Tensor, *, lowest: float, strict: bool, finite: bool) -> None:
    if not (isinstance(values, Tensor) and values.is_floating_point()):
        kind = values.dtype if isinstance(values, Tensor) else type(values).__name__
        raise TypeError(f"{name} must be a floating-point tensor, got {kind}; convert it")
    if values.dim() != 1 or values.shape[0] == 0:
        raise ValueError(f"{name} must have shape (E,) with E >= 1, got {tuple(values.shape)}")
    right = (values > lowest) if strict else (values >= lowest)
    right = right & values.isfinite() if finite else right
    if not bool(right.all()):
        index = int((~right).nonzero()[0])
        wanted = f"{'above' if strict else 'at least'} {lowest:g}{' and finite' if finite else ''}"
        raise ValueError(
            f"{name} must be {wanted}, got {values[index].item()} for expert {index}; "
            "costs and bounds are amounts of compute"
        )


def _check_bound(name: str, bound: float | Tensor, *, max_dim: int, finite: bool) -> None:
    values = torch.as_tensor(bound, dtype=torch.float64)
    if values.dim() > max_dim:
        shapes = "() or (T,)" if max_dim else "()"
        raise ValueError(f"{name} must have shape {shapes}, got {tuple(values.shape)}")
    right = (values >= 0) & (values.isfinite() if finite else ~values.isnan())
    if not bool(right.all()):
        wrong = values.flatten()[int((~right).flatten().nonzero()[0])].item()
        wanted = "a finite number of at least 0" if finite else "at least 0"
        raise ValueError(f"{name} must be {wanted}, got {wrong}; bounds are amounts of compute")


def _check_order(costs: Tensor, low: float | Tensor, high: float | Tensor) -> None:
    low, high = (torch.as_tensor(bound, dtype=torch.float64, device="cpu") for bound in (low, high))
    if low.dim() == high.dim() == 1 and low.shape != high.shape:
        raise ValueError(
            f"per_token low and high must have one length, got {low.shape[0]} and {high.shape[0]}"
        )
    if bool((low > high).any()):
        raise InfeasibleBudgetError(
            f"per_token low must be at most high, got low {low.tolist()} and high {high.tolist()}; "
            "lower the one or raise the other"
        )
    total = costs.double().sum().item()
    if bool((low > total * (1 + 1e-12)).any()):
        raise InfeasibleBudgetError(
            f"per_token low must be at most the cost of all experts, {total:g}, "
            f"got {low.max().item():g}; lower it"
        )
