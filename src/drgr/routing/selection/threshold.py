r"""The experts that are worth more than a fixed threshold.

.. math:: I_t = \{ e : v_{te} > \theta \},

filled up to the token's best ``k_min``, cut to its best ``k_max``.
"""

import math
from collections.abc import Mapping
from typing import final

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from drgr.budgets import Selection, rank_experts
from drgr.routing.plan import LayerRouting
from drgr.routing.selection.selector import SelectionInputs
from drgr.routing.selection.tally import check_bounds, check_selector_state, tallied


@final
class ThresholdSelector:
    """Runs what exceeds a threshold; each token decides alone.

    Nothing holds an average: it follows from the scores, which training moves. ``limit`` is the
    maximum of every real token. For a threshold that keeps to an average see
    :class:`~drgr.routing.selection.QuantileSelector`. Derived here: the bounds.

    Args:
        threshold: What an expert's worth, score less price, must exceed; finite, in units of the
            scores.
        maximum: Most experts of a token, at least 1.
        minimum: Fewest experts of a token, at least 0.

    Raises:
        ValueError: If the threshold is not finite or a bound is out of range.

    Complexity:
        O(TE) time; in training one all-reduce of two numbers.
    """

    def __init__(self, threshold: float, *, maximum: int, minimum: int = 1) -> None:
        if not math.isfinite(threshold):
            raise ValueError(f"threshold must be a finite number, got {threshold}")
        check_bounds(minimum, maximum)
        self.threshold = threshold
        self.minimum = minimum
        self.maximum = maximum

    @property
    def price(self) -> Tensor:
        """The threshold, scalar, on the CPU."""
        return torch.tensor(self.threshold)

    def select(self, inputs: SelectionInputs, /) -> Selection:
        """Chooses by each token's own worths, in training as at evaluation."""
        values = inputs.values.detach()
        ranked, expert_ids = rank_experts(values, self.maximum)
        position = torch.arange(self.maximum, device=values.device)
        keep = (position < self.minimum) | (ranked > self.threshold)
        return tallied(
            inputs,
            expert_ids=expert_ids,
            keep=keep & torch.isfinite(ranked),
            limit=lambda num_tokens: num_tokens * self.maximum,
            price=torch.full((), self.threshold, dtype=values.dtype, device=values.device),
        )

    def observe(self, routing: LayerRouting) -> None:
        """Does nothing."""

    def update(self, group: ProcessGroup | None = None) -> None:
        """Does nothing."""

    def state_dict(self) -> dict[str, Tensor]:
        """Returns nothing: the threshold is a setting."""
        return {}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Checks that there is nothing."""
        check_selector_state(self, state)
