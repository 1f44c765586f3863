r"""The exact budgeted selection within each sequence.

For every sequence ``b`` of a batch, with ``n_b`` real tokens,

.. math:: \max_m \sum_{t \in b} \sum_e v_{te} m_{te} \quad\text{s.t.}\quad
          k_{min} \le \sum_e m_{te} \le k_{max},\;
          \sum_{t \in b} \sum_e m_{te} = \min(\lfloor k n_b \rfloor, k_{max} n_b) .
"""

from typing import final

import torch
from torch import Tensor

from drgr.budgets import Selection, rank_experts, select_at_price
from drgr.budgets.marginal_price import price_between
from drgr.collectives import sum_over_processes
from drgr.routing.selection.priced import PricedSelector
from drgr.routing.selection.selector import SelectionInputs


@final
class SequenceSelector(PricedSelector):
    """Holds the average in every sequence: none of a batch spends what another saves.

    As in the whole batch a greedy pass is optimal: every token's best ``minimum``, then the best of
    the rest of its sequence. At evaluation each token decides alone at the learned price, the mean
    over real tokens of what an extra expert of their sequence had to exceed; then the average holds
    as well as the price predicts it. A token with fewer permitted experts than the minimum gets
    all of them. Derived here, from the same selection over a batch.

    Args:
        budget: Bounds of a token, and the average of each sequence.
        smoothing: Share of the price's average that a step keeps, in [0, 1).
        device: Where the price lives.

    Raises:
        ValueError: If ``smoothing`` is out of range.

    Complexity:
        O(TE + S log s) time for sequences with ``s`` candidates and ``S`` in all; in training one
        all-reduce of four numbers, since sequences are whole on their process.
    """

    def select(self, inputs: SelectionInputs, /) -> Selection:
        """Chooses exactly in each sequence, or each token alone.

        Raises:
            ValueError: In training, if the length of the sequences is not known or does not divide
                the number of tokens.
        """
        values = inputs.values.detach()
        if not inputs.exact:
            return select_at_price(values, self.budget, price=self.price, valid=inputs.valid)
        shape = _shape(len(values), inputs.sequence_length)
        least, most = self.budget.minimum, self.budget.maximum
        ranked, expert_ids = rank_experts(values, most)
        keep = torch.isfinite(ranked)
        if inputs.valid is None:
            num_real = torch.full(shape[:1], shape[1], dtype=torch.int64, device=values.device)
        else:
            keep &= inputs.valid.unsqueeze(1)
            num_real = inputs.valid.view(shape).sum(dim=1)
        limit = self.budget.total_on_device(num_real)
        num_base = keep[:, :least].reshape(shape[0], shape[1] * least).sum(dim=1)
        extras = ranked[:, least:].masked_fill(~keep[:, least:], -torch.inf)
        kept, prices = _best_of_rows(
            extras.reshape(shape[0], shape[1] * (most - least)), limit - num_base
        )
        keep[:, least:] = kept.view_as(extras)
        return self._selection(inputs, expert_ids, keep, limit, (prices, num_real))

    def _selection(
        self,
        inputs: SelectionInputs,
        expert_ids: Tensor,
        keep: Tensor,
        limit: Tensor,
        priced: tuple[Tensor, Tensor],
    ) -> Selection:
        """Adds up counts, and averages the prices of sequences, over all processes."""
        prices, num_real = priced
        weights = torch.where(torch.isnan(prices), 0, num_real).double()
        weighted = (weights * prices.double().nan_to_num(nan=0.0)).sum()
        # Counts are whole numbers far below 2^53, which float64 adds up exactly.
        sums = torch.stack([keep.sum().double(), limit.sum().double(), weighted, weights.sum()])
        spend, allowed, weighted, total = sum_over_processes(sums, inputs.group)
        return Selection(
            expert_ids=expert_ids,
            keep=keep,
            spend=spend.long(),
            limit=allowed.long(),
            price=(weighted / total).to(inputs.values.dtype),  # 0 / 0, NaN, where there is none
        )


def _shape(num_tokens: int, sequence_length: int | None) -> tuple[int, int]:
    """Returns the number of sequences and the tokens of each."""
    if sequence_length is None:
        raise ValueError(
            "a budget for each sequence needs their length, got None; call the model with "
            "input_ids or inputs_embeds, or pass sequence_length"
        )
    if num_tokens % sequence_length:
        raise ValueError(
            f"sequence_length must divide the number of tokens, got {sequence_length} for "
            f"{num_tokens} tokens; a budget for each sequence needs whole ones"
        )
    return num_tokens // sequence_length, sequence_length


def _best_of_rows(extras: Tensor, allowed: Tensor) -> tuple[Tensor, Tensor]:
    """Keeps the best ``allowed`` finite entries of each row; returns which, and each row's price.

    Args:
        extras: Shape ``(B, N)``; ``-inf`` is never kept.
        allowed: Shape ``(B,)``, int64.
    """
    order = extras.argsort(dim=1, descending=True, stable=True)
    num_kept = torch.minimum(allowed, torch.isfinite(extras).sum(dim=1))
    is_best = torch.arange(extras.shape[1], device=extras.device) < num_kept.unsqueeze(1)
    kept = torch.zeros_like(is_best).scatter(1, order, is_best)
    return kept, price_between(extras.gather(1, order), num_kept)
