"""Sinkhorn prices: the entropic smoothing of the balanced assignment dual."""

from collections.abc import Sequence
from typing import Literal, final, get_args

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from drgr._checks import check_positive
from drgr.collectives import sum_over_processes
from drgr.numerics import Status
from drgr.routing.controllers import check_state
from drgr.routing.plan import LayerRouting
from drgr.routing.step_scores import ScoreBatch, StepScores, marginal_values
from drgr.routing.targets import target_shares
from drgr.routing.transport import Transport, entropic_transport

SinkhornCost = Literal["scores", "log-scores"]
"""What is transported; see :class:`SinkhornPrices`."""

_MARGIN = 0.1
"""Relative distance of a score from where a token would take its expert that halves its weight."""


@final
class SinkhornPrices:
    r"""Takes the expert prices of the entropic transport of the last step's tokens.

    .. math:: \Pi_{te} = e^{(C_{te} - \alpha_t - \beta_e) / \xi}, \quad \Pi 1 = 1,\quad
              \Pi^\top 1 = T w

    after each optimizer step, over all its micro-batches and processes
    (:func:`~drgr.routing.entropic_transport`), starting from the last ``beta``. The largest entries
    of a row of ``Pi`` are the largest ``C - beta``, so ``beta`` is the price of an expert. As
    ``xi`` goes to 0 it solves the balanced assignment of one expert a token.

    Two costs are published, a router's logits and their softmax:

    - ``"scores"``: ``C`` is the scores that are routed on, for a softmax router the softmax cost;
      ``beta`` is the price. Scores differ by little, so ``xi`` must be small.
    - ``"log-scores"``: ``C = log s``, for a softmax router its logits less a number for each token,
      which the transport ignores: the linear cost. Token ``t`` would take expert ``e`` from the
      score :math:`\theta_{te} = e^{a_t + \beta_e}` on, where ``a_t`` is its best worth not taken.
      The price in score units is the least-squares fit of a token's plus an expert's number to
      ``theta``, weighted by :math:`1 / (1 + (\log (s_{te} / \theta_{te}) / 0.1)^2)`: it is to be
      right where a token is nearly indifferent, elsewhere the choice does not depend on it. Derived
      here; not exact, as one price serves tokens of every confidence.

    Published routes a batch by its own plan. Here its prices serve the next step, so that no route
    depends on later tokens, and combine weights stay the router's own. Targets other than equal
    loads are derived here.

    Args:
        num_experts: Number of experts ``E``.
        regularization: ``xi`` in units of the cost, above 0.
        cost: What is transported.
        tolerance: Largest relative error of an expert's mass that counts as converged.
        max_iterations: Most iterations of one update.
        target: Loads wanted, one positive number for each expert in any unit; equal by default.
        device: Where the prices live.

    References:
        *Selective Sinkhorn Routing*, arXiv 2511.08972; Cuturi, *Sinkhorn Distances*,
        arXiv 1306.0895.
    """

    def __init__(
        self,
        num_experts: int,
        *,
        regularization: float = 0.05,
        cost: SinkhornCost = "scores",
        tolerance: float = 1e-3,
        max_iterations: int = 100,
        target: Sequence[float] | None = None,
        device: torch.device | None = None,
    ) -> None:
        check_positive("regularization", regularization)
        check_positive("tolerance", tolerance)
        if cost not in get_args(SinkhornCost):
            raise ValueError(f"cost must be one of {list(get_args(SinkhornCost))}, got {cost!r}")
        if max_iterations < 1:
            raise ValueError(f"max_iterations must be at least 1, got {max_iterations}")
        self._regularization = regularization
        self._cost = cost
        self._tolerance = tolerance
        self._max_iterations = max_iterations
        self._shares = target_shares(target, num_experts, device=device)
        self._prices = torch.zeros(num_experts, device=device)
        self._duals = torch.zeros(num_experts, dtype=torch.float64, device=device)
        self._scores = StepScores(num_experts, device=device)
        self._transport: Transport | None = None

    @property
    def prices(self) -> Tensor:
        """Current prices, shape ``(E,)``."""
        return self._prices

    @property
    def transport(self) -> Transport | None:
        """The last transport with its error and status; ``None`` before the first."""
        return self._transport

    @property
    def status(self) -> Status | None:
        """Whether the last transport converged; prices of one that did not are used as they are."""
        return None if self._transport is None else self._transport.status

    def observe(self, routing: LayerRouting) -> None:
        """Keeps a micro-batch's scores of valid tokens until the update."""
        self._scores.observe(routing, self._prices)

    def update(self, group: ProcessGroup | None = None) -> None:
        """Solves the transport of the step; nothing observed leaves the prices as they are."""
        batch = self._scores.take(group)
        if int(batch.num_tokens) == 0:
            return
        worths = batch.scores if self._cost == "scores" else _log_scores(batch.scores)
        self._transport = entropic_transport(
            worths,
            regularization=self._regularization,
            shares=self._shares,
            start=self._duals,
            tolerance=self._tolerance,
            max_iterations=self._max_iterations,
            group=group,
        )
        self._duals = self._transport.expert_prices
        prices = self._duals
        if self._cost == "log-scores":
            prices = _entry_prices(worths, self._duals, batch, group)
        self._prices = (prices - prices.mean()).to(self._prices.dtype)

    def state_dict(self) -> dict[str, Tensor]:
        """Returns the prices, and those of the transport in units of its cost."""
        return {"prices": self._prices.clone(), "duals": self._duals.clone()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restores the prices and forgets what was observed."""
        check_state(self, state, "prices", "duals")
        self._prices = state["prices"].to(self._prices)
        self._duals = state["duals"].to(self._duals)
        self._transport = None
        self._scores.forget()


def _log_scores(scores: Tensor) -> Tensor:
    """Returns log scores; a permitted score that underflowed to zero is the smallest normal one."""
    smallest = torch.finfo(scores.dtype).tiny
    return torch.where(torch.isneginf(scores), scores, scores.clamp_min(smallest).log())


def _entry_prices(
    worths: Tensor, duals: Tensor, batch: ScoreBatch, group: ProcessGroup | None
) -> Tensor:
    """Returns the experts' part of the scores from which tokens take them, ``(E,)``, float64.

    Tokens' parts are eliminated from the weighted least squares, which leaves the Laplacian of a
    graph of experts; its smallest solution has mean zero. A token that takes all it may has no
    threshold and no say.
    """
    values = worths.double() - duals
    thresholds = marginal_values(values, batch.expert_counts)
    has_one = torch.isfinite(thresholds)
    values, thresholds = values[has_one], thresholds[has_one].unsqueeze(1)
    entries = (thresholds + duals).exp()
    weights = 1 / (1 + ((values - thresholds) / _MARGIN).square())
    totals = weights.sum(dim=1, keepdim=True)
    means = (weights * entries).sum(dim=1, keepdim=True) / totals
    laplacian = torch.diag(weights.sum(dim=0)) - weights.T @ (weights / totals)
    pull = (weights * (entries - means)).sum(dim=0)
    system = sum_over_processes(torch.cat([laplacian, pull.unsqueeze(1)], dim=1), group)
    inverse: Tensor = torch.linalg.pinv(system[:, :-1], hermitian=True)
    return inverse @ system[:, -1]
