"""Worst-case weights of groups of samples, for any training loop."""

from collections.abc import Mapping
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from drgr._checks import check_shape
from drgr.ambiguity.divergence import Divergence
from drgr.ambiguity.domain_losses import DomainLosses, domain_sums
from drgr.ambiguity.inputs import checked_nominal
from drgr.ambiguity.spectral import Spectral
from drgr.ambiguity.worst_case import WorstCase, worst_case
from drgr.collectives import sum_over_processes, world_size
from drgr.errors import CheckpointError


@final
class GroupLosses(nn.Module):
    r"""Trains on the worst mixture of groups: subpopulations, environments, labels, languages.

    Every group has a loss, the weighted mean over its members in a batch, and a running estimate of
    it. The adversary's weights ``q`` are those of the estimates; the objective of a batch is

    .. math:: \sum_g q_g \frac{\sum_i w_{ig} l_i}{\sum_i w_{ig}},
              \qquad q = \arg\max_{q'} \langle q', \hat l \rangle
              \ \text{s.t.}\ D(q' \| p) \le \rho

    (or with a penalty), with memberships ``w`` that may be soft and overlap. A *step* is any number
    of micro-batches on any number of processes. Weights change in :meth:`update` and nowhere else:
    all micro-batches of a step see the same. There are two orders of calls,

    - one batch a step: ``accumulate``, ``update``, then the objective. The weights know this batch;
      with ``smoothing=0`` and all groups present the gradient is exactly that of the worst case of
      the group means;
    - micro-batches: objective and ``accumulate`` for each, then ``update``. The weights are those
      of the steps before (the nominal in the first).

    A group that is absent from a step has no share in its objective and gets no gradient; its
    estimate stays, and so does its part in the weights. The other weights are not scaled up in its
    place. A group never seen keeps its nominal weight, see :meth:`DomainLosses.weights`.

    Estimates, weights and the sums of an unfinished step are the extra state of the module, float64
    whatever :meth:`to` says: ``state_dict`` carries them and a run resumes bit for bit.

    Args:
        num_groups: Number of groups ``G``.
        divergence: For instance ``KL()``.
        radius: ``rho >= 0``; or
        penalty: ``lam > 0``, in the unit of the losses. Exactly one of the two, neither where the
            divergence fixes its own size. Both are attributes and may be changed between steps.
            Group means are noisy: prefer a penalty, see :func:`worst_case`.
        nominal: Probabilities of the groups, shape ``(G,)``; uniform if None.
        smoothing: Decay per step of the estimate, in ``[0, 1)``; 0 keeps only the last step.
        reference: Loss of each group to compare with, shape ``(G,)``: the adversary sees the
            excess. It changes the weights, never the losses that are reported.
        process_group: Processes that share the batch. None means the default group when one is
            initialised, else one process. All of them must call together; ``accumulate`` alone
            does not communicate.

    Raises:
        TypeError: If ``nominal`` is not floating point.
        ValueError: If an argument is out of range or of a wrong shape.

    Examples:
        >>> import torch
        >>> from drgr.ambiguity import KL, GroupLosses
        >>> groups = GroupLosses(2, KL(), penalty=1.0)
        >>> losses = torch.tensor([1.0, 3.0, 4.0], requires_grad=True)
        >>> membership = torch.tensor([0, 0, 1])
        >>> groups.accumulate(losses, membership)
        >>> worst = groups.update()
        >>> groups.weights
        tensor([0.1192, 0.8808], dtype=torch.float64)
        >>> groups(losses, membership).backward()
        >>> losses.grad
        tensor([0.0596, 0.0596, 0.8808])
    """

    def __init__(
        self,
        num_groups: int,
        divergence: Divergence | Spectral,
        *,
        radius: float | None = None,
        penalty: float | None = None,
        nominal: Tensor | None = None,
        smoothing: float = 0.9,
        reference: Tensor | None = None,
        process_group: ProcessGroup | None = None,
    ) -> None:
        super().__init__()
        if num_groups < 1:
            raise ValueError(f"num_groups must be at least 1, got {num_groups}")
        worst_case(torch.zeros(2), divergence=divergence, radius=radius, penalty=penalty)
        if nominal is not None:
            check_shape("nominal", nominal, (num_groups,))
            nominal = nominal.detach().cpu()
        self.divergence = divergence
        self.radius = radius
        self.penalty = penalty
        self._process_group = process_group
        self._tracker = DomainLosses(num_groups, smoothing=smoothing, reference=reference)
        self._nominal = checked_nominal(nominal, torch.zeros(num_groups))
        self._weights = self._nominal
        # Row 0: sums of weighted losses of the step so far; row 1: sums of memberships.
        self._step = torch.zeros(2, num_groups, dtype=torch.float64)

    @property
    def num_groups(self) -> int:
        """Number of groups ``G``."""
        return self._tracker.num_domains

    @property
    def weights(self) -> Tensor:
        """Weights ``q`` in force, float64, shape ``(G,)``; the nominal before the first update."""
        return self._weights.clone()

    @property
    def estimate(self) -> Tensor:
        """Running group losses, float64, shape ``(G,)``; 0 for groups not in ``seen``."""
        return self._tracker.estimate

    @property
    def seen(self) -> Tensor:
        """Which groups have been observed by an update, bool, shape ``(G,)``."""
        return self._tracker.seen

    def forward(
        self, losses: Tensor, membership: Tensor, *, step_counts: Tensor | None = None
    ) -> Tensor:
        """Returns the objective of a batch, or the share of a micro-batch in that of its step.

        Nothing is recorded: call :meth:`accumulate` for that.

        Args:
            losses: Loss of each sample on this process, floating point, shape ``(N,)``.
            membership: Group of each sample, int64 in ``[0, G)``, shape ``(N,)``; or weights of the
                sample in every group, at least 0, floating point or bool, shape ``(N, G)``. Rows
                may have any sum. A sample without group (a row of 0) may have any loss: it reaches
                neither the value nor the gradient.
            step_counts: What :meth:`count` returns for the memberships of *all* micro-batches of
                the step. Then the objectives of the micro-batches add up to that of one large
                batch, however samples and groups are spread: call backward on each and divide by
                nothing. None where the batch is the step.

        Returns:
            Scalar; float32 for half types, else the dtype of the losses. Its mean over processes,
            as data-parallel training takes it, is the objective.

        Raises:
            TypeError: If the dtype of an argument is wrong.
            ValueError: If a shape or a membership is wrong, or ``step_counts`` is smaller than this
                batch; values are checked on the CPU only.

        Gradients:
            Exact in ``losses`` at fixed weights: ``q_g w_ig / sum_i w_ig``, summed over groups,
            times the number of processes. Memberships are constants.

        Complexity:
            O(N), or O(N G) for soft membership; one sum of ``G`` numbers over the processes unless
            ``step_counts`` is given. No synchronisation with an accelerator.
        """
        sums, counts = _sums(losses, membership, self.num_groups)
        if step_counts is None:
            totals = sum_over_processes(counts, self._process_group)
        else:
            totals = self._checked_counts(step_counts, counts)
        weights = self._weights.to(totals.device, non_blocking=True)
        factors = weights / totals.where(totals > 0, torch.inf)
        return world_size(self._process_group) * (factors.to(sums.dtype) * sums).sum()

    def count(self, membership: Tensor) -> Tensor:
        """Returns the size of each group over all processes, float64, shape ``(G,)``.

        Args:
            membership: As in :meth:`forward`, for all micro-batches of the step on this process.
        """
        losses = torch.zeros(len(membership), device=membership.device)
        _, counts = _sums(losses, membership, self.num_groups)
        return sum_over_processes(counts, self._process_group)

    @torch.no_grad()
    def accumulate(self, losses: Tensor, membership: Tensor) -> None:
        """Adds a micro-batch to the step; the arguments are those of :meth:`forward`, detached.

        A process without samples passes empty tensors.
        """
        sums, counts = _sums(losses, membership, self.num_groups)
        self._step = self._step.to(counts.device, non_blocking=True) + torch.stack(
            [sums.double(), counts]
        )

    def update(self) -> WorstCase:
        """Ends the step: moves the estimates and replaces the weights.

        Returns:
            The worst case of the estimates that were seen, with the new ``weights`` of all groups.
            It says whether the solver succeeded; the weights are feasible in any case.

        Raises:
            NonFiniteLossError: If the loss of a group (called domain) is not finite.
            ValueError: If no member of any group was accumulated since the last update, on any
                process.

            In both cases estimates and weights stay, and the step is dropped.
        """
        sums, counts = sum_over_processes(self._step, self._process_group).cpu()
        self._step = torch.zeros_like(self._step)
        if not bool(counts.any()):
            raise ValueError(
                "update must follow accumulate, got a step without a member of any group; "
                "call accumulate(losses, membership) first"
            )
        self._tracker.update(sums, counts)
        result = self._tracker.weights(
            self.divergence, radius=self.radius, penalty=self.penalty, nominal=self._nominal
        )
        self._weights = result.weights.clone()
        return result

    def get_extra_state(self) -> dict[str, Any]:
        """Returns estimates, weights and the step so far, for ``state_dict``."""
        return {
            "losses": self._tracker.state_dict(),
            "weights": self._weights.clone(),
            "step": self._step.cpu().clone(),
        }

    def set_extra_state(self, state: Mapping[str, Any]) -> None:
        """Restores :meth:`get_extra_state`, bit for bit.

        Raises:
            CheckpointError: If the entries are not those of a module of as many groups.
        """
        if set(state) != {"losses", "weights", "step"}:
            raise CheckpointError(
                "group losses must hold ['losses', 'step', 'weights'], "
                f"got {sorted(state)}; use the checkpoint of a GroupLosses module"
            )
        self._tracker.load_state_dict(state["losses"])
        self._weights = state["weights"].cpu().clone()
        self._step = state["step"].cpu().clone()

    def extra_repr(self) -> str:
        """Returns the number of groups, the divergence and the size of the set for ``repr``."""
        return f"{self.num_groups}, {self.divergence}, radius={self.radius}, penalty={self.penalty}"

    def _checked_counts(self, step_counts: Tensor, counts: Tensor) -> Tensor:
        check_shape("step_counts", step_counts, (self.num_groups,))
        totals = step_counts.detach().to(counts)
        # Sums in another order may differ in the last digits.
        if _can_look_at(totals) and bool((totals < counts * (1 - 1e-9)).any()):
            raise ValueError(
                f"step_counts must be at least the sizes of the groups in a micro-batch "
                f"{counts.tolist()}, got {totals.tolist()}; count the memberships of all of them"
            )
        return totals


def _sums(losses: Tensor, membership: Tensor, num_groups: int) -> tuple[Tensor, Tensor]:
    """Returns sums of weighted losses, and of memberships in float64, each of shape ``(G,)``."""
    _check_batch(losses, membership, num_groups)
    if membership.dim() == 1:
        sums, counts = domain_sums(losses.unsqueeze(1), membership, num_groups)
        return sums, counts.double()
    weights = membership.detach()
    if losses.dtype not in (torch.float32, torch.float64):
        losses = losses.float()
    losses = losses.masked_fill(~(weights > 0).any(dim=1), 0.0)
    # A product and a sum, not a matrix product: that would be rounded under autocast.
    sums = (losses.unsqueeze(1) * weights.to(losses.dtype)).sum(dim=0)
    return sums, weights.double().sum(dim=0)


def _check_batch(losses: Tensor, membership: Tensor, num_groups: int) -> None:
    check_shape("losses", losses, (None,))
    if not losses.is_floating_point():
        raise TypeError(f"losses must be floating point, got {losses.dtype}; convert them")
    if membership.dim() == 2:
        check_shape("membership", membership, (len(losses), num_groups))
        is_right = membership.dtype == torch.bool or membership.is_floating_point()
        wanted = "floating point or bool for shape (N, G)"
    else:
        check_shape("membership", membership, (len(losses),))
        is_right = membership.dtype == torch.int64
        wanted = "int64 for shape (N,)"
    if not is_right:
        raise TypeError(f"membership must be {wanted}, got {membership.dtype}; convert it")
    if _can_look_at(membership):
        _check_values(membership, num_groups)


def _check_values(membership: Tensor, num_groups: int) -> None:
    if membership.dim() == 1:
        wrong = (membership < 0) | (membership >= num_groups)
        wanted = f"lie in [0, {num_groups})"
    else:
        wrong = ~(membership.isfinite() & (membership >= 0))
        wanted = "be finite and not negative"
    if bool(wrong.any()):
        index = tuple(wrong.nonzero()[0].tolist())
        raise ValueError(
            f"membership must {wanted}, got {membership[index].item()} for sample {index[0]}"
        )


def _can_look_at(tensor: Tensor) -> bool:
    """Returns whether reading values neither waits for an accelerator nor breaks a graph."""
    return tensor.device.type == "cpu" and not torch.compiler.is_compiling()
