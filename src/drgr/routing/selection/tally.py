"""What all selections share: counting what a choice spends, and checking arguments and state."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from drgr.budgets import Selection
from drgr.collectives import sum_over_processes
from drgr.routing.selection.selector import SelectionInputs, Selector


def tallied(
    inputs: SelectionInputs,
    *,
    expert_ids: Tensor,
    keep: Tensor,
    limit: Callable[[Tensor], Tensor],
    price: Tensor | None = None,
) -> Selection:
    """Returns a choice without its padding, with what it spends and what it might have spent.

    Counts are of all processes in training; at evaluation, where processes need not run the same
    passes, of this one.

    Args:
        inputs: What was chosen from.
        expert_ids: Candidates, best first, shape ``(T, K)``.
        keep: Which of them run, shape ``(T, K)``, bool; true entries come first in a row.
        limit: From the number of real tokens, int64 scalar, to the assignments allowed them.
        price: What an extra expert had to exceed, scalar; ``None`` where tokens share no price.
    """
    num_valid = torch.full((), len(keep), dtype=torch.int64, device=keep.device)
    if inputs.valid is not None:
        keep = keep & inputs.valid.unsqueeze(1)
        num_valid = inputs.valid.sum()
    counts = torch.stack([keep.sum(), num_valid])
    spend, num_valid = sum_over_processes(counts, inputs.group) if inputs.exact else counts
    return Selection(
        expert_ids=expert_ids,
        keep=keep,
        spend=spend,
        limit=limit(num_valid),
        price=inputs.values.new_tensor(torch.nan) if price is None else price,
    )


def check_bounds(minimum: int, maximum: int) -> None:
    """Raises ``ValueError`` unless ``0 <= minimum <= maximum`` and ``1 <= maximum``."""
    if not (0 <= minimum <= maximum and maximum >= 1):
        raise ValueError(
            f"bounds of a token's experts must satisfy 0 <= minimum <= maximum and maximum >= 1, "
            f"got minimum {minimum} and maximum {maximum}"
        )


def check_selector_state(selector: Selector, state: Mapping[str, Tensor], *names: str) -> None:
    """Raises ``ValueError`` unless ``state`` has exactly the tensors called ``names``."""
    if set(state) != set(names):
        raise ValueError(
            f"state of {type(selector).__name__} must hold {sorted(names)}, got {sorted(state)}; "
            f"it belongs to another kind of selector"
        )
