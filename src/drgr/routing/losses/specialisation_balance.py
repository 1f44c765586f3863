r"""Balance over the batch and decision for each token in one loss.

.. math:: L = E \sum_e f_e \bar p_e + \kappa \, \frac1n \sum_t H(p_t) , \qquad
          H(p) = - \sum_e p_e \log p_e

As printed, ``kappa`` is negative, which makes every token's probabilities flatter; the text of the
paper argues for specialised tokens, which needs a positive one. Both are allowed.

A second loss has the same aim and no counts: the negative mutual information of token and expert,

.. math:: L = - I = \frac1n \sum_t H(p_t) - H\Big( \frac1n \sum_t p_t \Big) .
"""

import math

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from drgr.routing.losses.load_balancing import load_balancing_loss
from drgr.routing.tokens import expert_probabilities, real_rows, shared_mean


def specialisation_balance_loss(
    scores: Tensor,
    expert_load: Tensor,
    *,
    entropy_coefficient: float,
    valid: Tensor | None = None,
    group: ProcessGroup | None = None,
) -> Tensor:
    """Adds a multiple of the tokens' mean entropy to the Switch loss.

    Args:
        scores: Non-negative router scores, shape ``(T, E)``.
        expert_load: Assignments per expert on this process, shape ``(E,)``.
        entropy_coefficient: The factor ``kappa``: above 0 tokens become decided, below 0 (as
            printed, ``-lambda / (alpha / E)`` in the paper's letters) they become flat.
        valid: Which tokens are real, shape ``(T,)``, bool.
        group: Processes that share the batch.

    Returns:
        Scalar, float32 at least, entropy in nats; its mean over processes is the loss of the whole
        batch. 0 where no token is real.

    Raises:
        ValueError: If ``entropy_coefficient`` is not finite.

    Gradients:
        Through probabilities, not counts.

    References:
        LoRA-Mixer, 2025 (arXiv:2507.00029), equation 5 as reported, there with ``alpha`` in place
        of our factor ``E``; the choice of sign is ours.
    """
    if not math.isfinite(entropy_coefficient):
        raise ValueError(
            f"entropy_coefficient must be finite, got {entropy_coefficient}; above 0 decides "
            f"tokens, below 0 flattens them"
        )
    balance = load_balancing_loss(real_rows(scores, valid), expert_load, valid=valid, group=group)
    entropies = _entropy(expert_probabilities(scores, valid))
    return balance + entropy_coefficient * shared_mean(entropies, valid, group)


def routing_information_loss(
    scores: Tensor, *, valid: Tensor | None = None, group: ProcessGroup | None = None
) -> Tensor:
    """Returns the negative mutual information of token and expert: balanced and specialised.

    Args:
        scores: Non-negative router scores, shape ``(T, E)``.
        valid: Which tokens are real, shape ``(T,)``, bool.
        group: Processes that share the batch.

    Returns:
        Scalar in ``[-log E, 0]`` up to rounding, in nats, the same on every process; 0 where tokens
        are all alike and where none is real.

    Gradients:
        Through both entropies, over the batch of all processes, as of
        :func:`drgr.routing.tokens.shared_ratio`.

    References:
        Derived; the information-maximisation criterion of Bridle, Heading and MacKay, NeurIPS 1991.
    """
    probabilities = expert_probabilities(scores, valid)
    columns = torch.cat([probabilities, _entropy(probabilities).unsqueeze(1)], dim=1)
    means = shared_mean(columns, valid, group)
    return means[-1] - _entropy(means[:-1])


def _entropy(probabilities: Tensor) -> Tensor:
    """Returns Shannon's entropy of each row in nats; a probability of 0 adds nothing."""
    logs = torch.where(probabilities > 0, probabilities, 1.0).log()
    return -(probabilities * logs).sum(dim=-1)
