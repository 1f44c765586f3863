r"""The router z-loss: it keeps router logits small, where rounding of the softmax is small.

.. math:: L = \frac1n \sum_t \Big( \log \sum_e \exp z_{te} \Big)^2
"""

from torch import Tensor
from torch.distributed import ProcessGroup

from drgr.routing.tokens import real_rows, shared_mean


def router_z_loss(
    logits: Tensor, *, valid: Tensor | None = None, group: ProcessGroup | None = None
) -> Tensor:
    """Averages the squared log of each token's softmax normaliser.

    Args:
        logits: Router logits ``z``, before any activation, shape ``(T, E)``.
        valid: Which tokens are real, shape ``(T,)``, bool.
        group: Processes that share the batch.

    Returns:
        Scalar, float32 at least, the same on every process; 0 where no token is real.

    Gradients:
        As of :func:`drgr.routing.tokens.shared_ratio` over processes.

    References:
        Zoph et al., *ST-MoE*, 2022, equation 5.
    """
    normaliser = real_rows(logits, valid).logsumexp(dim=1)
    return shared_mean(normaliser.square(), valid, group)
