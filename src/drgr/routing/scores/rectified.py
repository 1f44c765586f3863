"""What scores that rectify logits share: tokens without a positive logit, and ties at zero."""

import torch
from torch import Tensor


def with_fallback(scores: Tensor, logits: Tensor, factor: Tensor) -> Tensor:
    """Replaces the scores of a token without a positive logit, all 0, by a softmax.

    An expert that runs all the same, since the selection wants one, then has a weight above 0 and
    the router a gradient.

    Args:
        scores: Scores, 0 where the logit is not positive, shape ``(T, E)``.
        logits: What they are a function of, shape ``(T, E)``.
        factor: Factor of the softmax, scalar or shape ``(E,)``.
    """
    has_open = (logits > 0).any(dim=-1, keepdim=True)
    return torch.where(has_open, scores, factor * logits.softmax(dim=-1))


def ordered_worths(scores: Tensor, logits: Tensor) -> Tensor:
    """Returns the scores of positive logits and the other logits themselves, detached.

    Experts that would tie at a score of 0 are told apart, below all others.
    """
    return torch.where(logits > 0, scores, logits).detach()
