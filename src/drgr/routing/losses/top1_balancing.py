r"""A balance loss for one expert a token, which flat probabilities do not satisfy.

.. math:: L = \frac{E \sum_e \bar p_e^2}{\frac1n \sum_t \max_e p_{te}}, \qquad
          p_t = \operatorname{softmax}(z_t / \tau), \quad \bar p_e = \frac1n \sum_t p_{te}

The Switch loss is at its minimum where *either* counts or probabilities are uniform, so it lets
counts collapse under flat probabilities. Here the numerator asks for an even soft load and the
denominator for decided tokens.
"""

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from drgr._checks import check_positive
from drgr.routing.tokens import real_rows, shared_mean


def top1_balancing_loss(
    logits: Tensor,
    *,
    temperature: float = 1.0,
    valid: Tensor | None = None,
    group: ProcessGroup | None = None,
) -> Tensor:
    """Rewards an even load of tokens that are each sure of their expert.

    Args:
        logits: Router logits ``z``, shape ``(T, E)``.
        temperature: The temperature ``tau`` above 0: the smaller, the closer the soft load is to
            that of one expert a token. No value was published.
        valid: Which tokens are real, shape ``(T,)``, bool.
        group: Processes that share the batch.

    Returns:
        Scalar, float32 at least, the same on every process: 1 where loads are even and tokens
        decided, ``E`` for one expert used or for flat probabilities; 0 where no token is real.

    Raises:
        ValueError: If ``temperature`` is not a finite number above 0.

    Gradients:
        Of numerator and denominator, over the batch of all processes, as of
        :func:`drgr.routing.tokens.shared_ratio`.

    References:
        Sigma-MoE-Tiny technical report, 2025 (arXiv:2512.16248); formula as published, the scope
        over processes and the mask are ours.
    """
    check_positive("temperature", temperature)
    probabilities = (real_rows(logits, valid) / temperature).softmax(dim=1)
    columns = torch.cat([probabilities, probabilities.amax(dim=1, keepdim=True)], dim=1)
    means = shared_mean(columns, valid, group)
    soft_load, certainty = means[:-1], means[-1]
    # Without a real token both are exactly 0; with one, the largest probability is at least 1 / E.
    safe = torch.where(certainty > 0, certainty, 1.0)
    return logits.shape[1] * soft_load.square().sum() / safe
