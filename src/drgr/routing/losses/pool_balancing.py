r"""Balance of a pool of experts that several layers share: the pool is even, layers need not be.

.. math:: L = \frac1L \sum_l M \sum_i \bar f_i P^l_i , \qquad \bar f_i = \frac1L \sum_l f^l_i

with ``f^l`` the load fractions and ``P^l`` the mean probabilities of layer ``l`` over the ``M``
experts of the pool. It equals ``M sum_i fbar_i Pbar_i``.
"""

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from drgr._checks import check_shape
from drgr.collectives import sum_over_processes
from drgr.routing.tokens import expert_probabilities, shared_mean


def pool_fractions(expert_loads: Tensor, group: ProcessGroup | None = None) -> Tensor:
    """Averages the load fractions of the layers that share a pool.

    Args:
        expert_loads: Assignments on this process of each layer to each expert, shape ``(L, M)``.
        group: Processes that share the batch.

    Returns:
        Fractions ``fbar``, shape ``(M,)``, float64, detached. Layers without an assignment are left
        out; zeros where all are.

    Raises:
        ValueError: If ``expert_loads`` is not a matrix.
    """
    check_shape("expert_loads", expert_loads, (None, None))
    loads = sum_over_processes(expert_loads, group).double()
    totals = loads.sum(dim=1, keepdim=True)
    fractions = loads / torch.where(totals > 0, totals, 1.0)
    return fractions.sum(dim=0) / (totals > 0).sum().clamp_min(1)


def pool_balancing_loss(
    scores: Tensor,
    fractions: Tensor,
    *,
    valid: Tensor | None = None,
    group: ProcessGroup | None = None,
) -> Tensor:
    """Returns one layer's term; the mean of the terms over layers is the loss of the pool.

    Terms of layers do not need each other's tensors: with the ``fractions`` of the micro-batch
    before, each layer can add its own in its forward pass, also where that is recomputed. The first
    micro-batch, with fractions of zeros, adds nothing.

    Args:
        scores: Non-negative router scores of one layer, shape ``(T, M)``; each row is divided by
            its sum.
        fractions: :func:`pool_fractions`, shape ``(M,)``, the same on every process.
        valid: Which tokens are real, shape ``(T,)``, bool.
        group: Processes that share the batch.

    Returns:
        Scalar, float32 at least, the same on every process.

    Raises:
        ValueError: If shapes do not fit.

    Gradients:
        Through ``P`` only, as of :func:`drgr.routing.tokens.shared_ratio` over processes.

    References:
        UniPool, 2026 (arXiv:2605.06665). There its scores enter as they are; divided by their sum,
        the loss is 1 at balance whatever the router.
    """
    check_shape("fractions", fractions, (scores.shape[1],))
    means = shared_mean(expert_probabilities(scores, valid), valid, group)
    return scores.shape[1] * (fractions.detach().to(means.dtype) * means).sum()
