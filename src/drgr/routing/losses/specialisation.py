r"""Intra-layer specialisation: the experts of one token should compute different things.

.. math:: L = \frac{1}{N} \sum_t \sum_{e \neq v} \cos( h_{te}, h_{tv} )^2

over the ``N`` ordered pairs of experts that run for the same token, with ``h`` the activations
inside an expert, before its down-projection.
"""

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from drgr._checks import check_shape
from drgr.routing.tokens import kept_and_real, shared_ratio


def expert_specialisation_loss(
    activations: Tensor,
    keep: Tensor,
    *,
    valid: Tensor | None = None,
    group: ProcessGroup | None = None,
) -> Tensor:
    """Averages the squared cosine between the activations of a token's experts.

    Args:
        activations: Activations ``h``, gathered by token, shape ``(T, K, D)``. A sample of tokens
            will do.
        keep: Which candidates run, shape ``(T, K)``, bool.
        valid: Which tokens are real, shape ``(T,)``, bool.
        group: Processes that share the batch.

    Returns:
        Scalar in [0, 1], float32 at least, the same on every process; 0 where no token has two
        experts. An activation of zeros has cosine 0 with any other.

    Raises:
        ValueError: If shapes do not fit.

    Gradients:
        Through the activations, as of :func:`drgr.routing.tokens.shared_ratio` over processes.

    Complexity:
        O(T K^2 D) time, O(T K (K + D)) memory.

    References:
        Hu et al., *Synergistic Intra- and Cross-Layer Regularization Losses*, 2026
        (arXiv:2602.14159), equation 4. The average over all pairs that run is ours: it equals the
        average of averages where every token has ``K`` experts.
    """
    check_shape("activations", activations, (*keep.shape, None))
    runs = kept_and_real(keep, valid)
    rows = activations.to(torch.promote_types(activations.dtype, torch.float32))
    rows = torch.where(runs.unsqueeze(2), rows, 0.0)
    norms = torch.linalg.vector_norm(rows, dim=2, keepdim=True)
    units = rows / torch.where(norms > 0, norms, 1.0)
    cosines = units @ units.transpose(1, 2)
    is_self = torch.eye(keep.shape[1], dtype=torch.bool, device=keep.device)
    pairs = runs.unsqueeze(2) & runs.unsqueeze(1) & ~is_self
    total = cosines.square().masked_fill(~pairs, 0.0).sum()
    return shared_ratio(total, pairs.sum(), group)
