"""Per-domain losses: summed over a batch, estimated over steps, weighted by an adversary."""

import dataclasses
import math
from collections.abc import Mapping
from typing import final

import torch
from torch import Tensor

from drgr._checks import check_shape, check_share
from drgr.ambiguity.divergence import Divergence
from drgr.ambiguity.inputs import checked_nominal
from drgr.ambiguity.spectral import Spectral
from drgr.ambiguity.worst_case import WorstCase, worst_case
from drgr.errors import CheckpointError, NonFiniteLossError


def domain_sums(
    token_losses: Tensor, domain: Tensor, num_domains: int, *, mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Sums token losses by domain.

    Sums and counts, not means: they add up over micro-batches and processes.

    Args:
        token_losses: Loss of each token in nats, floating point, shape ``(B, S)``.
        domain: Domain of each sequence, int64 in ``[0, num_domains)``, shape ``(B,)``.
        num_domains: Number of domains ``G``.
        mask: True where a token counts, bool, shape ``(B, S)``; all tokens if None. Masked losses
            may be anything, also not a number: they reach neither the sums nor the gradient.

    Returns:
        Loss sums in nats, shape ``(G,)``, float32 for half types and else the dtype of the losses;
        and token counts, int64, shape ``(G,)``.

    Raises:
        TypeError: If the dtype of an argument is wrong.
        ValueError: If a shape is wrong or ``num_domains`` is below 1.

    Gradients:
        Exact in ``token_losses``: 1 to the sum of its domain, 0 where masked.

    Examples:
        >>> import torch
        >>> losses = torch.tensor([[1.0, 2.0], [4.0, 5.0]])
        >>> mask = torch.tensor([[True, True], [True, False]])
        >>> domain_sums(losses, torch.tensor([0, 1]), 2, mask=mask)
        (tensor([3., 4.]), tensor([2, 1]))
    """
    _check_batch(token_losses, domain, num_domains, mask)
    losses = token_losses
    if losses.dtype not in (torch.float32, torch.float64):
        losses = losses.float()
    if mask is None:
        lengths = torch.full_like(domain, losses.shape[1])
    else:
        losses, lengths = losses.masked_fill(~mask, 0.0), mask.sum(dim=1)
    sums = losses.new_zeros(num_domains).index_add(0, domain, losses.sum(dim=1))
    counts = torch.zeros(num_domains, dtype=torch.int64, device=domain.device)
    return sums, counts.index_add(0, domain, lengths)


@final
class DomainLosses:
    """Running estimate of the mean token loss of each domain.

    Loss sums and token counts of a domain are decayed together, and only in steps in which the
    domain occurs; their ratio is the estimate. So it is an exponentially weighted mean over
    *tokens*: the first observation is taken whole (no bias towards a start value), a step with few
    tokens of a domain moves it little, and a domain absent from a step keeps its estimate.

    State lives on the CPU in float64: a handful of numbers, the same on every kind of device.

    Args:
        num_domains: Number of domains ``G``.
        smoothing: Decay per step in ``[0, 1)``; 0 keeps only the last observation.
        reference: Reference loss of each domain in nats, finite, shape ``(G,)``, for excess losses;
            None for absolute losses.

    Raises:
        ValueError: If an argument is out of range or of a wrong shape.

    Examples:
        >>> import torch
        >>> from drgr.ambiguity import KL
        >>> losses = DomainLosses(2, smoothing=0.5)
        >>> losses.update(torch.tensor([20.0, 6.0]), torch.tensor([10, 2]))
        >>> losses.update(torch.tensor([10.0, 0.0]), torch.tensor([10, 0]))
        >>> losses.estimate
        tensor([1.3333, 3.0000], dtype=torch.float64)
        >>> losses.weights(KL(), penalty=1.0).weights
        tensor([0.1589, 0.8411], dtype=torch.float64)
    """

    def __init__(
        self, num_domains: int, *, smoothing: float = 0.9, reference: Tensor | None = None
    ) -> None:
        _check_num_domains(num_domains)
        check_share("smoothing", smoothing)
        if reference is not None:
            check_shape("reference", reference, (num_domains,))
            _check_finite_reference(reference)
            reference = _to_state(reference)
        self._smoothing = smoothing
        self._reference = reference
        self._loss_sums = torch.zeros(num_domains, dtype=torch.float64)
        self._token_counts = torch.zeros(num_domains, dtype=torch.float64)

    @property
    def num_domains(self) -> int:
        """Number of domains ``G``."""
        return self._loss_sums.shape[0]

    @property
    def seen(self) -> Tensor:
        """Which domains have been observed, bool, shape ``(G,)``."""
        return self._token_counts > 0

    @property
    def estimate(self) -> Tensor:
        """Mean token losses in nats, float64, shape ``(G,)``; 0 for domains not in ``seen``."""
        return self._loss_sums / self._token_counts.where(self.seen, 1.0)

    @property
    def excess(self) -> Tensor:
        """``estimate`` minus the reference if there is one, shape ``(G,)``; 0 if not ``seen``."""
        if self._reference is None:
            return self.estimate
        return (self.estimate - self._reference).where(self.seen, 0.0)

    def update(self, sums: Tensor, counts: Tensor) -> None:
        """Takes in one step.

        Args:
            sums: Loss sums in nats over the step's tokens, shape ``(G,)``, already summed over
                micro-batches and processes. Detached here.
            counts: Token counts, any dtype, shape ``(G,)``; domains with 0 keep their estimate.

        Raises:
            NonFiniteLossError: If a sum is not finite; the domain's index is named.
            ValueError: If a shape is wrong, a count is negative or not finite, or a domain without
                tokens has a loss. Nothing is changed when an error is raised.
        """
        check_shape("sums", sums, (self.num_domains,))
        check_shape("counts", counts, (self.num_domains,))
        new_sums, new_counts = _to_state(sums), _to_state(counts)
        _check_step(new_sums, new_counts)
        decay = torch.ones_like(new_counts).masked_fill(new_counts > 0, self._smoothing)
        self._loss_sums = decay * self._loss_sums + new_sums
        self._token_counts = decay * self._token_counts + new_counts

    def weights(
        self,
        divergence: Divergence | Spectral,
        *,
        radius: float | None = None,
        penalty: float | None = None,
        nominal: Tensor | None = None,
    ) -> WorstCase:
        """Finds the worst case of the excess losses over the domains seen so far.

        A domain not yet seen has no loss to be judged by and keeps exactly its nominal weight. The
        seen domains share the rest: the adversary works on the nominal restricted to them, with
        the given radius or penalty, and its weights are scaled by their nominal mass. The whole
        vector is a probability vector whose divergence from the nominal is at most that of the
        seen part.

        Args:
            divergence: For instance ``KL()``.
            radius: See :func:`worst_case`.
            penalty: See :func:`worst_case`; in nats.
            nominal: Probabilities over all domains, shape ``(G,)``; uniform if None.

        Returns:
            The worst case over the seen domains, with ``weights`` of shape ``(G,)`` over all.

        Raises:
            ValueError: If no domain with nominal mass has been seen, or an argument is wrong.
        """
        seen = self.seen
        if nominal is not None:
            check_shape("nominal", nominal, (self.num_domains,))
            nominal = _to_state(nominal)
        probabilities = checked_nominal(nominal, self._loss_sums)
        seen_mass = probabilities[seen].sum()
        if not seen_mass > 0:
            raise ValueError(
                f"weights need a domain with nominal mass that was observed, got seen="
                f"{seen.nonzero().flatten().tolist()}; call update first"
            )
        result = worst_case(
            self.excess[seen],
            divergence=divergence,
            radius=radius,
            penalty=penalty,
            nominal=probabilities[seen] / seen_mass,
        )
        weights = probabilities.clone()
        weights[seen] = seen_mass * result.weights
        return dataclasses.replace(result, weights=weights)

    def state_dict(self) -> dict[str, Tensor]:
        """Returns copies of the decayed loss sums and token counts, float64, shape ``(G,)``."""
        return {
            "loss_sums": self._loss_sums.clone(),
            "token_counts": self._token_counts.clone(),
        }

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restores what :meth:`state_dict` returned, bit for bit.

        Raises:
            CheckpointError: If the entries are not those of a tracker of as many domains.
        """
        expected = self.state_dict()
        found = {name: tuple(entry.shape) for name, entry in state.items()}
        if found != {name: tuple(entry.shape) for name, entry in expected.items()}:
            raise CheckpointError(
                f"domain losses must hold {sorted(expected)} of {self.num_domains} domains, "
                f"got shapes {found}; use the checkpoint of a run with the same domains"
            )
        self._loss_sums = _to_state(state["loss_sums"]).clone()
        self._token_counts = _to_state(state["token_counts"]).clone()


def _to_state(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", torch.float64)


def _check_num_domains(num_domains: int) -> None:
    if num_domains < 1:
        raise ValueError(f"num_domains must be at least 1, got {num_domains}")


def _check_finite_reference(reference: Tensor) -> None:
    for index, loss in enumerate(reference.tolist()):
        if not math.isfinite(loss):
            raise ValueError(
                f"reference must be finite, got {loss} for domain {index}; repair the file"
            )


def _check_step(sums: Tensor, counts: Tensor) -> None:
    pairs = zip(sums.tolist(), counts.tolist(), strict=True)
    for domain, (loss_sum, count) in enumerate(pairs):
        if not math.isfinite(loss_sum):
            raise NonFiniteLossError(
                f"the loss sum of domain {domain} must be finite, got {loss_sum}; "
                "lower the learning rate or look for broken sequences of that domain"
            )
        if not (math.isfinite(count) and count >= 0):
            raise ValueError(
                f"counts must be finite and not negative, got {count} for domain {domain}"
            )
        if count == 0 and loss_sum != 0:
            raise ValueError(
                f"sums must be 0 where counts is 0, got {loss_sum} for domain {domain}; "
                "apply the same mask to losses and counts"
            )


def _check_batch(
    token_losses: Tensor, domain: Tensor, num_domains: int, mask: Tensor | None
) -> None:
    _check_num_domains(num_domains)
    if not token_losses.is_floating_point():
        raise TypeError(f"token_losses must be floating point, got {token_losses.dtype}")
    check_shape("token_losses", token_losses, (None, None))
    check_shape("domain", domain, (token_losses.shape[0],))
    if domain.dtype != torch.int64:
        raise TypeError(f"domain must be int64, got {domain.dtype}; convert it with .long()")
    if mask is not None:
        check_shape("mask", mask, tuple(token_losses.shape))
        if mask.dtype != torch.bool:
            raise TypeError(f"mask must be bool, got {mask.dtype}; compare it with 0")
