r"""The Switch auxiliary loss, for one layer at a time, at three scopes.

.. math:: L = E \sum_e f_e P_e

The scopes differ in the tokens over which the load fractions ``f`` are counted: one sequence, one
micro-batch of one process, or the batch of all processes and micro-batches. The wider the scope,
the freer a sequence is to use the experts that suit it.
"""

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from drgr.collectives import sum_over_processes
from drgr.routing.tokens import by_sequence, expert_probabilities, kept_and_real, shared_mean


def load_balancing_loss(
    scores: Tensor,
    expert_load: Tensor,
    *,
    valid: Tensor | None = None,
    group: ProcessGroup | None = None,
) -> Tensor:
    r"""Rewards a router for giving less probability to experts that already have more tokens.

    .. math:: L = E \sum_e f_e P_e, \qquad f_e = \frac{c_e}{\sum_j c_j}, \qquad
              P_e = \frac{1}{n} \sum_t \frac{s_{te}}{\sum_j s_{tj}} ,

    with counts ``c`` and the number of valid tokens ``n`` summed over all processes. It is 1 for
    uniform ``f`` or uniform ``P``. Pooling layers would hide a layer that collapsed onto one expert
    behind another that collapsed onto the opposite one, so there is one loss for each layer.

    Args:
        scores: Non-negative router scores, shape ``(T, E)``.
        expert_load: Assignments per expert on this process, shape ``(E,)``; under gradient
            accumulation the counts of the step so far.
        valid: Which tokens are real, shape ``(T,)``, bool.
        group: Processes that share the batch.

    Returns:
        Scalar. Its mean over processes, as data-parallel training takes it, is the loss of the
        whole batch, also when processes hold different numbers of valid tokens.

    Gradients:
        Through ``P`` only; the counts are piecewise constant.

    References:
        Fedus, Zoph and Shazeer, *Switch Transformers*, JMLR 2022, section 2.2; the global scope and
        the counts of the step so far: Qiu et al., *Demons in the Detail*, ACL 2025.
    """
    probabilities = expert_probabilities(scores, valid)
    mean_probability = shared_mean(probabilities, valid, group)
    fraction = _fractions(sum_over_processes(expert_load, group)).to(mean_probability.dtype)
    return scores.shape[1] * (fraction * mean_probability).sum()


def micro_balancing_loss(
    scores: Tensor, expert_load: Tensor, *, valid: Tensor | None = None
) -> Tensor:
    r"""The loss of one micro-batch of one process: nothing is communicated.

    .. math:: L = E \sum_e f_e P_e

    with ``f`` and ``P`` of this process's tokens alone. The mean over processes weighs each process
    alike, whatever its number of tokens.

    Args:
        scores: Non-negative router scores, shape ``(T, E)``.
        expert_load: Assignments per expert in this micro-batch, shape ``(E,)``.
        valid: Which tokens are real, shape ``(T,)``, bool.

    Returns:
        Scalar, float32 at least; 0 where no token is real.

    Gradients:
        Through ``P`` only.

    References:
        Fedus, Zoph and Shazeer, *Switch Transformers*, JMLR 2022, section 2.2; named ``LBL_micro``
        by Qiu et al., *Demons in the Detail*, ACL 2025.
    """
    probabilities = expert_probabilities(scores, valid)
    fraction = _fractions(expert_load).to(probabilities.dtype)
    if valid is None:
        num_valid = probabilities.new_tensor(scores.shape[0])
    else:
        probabilities = probabilities * valid.unsqueeze(1)
        num_valid = valid.sum()
    mean_probability = probabilities.sum(dim=0) / num_valid.clamp_min(1)
    return scores.shape[1] * (fraction * mean_probability).sum()


def sequence_balancing_loss(
    scores: Tensor,
    expert_ids: Tensor,
    keep: Tensor,
    *,
    sequence_length: int,
    valid: Tensor | None = None,
    group: ProcessGroup | None = None,
) -> Tensor:
    r"""The mean over sequences of each sequence's own loss: no sequence may favour an expert.

    .. math:: L = \frac1B \sum_b E \sum_e f^b_e P^b_e

    with ``f^b`` and ``P^b`` of the real tokens of sequence ``b``, over the ``B`` sequences that
    have one.

    Args:
        scores: Non-negative router scores, shape ``(T, E)``.
        expert_ids: Candidate experts, shape ``(T, K)``, int64.
        keep: Which candidates run, shape ``(T, K)``, bool.
        sequence_length: Tokens of each sequence, padding included.
        valid: Which tokens are real, shape ``(T,)``, bool.
        group: Processes over which to average; each sequence weighs the same.

    Returns:
        Scalar, float32 at least, the same on every process; 0 where no token is real.

    Raises:
        ValueError: If ``sequence_length`` does not divide the number of tokens.

    Gradients:
        Through ``P`` only, as of :func:`drgr.routing.tokens.shared_ratio` over processes.

    References:
        DeepSeek-AI, *DeepSeek-V3 Technical Report*, 2024, equations 17 to 20. There ``f`` divides
        by ``K T``; here by the assignments that ran, the same where every token has ``K``.
    """
    probabilities = by_sequence(expert_probabilities(scores, valid), sequence_length)
    is_real = scores.new_ones(scores.shape[0], dtype=torch.bool) if valid is None else valid
    is_real = by_sequence(is_real, sequence_length)
    runs = kept_and_real(keep, valid)
    # What does not run may carry an id beyond the experts.
    ids = by_sequence(expert_ids.masked_fill(~runs, 0), sequence_length).flatten(1)
    load = ids.new_zeros(ids.shape[0], scores.shape[1])
    load.scatter_add_(1, ids, by_sequence(runs, sequence_length).flatten(1).to(load.dtype))
    fraction = _fractions(load).to(probabilities.dtype)
    num_real = is_real.sum(dim=1)
    total = torch.where(is_real.unsqueeze(2), probabilities, 0.0).sum(dim=1)
    mean_probability = total / num_real.clamp_min(1).unsqueeze(1)
    losses = scores.shape[1] * (fraction * mean_probability).sum(dim=1)
    return shared_mean(losses, num_real > 0, group)


def _fractions(load: Tensor) -> Tensor:
    """Returns ``c_e / sum(c)`` in float64; 0 where nothing was assigned."""
    counts = load.double()
    return counts / counts.sum(dim=-1, keepdim=True).clamp_min(1)
