r"""The experts that a scorer opens, no others.

.. math:: I_t = \mathrm{top}_K \{v_{te} : e \in O_t\}, \qquad
          I_t = \{\arg\max_e v_{te}\} \text{ where } O_t = \emptyset
"""

from collections.abc import Mapping
from typing import final

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from drgr.budgets import Selection
from drgr.budgets.selection import rank_experts
from drgr.collectives import sum_over_processes
from drgr.routing.plan import LayerRouting
from drgr.routing.selection.selector import SelectionInputs


@final
class OpenExperts:
    """Follows a scorer that decides by itself how many experts a token has.

    Nothing holds an average: what a batch spends follows from the scores, and ``limit`` is the
    maximum of every real token. Prices order the open experts where there are more than the
    maximum; they open none.

    Args:
        maximum: Most experts ``K`` of a token, at least 1.
        at_least_best: Whether a token without an open expert gets its best one.

    Raises:
        ValueError: If ``maximum`` is below 1.

    Complexity:
        O(TE) time; in training one all-reduce of two numbers.
    """

    price: Tensor | None = None

    def __init__(self, maximum: int, *, at_least_best: bool = True) -> None:
        if maximum < 1:
            raise ValueError(f"maximum must be at least 1, got {maximum}")
        self.maximum = maximum
        self._at_least_best = at_least_best

    def select(self, inputs: SelectionInputs, /) -> Selection:
        """Chooses the best of each token's open experts; every token decides alone.

        Raises:
            ValueError: If the scorer does not say which experts are open.
        """
        if inputs.is_open is None:
            raise ValueError(
                "OpenExperts needs a scorer that says which experts are open, got is_open None; "
                "use such a scorer (ReluRmsScores, NormScores, TsallisHybridScores, "
                "StochasticGates) or another selection"
            )
        values = inputs.values.detach()
        is_open = inputs.is_open & torch.isfinite(values)
        if self._at_least_best:
            is_best = torch.zeros_like(is_open)
            is_best.scatter_(1, values.argmax(dim=1, keepdim=True), True)
            is_best &= torch.isfinite(values) & ~is_open.any(dim=1, keepdim=True)
            is_open = is_open | is_best
        ranked, expert_ids = rank_experts(values.masked_fill(~is_open, -torch.inf), self.maximum)
        keep = torch.isfinite(ranked)
        num_valid = torch.full((), values.shape[0], dtype=torch.int64, device=values.device)
        if inputs.valid is not None:
            keep = keep & inputs.valid.unsqueeze(1)
            num_valid = inputs.valid.sum()
        counts = torch.stack([keep.sum(), num_valid * self.maximum])
        spend, limit = sum_over_processes(counts, inputs.group) if inputs.exact else counts
        return Selection(
            expert_ids=expert_ids,
            keep=keep,
            spend=spend,
            limit=limit,
            price=values.new_tensor(torch.nan),
        )

    def observe(self, routing: LayerRouting) -> None:
        """Does nothing."""

    def update(self, group: ProcessGroup | None = None) -> None:
        """Does nothing."""

    def state_dict(self) -> dict[str, Tensor]:
        """Returns nothing: there is no state."""
        return {}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Checks that there is none."""
        if state:
            raise ValueError(
                f"state of OpenExperts must hold [], got {sorted(state)}; it belongs to another "
                f"kind of selector"
            )
