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
        nominal: Distribution that the adversary starts from, shape ``(G,)``.
        apply_to: ``"nothing"``, ``"objective"`` or ``"sampling"``.
        unit: Factor from nats per token to the unit in which domains are compared, shape ``(G,)``.
        smoothing: Share of the old estimate that an update keeps.
        reference: Reference losses in nats per token, shape ``(G,)``, for excess losses.
    """

    def __init__(
        self,
        *,
        divergence: Divergence,
        penalty: float | None,
        radius: float | None,
        sampling: Tensor,
        nominal: Tensor,
        apply_to: str,
        unit: Tensor,
        smoothing: float,
        reference: Tensor | None,
    ) -> None:
        scaled = None if reference is None else reference.double() * unit
        self._losses = DomainLosses(len(sampling), smoothing=smoothing, reference=scaled)
        self._divergence = divergence
        self._penalty = penalty
        self._radius = radius
        self._base = sampling / sampling.sum()
        self._nominal = nominal / nominal.sum()
        self._apply_to = apply_to
        self._unit = unit
        self.weights = self._weights(self._nominal, gap=0.0)

    def observe(self, loss_sums: Tensor, num_tokens: Tensor) -> None:
        """Takes in loss sums in nats and token counts of all processes, shapes ``(G,)``."""
        self._losses.update(loss_sums.cpu().double() * self._unit, num_tokens)

    def refresh(self) -> DomainWeights:
        """Recomputes the weights from the estimates; without any they stay at the nominal."""
        if bool(self._losses.seen.any()):
            worst: WorstCase = self._losses.weights(
                self._divergence, radius=self._radius, penalty=self._penalty, nominal=self._nominal
            )
            self.weights = self._weights(worst.weights, gap=float(worst.gap))
        return self.weights

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
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores :meth:`state_dict`, bit for bit."""
        self._losses.load_state_dict(state["losses"])
        self.weights = self._weights(state["adversary"], gap=state["gap"])

    def _weights(self, adversary: Tensor, *, gap: float) -> DomainWeights:
        sampling = adversary if self._apply_to == "sampling" else self._base
        objective = torch.ones_like(self._base)
        if self._apply_to == "objective":
            # Tokens of a domain come with probability base; the ratio makes the expected batch
            # loss sum_d q_d l_d, and a domain that is never drawn has no token to weight.
            objective = torch.where(self._base > 0, adversary / self._base, 0.0)
        return DomainWeights(adversary=adversary, sampling=sampling, objective=objective, gap=gap)


def as_array(weights: Tensor) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Returns weights as the sampler takes them."""
    return weights.numpy().astype(np.float64)
