"""Which experts of a model to keep when only so many, or so many bytes of them, may stay."""

from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from drgr.budgets.static.allocation import Certificate, allocate_experts
from drgr.budgets.static.search import GatesLoss, SearchSettings

_DEFAULT = SearchSettings()
# From the least to the most used expert, in logits.
_SPREAD = 5.0


@final
@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Pruning:
    """Result of :func:`prune_experts`."""

    kept: Tensor
    """Which experts stay, bool, shape ``(L, E)``."""
    probabilities: Tensor
    """Of staying, at the end of the search, shape ``(L, E)``, float64."""
    losses: tuple[float, ...]
    """Mean loss of the sampled sets of each step."""
    certificate: Certificate


def prune_experts(
    loss_of_gates: GatesLoss,
    costs: Tensor,
    limits: float | Tensor,
    *,
    generator: torch.Generator,
    exactly: bool = False,
    importance: Tensor | None = None,
    settings: SearchSettings = _DEFAULT,
) -> Pruning:
    r"""Chooses the experts that stay, under one budget for the model or one for each layer.

    .. math:: \min_{S} loss(1_S) \ \text{s.t.}\ \sum_{le \in S} c_{le} \le B
              \quad \text{or} \quad \sum_{e : le \in S} c_{le} \le B_l \ \text{for all } l .

    Multiply each expert's weight in the combination by its gate and do not renormalise over the
    gates during the search: renormalising hides from the gradient what an expert is worth. A
    deployed model that masks the router's logits instead differs a little from the one searched on.

    Args:
        loss_of_gates: Maps gates ``(L, E)``, float64, 1 for an expert that stays, to a scalar loss,
            differentiably; for instance the distance to the outputs of the whole model.
        costs: Cost of keeping each expert in whole units, at least 0, shape ``(L, E)``; ones count
            experts.
        limits: Most cost of all experts that stay, a number, or of each layer's, shape ``(L,)``.
        generator: Source of the Gumbel noise, on the CPU.
        exactly: Whether limits must be spent to the last unit.
        importance: Any measure of use or size, shape ``(L, E)``: the search begins with a
            preference of 5 logits for the largest over the smallest. None begins without one.
        settings: Steps, learning rate, temperatures and samples.

    Returns:
        The experts that stay, with the certificate.

    Raises:
        ValueError: If a shape or value is out of range, costs are not whole, or the loss is not a
            scalar that depends on the gates.
        InfeasibleBudgetError: If no set of experts is inside the budgets.
        NonFiniteLossError: If the loss is not finite.

    Complexity:
        That of :func:`allocate_experts`; with equal costs a knapsack is a sort.

    References:
        RCO, arXiv 2605.00649.

    Examples:
        >>> import torch
        >>> worth = torch.tensor([[5.0, 1.0, 2.0], [4.0, 3.0, 0.5]], dtype=torch.float64)
        >>> found = prune_experts(
        ...     lambda gates: -(worth * gates).sum(),
        ...     torch.ones(2, 3),
        ...     3,
        ...     generator=torch.Generator().manual_seed(0),
        ... )
        >>> found.kept.int(), found.certificate.spend
        (tensor([[1, 0, 0],
                [1, 1, 0]], dtype=torch.int32), tensor([3]))
    """
    _check_costs(costs)
    num_layers, num_experts = costs.shape
    num_items = num_layers * num_experts
    found = allocate_experts(
        lambda gates: loss_of_gates(gates[:, 1].view(num_layers, num_experts)),
        _kept_or_dropped(costs, torch.as_tensor(limits)),
        limits,
        generator=generator,
        exactly=exactly,
        prior=None if importance is None else _preference(importance, costs).view(num_items, 2),
        settings=settings,
    )
    return Pruning(
        kept=(found.options == 1).view(num_layers, num_experts),
        probabilities=found.probabilities[:, 1].view(num_layers, num_experts),
        losses=found.losses,
        certificate=found.certificate,
    )


def _check_costs(costs: Tensor) -> None:
    if costs.dim() != 2 or 0 in costs.shape:
        raise ValueError(
            f"costs must have shape (L, E) with L, E >= 1, got {tuple(costs.shape)}; "
            "give a row to each layer"
        )
    if bool((costs < 0).any()):
        index = tuple((costs < 0).nonzero()[0].tolist())
        raise ValueError(
            f"costs must be at least 0, got {costs[index].item()} at index {index}; "
            "an expert that stays costs something or nothing"
        )


def _kept_or_dropped(costs: Tensor, limits: Tensor) -> Tensor:
    """Returns costs of two options for each expert, ``(m, L E, 2)``, 0 outside the layer if m = L.

    Raises:
        ValueError: If there are neither one nor ``L`` limits.
    """
    if limits.dim() == 0:
        kept = costs.flatten().unsqueeze(0)
    elif limits.shape == costs.shape[:1]:
        kept = torch.block_diag(*costs)
    else:
        raise ValueError(
            f"limits must be a number or have shape (L,) = ({len(costs)},), "
            f"got {tuple(limits.shape)}; give one for the model or one for each layer"
        )
    return torch.stack([torch.zeros_like(kept), kept], dim=-1)


def _preference(importance: Tensor, costs: Tensor) -> Tensor:
    if importance.shape != costs.shape or not bool(importance.isfinite().all()):
        raise ValueError(
            f"importance must be finite with the shape of costs, {tuple(costs.shape)}, got shape "
            f"{tuple(importance.shape)} with {int((~importance.isfinite()).sum())} entries that "
            "are not finite"
        )
    values = importance.detach().double()
    low, high = values.min(), values.max()
    share = (values - low) / (high - low) if bool(high > low) else torch.full_like(values, 0.5)
    return torch.stack([torch.zeros_like(share), _SPREAD * (share - 0.5)], dim=-1)
