"""The adversary of a run: domain losses in, sampling and objective weights out."""

from dataclasses import dataclass
from typing import Any, final

import numpy as np
import torch
from torch import Tensor

from drgr.ambiguity import Divergence, DomainLosses, WorstCase, effective_number, is_near_one_hot


@dataclass(frozen=True, slots=True, kw_only=True)
class DomainWeights:
    """What the adversary says at one moment; shapes ``(G,)``, float64, on the CPU.

    Attributes:
        adversary: Worst-case probabilities ``q`` of the domains.
        sampling: Share of each domain in the next batches.
        objective: Factor on the loss of each token of a domain.
        gap: Duality gap of ``q`` in the unit of the losses: a bound on its error.
    """

    adversary: Tensor
    sampling: Tensor
    objective: Tensor
    gap: float

    @property
    def shares(self) -> Tensor:
        """Share of each domain in the objective: what is drawn times what it counts."""
        shares = self.sampling * self.objective
        return shares / shares.sum()

    @property
    def effective_domains(self) -> float:
        """Effective number of domains ``1 / sum q^2``."""
        return float(effective_number(self.adversary))


@final
class DomainAdversary:
    """Keeps the estimates of the domain losses and the weights that follow from them.

    Args:
        divergence: Shape of the set of distributions.
        penalty: Strength of the penalised adversary; or
        radius: Radius of the constrained one. Exactly one of the two.
        sampling: Base share of each domain in the batches, shape ``(G,)``.
        nominal: Distribution that the adversary starts from, shape ``(G,)``; None starts from its
            own previous weights, first the base.
        apply_to: ``"nothing"``, ``"objective"`` or ``"sampling"``.
        unit: Factor from nats per token to the unit in which domains are compared, shape ``(G,)``.
        smoothing: Share of the old estimate that an update keeps.
        reference: Reference losses in nats per token, shape ``(G,)``, for excess losses.
        clip_excess: Whether an excess below 0 counts as 0.
        uniform_share: Share of the uniform distribution in the weights.
    """

    def __init__(
        self,
        *,
        divergence: Divergence,
        penalty: float | None,
        radius: float | None,
        sampling: Tensor,
        nominal: Tensor | None,
        apply_to: str,
        unit: Tensor,
        smoothing: float,
        reference: Tensor | None,
        clip_excess: bool = False,
        uniform_share: float = 0.0,
    ) -> None:
        scaled = None if reference is None else reference.double() * unit
        self._losses = DomainLosses(len(sampling), smoothing=smoothing, reference=scaled)
        self._divergence = divergence
        self._penalty = penalty
        self._radius = radius
        self._base = sampling / sampling.sum()
        self._nominal = None if nominal is None else nominal / nominal.sum()
        self._apply_to = apply_to
        self.unit = unit
        self._clip_excess = clip_excess
        self._uniform_share = uniform_share
        self._mixture: Tensor | None = None
        self.weights = self._weights(self._start, gap=0.0)

    def observe(self, loss_sums: Tensor, num_tokens: Tensor) -> None:
        """Takes in loss sums in nats and token counts of all processes, shapes ``(G,)``."""
        self._losses.update(loss_sums.cpu().double() * self.unit, num_tokens)

    def refresh(self) -> DomainWeights:
        """Recomputes the weights from the estimates; without any they stay at the nominal."""
        if bool(self._losses.seen.any()):
            worst = self._worst(self._losses)
            mixed = (1 - self._uniform_share) * worst.weights
            mixed = mixed + self._uniform_share / len(self._base)
            self.weights = self._weights(mixed, gap=float(worst.gap))
        return self.weights

    def worst_case(self, losses: Tensor) -> WorstCase:
        """Returns the worst case of other losses (excess losses where there is a reference).

        In the adversary's unit, shape ``(G,)``; of all domains, seen or not.
        """
        trial = DomainLosses(len(self._base), smoothing=0.0)
        trial.update(losses, torch.ones_like(losses))
        return self._worst(trial)

    @property
    def losses(self) -> Tensor:
        """Estimated losses, excess where there is a reference, shape ``(G,)``; 0 if not seen."""
        return self._losses.excess

    def set_mixture(self, mixture: Tensor) -> None:
        """Draws batches by other shares than the base from now on, shape ``(G,)``."""
        self._mixture = mixture.clone()
        self.weights = self._weights(self.weights.adversary, gap=self.weights.gap)

    @property
    def base_sampling(self) -> Tensor:
        """Base share of each domain in the batches, shape ``(G,)``."""
        return self._base

    @property
    def worst(self) -> tuple[int, float] | None:
        """Index and estimated loss, excess where there is a reference, of the worst domain seen.

        In the adversary's unit; ``None`` before the first observation.
        """
        seen = self._losses.seen
        if not bool(seen.any()):
            return None
        estimate = self._losses.excess.masked_fill(~seen, -torch.inf)
        index = int(estimate.argmax())
        return index, float(estimate[index])

    def is_near_one_hot(self, effective: float) -> bool:
        """Whether fewer than ``effective`` domains carry the weight."""
        return bool(is_near_one_hot(self.weights.adversary, threshold=effective))

    def state_dict(self) -> dict[str, Any]:
        """Returns the estimates and the current weights."""
        return {
            "losses": self._losses.state_dict(),
            "adversary": self.weights.adversary.clone(),
            "gap": self.weights.gap,
            "mixture": None if self._mixture is None else self._mixture.clone(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores :meth:`state_dict`, bit for bit."""
        self._losses.load_state_dict(state["losses"])
        self._mixture = state["mixture"]
        self.weights = self._weights(state["adversary"], gap=state["gap"])

    @property
    def _start(self) -> Tensor:
        return self._base if self._nominal is None else self._nominal

    def _worst(self, losses: DomainLosses) -> WorstCase:
        nominal = self.weights.adversary if self._nominal is None else self._nominal
        if self._clip_excess:
            clipped = DomainLosses(len(self._base), smoothing=0.0)
            clipped.update(losses.excess.clamp_min(0.0), losses.seen.double())
            losses = clipped
        return losses.weights(
            self._divergence, radius=self._radius, penalty=self._penalty, nominal=nominal
        )

    def _weights(self, adversary: Tensor, *, gap: float) -> DomainWeights:
        drawn = self._base if self._mixture is None else self._mixture
        sampling = adversary if self._apply_to == "sampling" else drawn
        objective = torch.ones_like(self._base)
        if self._apply_to == "objective":
            # Tokens of a domain come with probability drawn; the ratio makes the expected batch
            # loss sum_d q_d l_d, and a domain that is never drawn has no token to weight.
            objective = torch.where(drawn > 0, adversary / drawn, 0.0)
        return DomainWeights(adversary=adversary, sampling=sampling, objective=objective, gap=gap)


def as_array(weights: Tensor) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Returns weights as the sampler takes them."""
    return weights.numpy().astype(np.float64)
