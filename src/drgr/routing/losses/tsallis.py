r"""Tsallis entropy of a router's probabilities, as a share of its largest value.

.. math:: L = \frac1n \sum_t \frac{S_q(p_t)}{S_q(1/E)}, \qquad
          S_q(p) = \frac{1 - \sum_e p_e^q}{q - 1} , \quad S_1(p) = - \sum_e p_e \log p_e

A positive coefficient makes routing decided, so it needs a balance loss beside it.
"""

import math

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from drgr._checks import check_positive
from drgr.routing.tokens import expert_probabilities, shared_mean


def tsallis_entropy_loss(
    scores: Tensor,
    *,
    order: float = 1.1,
    valid: Tensor | None = None,
    group: ProcessGroup | None = None,
) -> Tensor:
    """Averages the normalised entropy of the real tokens.

    Args:
        scores: Non-negative router scores, shape ``(T, E)``; each row is divided by its sum.
        order: The order ``q`` above 0; 1 is Shannon's entropy, 2 is Gini's impurity.
        valid: Which tokens are real, shape ``(T,)``, bool.
        group: Processes that share the batch.

    Returns:
        Scalar in [0, 1], float32 at least, the same on every process; 0 for one expert and where
        no token is real.

    Raises:
        ValueError: If ``order`` is not a finite number above 0.

    Gradients:
        As of :func:`drgr.routing.tokens.shared_ratio` over processes; 0 for a probability of 0.

    References:
        DynMoLE, 2025 (arXiv:2504.00661), published with 1e-5 added to each probability and without
        a mask of padding; both are left out here.
    """
    entropies = tsallis_entropy(expert_probabilities(scores, valid), order=order)
    return shared_mean(entropies, valid, group)


def tsallis_entropy(probabilities: Tensor, *, order: float = 1.1) -> Tensor:
    """Returns each row's entropy over that of uniform probabilities, shape ``(...)``.

    Args:
        probabilities: Rows that sum to 1, shape ``(..., E)``.
        order: The order ``q`` above 0.

    Raises:
        ValueError: If ``order`` is not a finite number above 0.

    Numerics:
        ``1 - sum p^q`` is computed as ``-sum p (p^(q-1) - 1)``, which loses no digits near
        ``q = 1``.
    """
    check_positive("order", order)
    num_experts = probabilities.shape[-1]
    if num_experts == 1:
        return 0.0 * probabilities[..., 0]
    logs = torch.where(probabilities > 0, probabilities, 1.0).log()
    if order == 1:
        return -(probabilities * logs).sum(dim=-1) / math.log(num_experts)
    largest = -math.expm1((1 - order) * math.log(num_experts))
    return -(probabilities * torch.expm1((order - 1) * logs)).sum(dim=-1) / largest
