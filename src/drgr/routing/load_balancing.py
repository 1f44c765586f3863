"""The Switch auxiliary loss, for one layer at a time."""

from torch import Tensor
from torch.distributed import ProcessGroup

from drgr.collectives import sum_over_processes, world_size


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
        Fedus, Zoph and Shazeer, *Switch Transformers*, JMLR 2022, section 2.2.
    """
    load = sum_over_processes(expert_load, group).double()
    fraction = (load / load.sum().clamp_min(1)).to(scores.dtype)
    probabilities = scores / scores.sum(dim=1, keepdim=True).clamp_min(1e-20)
    if valid is not None:
        probabilities = probabilities * valid.unsqueeze(1)
    num_valid = expert_load.new_tensor(scores.shape[0]) if valid is None else valid.sum()
    num_valid = sum_over_processes(num_valid, group).clamp_min(1)
    mean_probability = probabilities.sum(dim=0) * world_size(group) / num_valid
    return scores.shape[1] * (fraction * mean_probability).sum()
