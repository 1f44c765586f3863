r"""The best experts until their scores reach a share of all.

With the permitted experts of token ``t`` in the order of their worth, ``v_{t1} >= v_{t2} >= ...``,
and their scores divided by the sum over all permitted ones,

.. math:: K_t = \min \Bigl\{ k : \sum_{j \le k} \bar s_{tj} \ge p \Bigr\}, \qquad
          I_t = \text{the first } \min(\max(K_t, k_{min}), k_{max}) .

The expert that crosses ``p`` is among them, as in nucleus sampling.
"""

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
class TopPSelector:
    """Gives a token as many experts as its scores are spread over; each token decides alone.

    Nothing holds an average: flatter scores spend more. ``limit`` is the maximum of every real
    token. Published for softmax scores without prices, in their own order. Derived here: order by
    worth, so that expert prices balance loads; other scores, normalised over the permitted experts;
    bounds. An expert that adds nothing to the sum runs within the minimum only.

    Args:
        p: Share of the scores to reach, in (0, 1].
        maximum: Most experts of a token, at least 1.
        minimum: Fewest experts of a token, at least 0.

    Raises:
        ValueError: If ``p`` or a bound is out of range.

    Complexity:
        O(TE) time; in training one all-reduce of two numbers.

    References:
        Huang et al., *Harder Tasks Need More Experts: Dynamic Routing in MoE Models*, 2024 (arXiv
        2403.07652). Holtzman et al., *The Curious Case of Neural Text Degeneration*, 2020 (the
        nucleus).
    """

    price: Tensor | None = None

    def __init__(self, p: float, *, maximum: int, minimum: int = 1) -> None:
        if not 0 < p <= 1:
            raise ValueError(f"p must lie in (0, 1], got {p}; it is a share of the scores")
        check_bounds(minimum, maximum)
        self.p = p
        self.minimum = minimum
        self.maximum = maximum

    def select(self, inputs: SelectionInputs, /) -> Selection:
        """Chooses by each token's own scores, in training as at evaluation."""
        ranked, expert_ids = rank_experts(inputs.values.detach(), self.maximum)
        permitted = torch.isfinite(inputs.values)
        # Double, so that rounding decides no more than ties of float32 scores do.
        scores = inputs.scores.detach().double().masked_fill(~permitted, 0.0)
        chosen = scores.gather(1, expert_ids)
        before = torch.cat([chosen.new_zeros(len(chosen), 1), chosen[:, :-1].cumsum(dim=1)], dim=1)
        position = torch.arange(self.maximum, device=scores.device)
        keep = (position < self.minimum) | (before < self.p * scores.sum(dim=1, keepdim=True))
        return tallied(
            inputs,
            expert_ids=expert_ids,
            keep=keep & torch.isfinite(ranked),
            limit=lambda num_tokens: num_tokens * self.maximum,
        )

    def observe(self, routing: LayerRouting) -> None:
        """Does nothing."""

    def update(self, group: ProcessGroup | None = None) -> None:
        """Does nothing."""

    def state_dict(self) -> dict[str, Tensor]:
        """Returns nothing: nothing is learned."""
        return {}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Checks that there is nothing."""
        check_selector_state(self, state)
