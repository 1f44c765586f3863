r"""The experts that are worth more than a threshold learned as a quantile of past steps.

One threshold for all experts: with ``n`` the tokens of the step, over all its micro-batches and
processes, each with its best ``k_min`` experts, and ``c = floor(k n)`` less those assignments,

.. math:: \theta = \text{the } (c + 1)\text{-th largest of } v_{t(j)},\; k_{min} < j \le k_{max},

``v_{t(j)}`` being the ``j``-th best worth of token ``t``. One for each of ``E`` experts, the
one-shot rule:

.. math:: \theta_e = \text{the } (\lfloor k n \rfloor / E + 1)\text{-th largest of } v_{te}
          \text{ over tokens } t .

A token runs its best ``k_min`` experts by ``v_te - theta_e``, and of its next those above 0, up to
``k_max``.
"""

from collections.abc import Mapping
from typing import final

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from drgr._checks import check_share
from drgr.budgets import Selection, TokenBudget, rank_experts, select_at_price
from drgr.collectives import sum_over_processes
from drgr.numerics import kth_largest
from drgr.routing.plan import LayerRouting
from drgr.routing.selection.selector import SelectionInputs
from drgr.routing.selection.tally import check_selector_state, tallied
from drgr.routing.targets import target_counts


@final
class QuantileSelector:
    """Selects at a threshold that keeps to an average, and lets each token decide alone.

    The threshold is the one at which the step before would have met the average exactly, averaged
    over steps. So training never looks at other tokens of a batch, and spends near the average, not
    at most it: ``limit`` is what the budget allows, and a batch may exceed it. Until a step was
    seen every token has ``floor(average)`` experts.

    The one-shot rule is published as a solution of the balanced assignment problem without the
    constraint on tokens: with one threshold for each expert loads are even by themselves, and
    prices of a controller change nothing but the first steps. Its bounds of a token are derived
    here, and its quantiles do not know them: a minimum above 0 adds assignments, a maximum below
    ``E`` removes some. The quantile within bounds, of one threshold, is derived here.

    Args:
        budget: Bounds of a token, and the average to keep to.
        num_experts: Number of experts ``E``, for one threshold each; ``None`` for one for all.
        smoothing: Share of the old threshold that a step keeps, in [0, 1). The first step is taken
            whole.
        device: Where the thresholds live.

    Raises:
        ValueError: If ``smoothing`` is out of range.

    Complexity:
        A selection: O(TE) time; in training one all-reduce of two numbers. An update: the order
        statistic of :func:`drgr.numerics.kth_largest`, over what a step's micro-batches left, which
        is kept until then.

    References:
        Su, *Quantile balancing*, kexue.fm 11619 (the one-shot rule and its average over steps).
    """

    def __init__(
        self,
        budget: TokenBudget,
        *,
        num_experts: int | None = None,
        smoothing: float = 0.9,
        device: torch.device | None = None,
    ) -> None:
        check_share("smoothing", smoothing)
        self.budget = budget
        self._num_experts = num_experts
        self._smoothing = smoothing
        self._thresholds = torch.full((num_experts or 1,), torch.nan, device=device)
        self._candidates: list[Tensor] = []
        # Real tokens, and their assignments within the minimum.
        self._counts = torch.zeros(2, dtype=torch.int64, device=device)

    @property
    def maximum(self) -> int:
        """Most experts of a token."""
        return self.budget.maximum

    @property
    def thresholds(self) -> Tensor | None:
        """Shape ``(1,)`` or ``(E,)``, float32; ``None`` before the first step."""
        if bool(torch.isnan(self._thresholds).all()):
            return None
        # An expert that no token could use has none, and any will do.
        return self._thresholds.nan_to_num(nan=0.0)

    @property
    def price(self) -> Tensor | None:
        """The one threshold, scalar; ``None`` before the first step or with one for each expert."""
        thresholds = self.thresholds
        return None if thresholds is None or self._num_experts is not None else thresholds[0]

    def select(self, inputs: SelectionInputs, /) -> Selection:
        """Chooses by each token's own worths, in training as at evaluation."""
        thresholds = self.thresholds
        values = inputs.values.detach()
        if thresholds is None:
            chosen = select_at_price(values, self.budget, price=None)
        elif self._num_experts is None:
            chosen = select_at_price(values, self.budget, price=thresholds[0])
        else:
            bar = torch.zeros((), device=values.device)
            chosen = select_at_price(values - thresholds, self.budget, price=bar)
        return tallied(
            inputs,
            expert_ids=chosen.expert_ids,
            keep=chosen.keep,
            limit=self.budget.total_on_device,
            price=self.price,
        )

    def observe(self, routing: LayerRouting) -> None:
        """Keeps a micro-batch's candidates until the update."""
        values = routing.values.float()
        if routing.valid is not None:
            values = values[routing.valid]
        if self._num_experts is None:
            ranked, _ = rank_experts(values, self.budget.maximum)
            base = torch.isfinite(ranked[:, : self.budget.minimum]).sum()
            self._candidates.append(ranked[:, self.budget.minimum :].reshape(-1, 1))
        else:
            base = torch.zeros_like(self._counts[1])
            self._candidates.append(values)
        self._counts += torch.stack([torch.full_like(base, len(values)), base])

    def update(self, group: ProcessGroup | None = None) -> None:
        """Moves to the step's quantile; nothing observed leaves the thresholds as they are."""
        num_columns = len(self._thresholds)
        empty = self._thresholds.new_zeros(0, num_columns)
        candidates = torch.cat([empty, *self._candidates])
        permitted = torch.isfinite(candidates).sum(dim=0)
        rows = torch.full_like(self._counts[:1], len(candidates))
        parts = torch.cat([rows, self._counts, permitted])
        num_rows, num_tokens, base, *_ = totals = sum_over_processes(parts, group)
        if int(num_rows) > 0:
            wanted = self.budget.total_on_device(num_tokens) - base
            found = _quantiles(
                candidates, target_counts(None, wanted, num_columns), totals[3:], group
            )
            averaged = self._smoothing * self._thresholds + (1 - self._smoothing) * found
            averaged = torch.where(torch.isnan(self._thresholds), found, averaged)
            self._thresholds = torch.where(torch.isnan(found), self._thresholds, averaged)
        self._forget()

    def state_dict(self) -> dict[str, Tensor]:
        """Returns the thresholds; NaN stands for one that was never learned."""
        return {"thresholds": self._thresholds.clone()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restores the thresholds and forgets what was observed."""
        check_selector_state(self, state, "thresholds")
        if state["thresholds"].shape != self._thresholds.shape:
            raise ValueError(
                f"state of QuantileSelector must hold {len(self._thresholds)} thresholds, got "
                f"{state['thresholds'].numel()}; build it with as many as it was saved with"
            )
        self._thresholds = state["thresholds"].to(self._thresholds)
        self._forget()

    def _forget(self) -> None:
        self._candidates = []
        self._counts = torch.zeros_like(self._counts)


def _quantiles(
    candidates: Tensor, wanted: Tensor, permitted: Tensor, group: ProcessGroup | None
) -> Tensor:
    """Returns what exactly ``wanted`` candidates of each column exceed, shape ``(m,)``.

    Where fewer are permitted (finite) it is just below the least of them; without any, NaN.

    Args:
        candidates: Shape ``(n, m)``, float32; ``-inf`` is not permitted.
        wanted: How many should exceed it, shape ``(m,)``, int64.
        permitted: How many are finite over all processes, shape ``(m,)``, int64.
        group: Processes that share the rows.
    """
    found = kth_largest(candidates, torch.minimum(wanted + 1, permitted), group)
    below = torch.nextafter(found, torch.full_like(found, -torch.inf))
    found = torch.where(wanted >= permitted, below, found)
    return torch.where(permitted == 0, torch.full_like(found, torch.nan), found)
