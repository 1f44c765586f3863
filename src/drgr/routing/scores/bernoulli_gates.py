r"""Gates drawn for each token and expert, and four ways to a gradient through the draw.

With logits ``a`` and ``s = sigmoid(a)``, for a loss ``L`` of the gates ``h``:

.. math::

    \text{REINFORCE} \quad & h \sim \mathrm{Bern}(s), & \hat g &= (h - s)(L - b), \quad
        b = \frac{\mathbb{E}[(h - s)^2 L]}{\mathbb{E}[(h - s)^2]} \\
    \text{stochastic times smooth} \quad & h = \sqrt{s}\, B,\ B \sim \mathrm{Bern}(\sqrt{s}), &
        \hat g &= \tfrac12 h (1 - s) \frac{\partial L}{\partial h} \\
    \text{noisy rectifier} \quad & h = \max(0, a + \sigma n),\ n \sim N(0, 1), &
        \hat g &= 1[h > 0] \frac{\partial L}{\partial h} \\
    \text{straight through} \quad & h \sim \mathrm{Bern}(s), &
        \hat g &= \frac{\partial L}{\partial h}
"""

import math
from typing import Literal, final

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributed import ProcessGroup

from drgr._checks import check_positive, check_shape, check_share
from drgr.collectives import sum_over_processes
from drgr.routing.plan import LayerRouting
from drgr.routing.scores.scorer import RouterScores, Scorer, at_least_float32, chosen_scores
from drgr.routing.tokens import real_rows

GateEstimator = Literal[
    "reinforce", "stochastic-times-smooth", "noisy-rectifier", "straight-through"
]
"""How the gradient gets past the draw of a gate."""


@final
class StochasticGates(Scorer):
    r"""Each expert has a gate of its own, open by chance; the weight of an expert is its gate.

    Made for :class:`drgr.routing.selection.OpenExperts`, which runs the open experts; another
    selection takes open experts before closed ones, whose weight is 0.

    At evaluation nothing is drawn: a gate is its mean, open where that is more likely than not.
    This is derived. The estimators are published, the constants here are not.

    What holds of the expected gradient ``E[g]``, against that of ``E[L]``:

    - REINFORCE: equal, for any loss and any baseline that does not depend on the draw. It needs the
      value of the loss alone: :meth:`surrogate` is the loss to add, which ``drgr train`` does by
      itself. Nothing else has a gradient.
    - Stochastic times smooth: half of it where the loss is linear in the gates, of mean ``s``;
      the other half would go through the probability to be open.
    - Noisy rectifier: equal for any loss that is differentiable in the gates.
    - Straight through: that of a linear loss over ``s (1 - s)``; with ``sigmoid_slope`` equal where
      the loss is linear. A gate that is closed runs no expert, so its part of the gradient is not
      known and left out: what remains is ``s`` times it. The other three lose nothing thereby.

    Args:
        num_experts: Number of experts ``E``.
        estimator: One of the four.
        deviation: Standard deviation ``sigma`` of the noisy rectifier, above 0.
        sigmoid_slope: Whether straight-through gradients are multiplied by ``s (1 - s)``.
        decay: Share of the baseline's averages that a step keeps, in [0, 1).

    Raises:
        ValueError: If a number is out of range.

    Numerics:
        Float32 at least; the baseline's sums in float64.

    References:
        Bengio, Leonard and Courville, *Estimating or Propagating Gradients Through Stochastic
        Neurons for Conditional Computation*, 2013 (arXiv 1308.3432).
    """

    loss_moment: Tensor
    moment: Tensor

    def __init__(
        self,
        num_experts: int,
        *,
        estimator: GateEstimator = "straight-through",
        deviation: float = 1.0,
        sigmoid_slope: bool = False,
        decay: float = 0.99,
    ) -> None:
        super().__init__()
        check_positive("deviation", deviation)
        check_share("decay", decay)
        self._estimator = estimator
        self._deviation = deviation
        self._sigmoid_slope = sigmoid_slope
        self._decay = decay
        self.needs_losses = estimator == "reinforce"
        if estimator == "reinforce":
            self.register_buffer("loss_moment", torch.zeros(num_experts))
            self.register_buffer("moment", torch.zeros(num_experts))
        self._pending: Tensor | None = None

    def forward(self, hidden: Tensor, weight: Tensor) -> RouterScores:
        """See :class:`Scorer`."""
        logits = at_least_float32(F.linear(hidden, weight))
        margin = self._margin(logits.detach())
        if self.training:
            noise = self._noise(margin)
            margin = margin + noise
            scores = self.gates(logits, noise)
        else:
            scores = self._means(logits)
        return RouterScores(
            scores=scores, logits=logits, selectable=margin.sigmoid(), is_open=margin > 0
        )

    def weights(self, scores: Tensor, expert_ids: Tensor, keep: Tensor) -> Tensor:
        """Returns the gates of the experts that run, see :class:`Scorer`."""
        return chosen_scores(scores, expert_ids, keep)

    def gates(self, logits: Tensor, noise: Tensor) -> Tensor:
        """Returns the gates of a draw, with the estimator's gradient, shape ``(T, E)``.

        Args:
            logits: The logits ``a``, shape ``(T, E)``.
            noise: What is added to the margin of each gate, which is open above 0: for the noisy
                rectifier ``sigma n`` and the margin is ``a``; for the others logistic, and the
                margin is the logit of the gate's probability to be open.
        """
        if self._estimator == "noisy-rectifier":
            return (logits + noise).relu()
        is_open = (self._margin(logits.detach()) + noise > 0).to(logits.dtype)
        if self._estimator == "stochastic-times-smooth":
            return is_open * (F.logsigmoid(logits) / 2).exp()
        if self._estimator == "straight-through":
            smooth = logits.sigmoid() if self._sigmoid_slope else logits
            return is_open + (smooth - smooth.detach())
        return is_open

    @property
    def baseline(self) -> Tensor:
        """The baseline ``b`` of each expert's gate, shape ``(E,)``; 0 before the first step."""
        self._check_reinforce()
        return self.loss_moment / torch.where(self.moment > 0, self.moment, 1.0)

    def surrogate(self, routing: LayerRouting, losses: Tensor) -> Tensor:
        r"""Returns a loss whose gradient is REINFORCE's; add it to the loss of the pass.

        .. math:: \sum_{te} (L_t - b_e) \log P(h_{te} \mid a_{te})

        The baseline is of earlier steps, so that it does not depend on the draw. This pass's part
        of the next one is kept for :meth:`update`.

        Args:
            routing: The record of a training pass of this layer.
            losses: What each token's gates answer for, in units of the loss that is minimised:
                shape ``(T,)``, or a scalar for all, the exact choice where tokens act on each
                other. Taken as constants.

        Returns:
            Scalar. Its value means nothing; its gradient with respect to ``routing.logits`` is an
            unbiased estimate of that of the expected loss.

        Raises:
            ValueError: If the estimator is another or the scorer is in evaluation mode, or
                ``losses`` has another shape.
        """
        self._check_reinforce()
        if not self.training:
            raise ValueError(
                "surrogate needs the record of a training pass, got a scorer in evaluation mode, "
                "where no gate is drawn; call train() first"
            )
        assert routing.logits is not None
        logits = real_rows(routing.logits, routing.valid)
        gates = real_rows(routing.scores.detach(), routing.valid)
        losses = losses.detach().to(logits.dtype)
        if losses.dim() > 0:
            check_shape("losses", losses, (logits.shape[0],))
            losses = real_rows(losses, routing.valid).unsqueeze(1)
        self._observe_losses(gates, logits.detach(), losses, routing.valid)
        advantages = real_rows((losses - self.baseline).expand_as(logits), routing.valid)
        log_probabilities = gates * logits - F.softplus(logits)
        return torch.sum(advantages * log_probabilities)

    @torch.no_grad()
    def update(self, group: ProcessGroup | None = None) -> None:
        """Moves the averages of the baseline by a step's losses, over all processes."""
        if self._estimator != "reinforce":
            return
        pending, self._pending = self._pending, None
        if pending is None:
            pending = self.moment.new_zeros(2, len(self.moment), dtype=torch.float64)
        found = sum_over_processes(pending, group)
        for average, new in zip((self.loss_moment, self.moment), found, strict=True):
            moved = self._decay * average + (1 - self._decay) * new.to(average.dtype)
            average.copy_(torch.where(found[1] > 0, moved, average))

    def _observe_losses(
        self, gates: Tensor, logits: Tensor, losses: Tensor, valid: Tensor | None
    ) -> None:
        squares = real_rows((gates - logits.sigmoid()).square(), valid).double()
        found = torch.stack([(squares * losses).sum(dim=0), squares.sum(dim=0)])
        self._pending = found if self._pending is None else self._pending + found

    def _check_reinforce(self) -> None:
        if self._estimator != "reinforce":
            raise ValueError(
                f"only the estimator reinforce has a baseline and a surrogate, got "
                f"{self._estimator}; its gradient flows through the combine weights"
            )

    def _margin(self, logits: Tensor) -> Tensor:
        """Returns what noise is added to; above 0 a gate is more likely open than closed."""
        if self._estimator != "stochastic-times-smooth":
            return logits
        log_root = F.logsigmoid(logits) / 2  # the gate is open with probability sqrt(s)
        return log_root - (-torch.expm1(log_root)).log()

    def _noise(self, margin: Tensor) -> Tensor:
        if self._estimator == "noisy-rectifier":
            return self._deviation * torch.randn_like(margin)
        return torch.logit(torch.rand_like(margin))

    def _means(self, logits: Tensor) -> Tensor:
        """Returns the expected gates."""
        if self._estimator != "noisy-rectifier":
            return logits.sigmoid()
        scaled = logits / self._deviation
        density = (-scaled.square() / 2).exp() / math.sqrt(2 * math.pi)
        below: Tensor = torch.special.ndtr(scaled)
        # Positive, save for rounding where the logit is far below 0.
        return (logits * below + self._deviation * density).clamp_min(0.0)
