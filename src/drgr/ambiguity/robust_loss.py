"""The worst case over the samples of a batch, as a loss for any training loop."""

import dataclasses
from typing import final

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from drgr._checks import check_shape
from drgr.ambiguity.divergence import Divergence
from drgr.ambiguity.spectral import Spectral
from drgr.ambiguity.worst_case import WorstCase, worst_case
from drgr.collectives import gather_rows, world_size


@final
class RobustLoss(nn.Module):
    r"""Turns per-sample losses into their worst-case expectation over a set of distributions.

    With the counted samples of *all* processes as atoms,

    .. math:: \max_q \langle q, l \rangle \quad\text{or}\quad
              \max_q \langle q, l \rangle - \lambda D(q \| p)

    as in :func:`worst_case`. It replaces the mean in ``F.cross_entropy(logits, y)``; the model, the
    optimizer and the data stay as they are. There are no parameters and no state.

    The worst case of a batch is smaller than that of the population on average; see
    :class:`Multilevel` where that matters.

    Args:
        divergence: For instance ``KL()``.
        radius: ``rho >= 0``; or
        penalty: ``lam > 0``, in the unit of the losses. Exactly one of the two, neither where the
            divergence fixes its own size. Both are attributes and may be changed between steps.
        process_group: Processes that share the batch. None means the default group when one is
            initialised, else one process. All of them must call together.

    Raises:
        ValueError: If the divergence does not accept the radius or the penalty.

    Gradients:
        In the losses exactly the worst-case weights, times the number of processes: the mean over
        processes that data-parallel training takes is then the gradient of the joint worst case,
        also when processes hold different numbers of samples. ``nominal`` and ``mask`` are
        constants. A second derivative raises, see ``weights_require_grad`` of :func:`worst_case`.

    Numerics:
        As :func:`worst_case`: float64 inside; float32 results for half types, else the dtype of the
        losses. Nothing is raised when a solve misses its tolerance: the weights are feasible and
        within the reported gap of the worst case, so a step with them is a sound step. Read
        ``status`` and ``gap`` of :meth:`worst_case` where every solve must be certified.

    Complexity:
        That of the divergence over the joint batch, on every process. Several processes: one gather
        of two numbers a sample.

    Examples:
        >>> import torch
        >>> from drgr.ambiguity import KL, RobustLoss
        >>> robust = RobustLoss(KL(), penalty=1.0)
        >>> losses = torch.tensor([1.0, 2.0, 4.0], requires_grad=True)
        >>> loss = robust(losses)
        >>> loss.backward()
        >>> losses.grad
        tensor([0.0420, 0.1142, 0.8438])
    """

    def __init__(
        self,
        divergence: Divergence | Spectral,
        *,
        radius: float | None = None,
        penalty: float | None = None,
        process_group: ProcessGroup | None = None,
    ) -> None:
        super().__init__()
        worst_case(torch.zeros(2), divergence=divergence, radius=radius, penalty=penalty)
        self.divergence = divergence
        self.radius = radius
        self.penalty = penalty
        self._process_group = process_group

    def forward(
        self, losses: Tensor, nominal: Tensor | None = None, mask: Tensor | None = None
    ) -> Tensor:
        """Returns the worst-case loss of the joint batch, a scalar, the same on every process.

        Args:
            losses: Loss of each sample on this process, floating point, any shape.
            nominal: Relative nominal weight of each sample, at least 0, shape of ``losses``;
                normalised over the counted samples of all processes. Equal weights if None.
            mask: True where a sample counts, bool, shape of ``losses``; all if None. Masked losses
                may be anything, also not a number: they reach neither the value nor the gradient.

        Raises:
            TypeError: If the dtype of an argument is wrong.
            ValueError: If a shape is wrong, a counted loss is not finite, a nominal weight is
                negative or not finite, or no sample counts on any process. The index in a message
                is that among the flattened samples of all processes, in the order of ranks. Values
                of ``nominal`` and ``mask`` are checked on the CPU only.
        """
        return self.worst_case(losses, nominal, mask).value

    def worst_case(
        self, losses: Tensor, nominal: Tensor | None = None, mask: Tensor | None = None
    ) -> WorstCase:
        """Returns the worst case behind the loss: weights, multiplier, gap and status.

        Args:
            losses: As in :meth:`forward`.
            nominal: As in :meth:`forward`.
            mask: As in :meth:`forward`.

        Returns:
            That of the joint batch, with ``value`` as :meth:`forward` returns it and ``weights`` of
            this process's samples, in the shape of ``losses``, 0 where masked.
        """
        _check_samples(losses, nominal, mask)
        own, masses = _flat(losses, nominal, mask)
        rows, start = gather_rows(torch.stack([own.double(), masses], dim=1), self._process_group)
        end = start + own.shape[0]
        _check_masses(rows[:, 1])
        others = rows[:, 0].to(own.dtype)
        result = worst_case(
            torch.cat([others[:start], own, others[end:]]),
            divergence=self.divergence,
            radius=self.radius,
            penalty=self.penalty,
            nominal=rows[:, 1] / rows[:, 1].sum(),
        )
        # Averaging over processes divides the gradient again.
        value = _scale_gradient(result.value, world_size(self._process_group))
        return dataclasses.replace(
            result, value=value, weights=result.weights[start:end].reshape(losses.shape)
        )

    def extra_repr(self) -> str:
        """Returns the divergence and the size of the set for ``repr``."""
        return f"{self.divergence}, radius={self.radius}, penalty={self.penalty}"


def _scale_gradient(value: Tensor, factor: int) -> Tensor:
    """Returns the value with a first derivative that is ``factor`` times as large, and no second.

    A second one would lack the change of the weights, and the samples of other processes.
    """
    if not value.requires_grad:
        return value
    value = value.clone()

    def scaled(gradient: Tensor | None) -> Tensor | None:
        if torch.is_grad_enabled():
            raise RuntimeError(
                "a robust loss must not be differentiated twice, got create_graph=True; "
                "use worst_case with weights_require_grad=True, in one process"
            )
        return None if gradient is None else factor * gradient

    value.register_hook(scaled)
    return value


def _flat(losses: Tensor, nominal: Tensor | None, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Returns flattened losses and their masses in float64, both 0 where masked."""
    masses = torch.ones_like(losses) if nominal is None else nominal
    masses = masses.detach().double()
    if mask is not None:
        losses, masses = losses.masked_fill(~mask, 0.0), masses.masked_fill(~mask, 0.0)
    return losses.reshape(-1), masses.reshape(-1)


def _check_samples(losses: Tensor, nominal: Tensor | None, mask: Tensor | None) -> None:
    if not losses.is_floating_point():
        raise TypeError(f"losses must be floating point, got {losses.dtype}; convert them")
    if nominal is not None:
        check_shape("nominal", nominal, tuple(losses.shape))
        if not nominal.is_floating_point():
            raise TypeError(f"nominal must be floating point, got {nominal.dtype}; convert it")
    if mask is not None:
        check_shape("mask", mask, tuple(losses.shape))
        if mask.dtype != torch.bool:
            raise TypeError(f"mask must be bool, got {mask.dtype}; compare it with 0")


def _check_masses(masses: Tensor) -> None:
    """Checks the masses of all processes, so that all of them raise together."""
    if masses.device.type != "cpu" or torch.compiler.is_compiling():
        return
    wrong = ~(masses.isfinite() & (masses >= 0))
    if bool(wrong.any()):
        index = int(wrong.nonzero()[0])
        raise ValueError(
            f"nominal must be finite and not negative, got {masses[index].item()} at index "
            f"{index}; give weights of at least 0"
        )
    if not bool((masses > 0).any()):
        raise ValueError(
            f"losses must have a counted sample with nominal weight, got none of {len(masses)}; "
            "skip this batch"
        )
