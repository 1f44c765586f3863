r"""What drawn gates answer for, where a scorer learns from the value of the loss.

The gates of a sequence ``b`` answer for its part of the step's loss, over ``N`` tokens a step, and
for the weighted routing losses ``A`` of its micro-batch,

.. math:: L_b = \frac1N \sum_{t \in b} w_{d(b)} f_t \ell_t + A ,

where every token is routed by itself: no draw then reaches the token losses of another sequence, so
that leaving those out costs no bias and much variance. Where sequences share a budget, all gates
answer for the sum over the sequences of the micro-batch, on all processes.
"""

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from drgr.collectives import sum_over_processes, world_size
from drgr.integrations.transformers import Attachment
from drgr.routing import LayerRouting


def surrogate_loss(
    attachment: Attachment,
    records: list[LayerRouting],
    weighted: Tensor,
    auxiliary: Tensor,
    *,
    alone: bool,
    group: ProcessGroup | None,
) -> Tensor | float:
    """Returns what to add to this process's part of the objective, 0 where no scorer needs it.

    Args:
        attachment: The attachment of the model.
        records: Those of the training pass.
        weighted: See :func:`drawn_losses`, as for the rest.
        auxiliary: The same.
        alone: The same.
        group: The same.

    Returns:
        The sum over layers. Its value means nothing; its gradient, summed over processes, estimates
        that of the step's loss in expectation over the draws.
    """
    if not attachment.needs_losses:
        return 0.0
    losses = drawn_losses(weighted, auxiliary, alone=alone, group=group)
    return torch.stack(attachment.surrogates(records, losses)).sum()


def drawn_losses(
    weighted: Tensor,
    auxiliary: Tensor,
    *,
    alone: bool,
    group: ProcessGroup | None,
) -> Tensor:
    """Returns what each token's gates answer for, for ``Attachment.surrogates``.

    Args:
        weighted: Token losses as they stand in the step's objective, weights and ``1 / N``
            included, shape ``(B, S)``.
        auxiliary: The weighted routing losses of this process, scalar; their mean over processes
            is in the step's loss.
        alone: Whether every token is routed by itself.
        group: Processes that share the batch.

    Returns:
        Shape ``(B S,)`` where tokens are routed by themselves, else a scalar; detached.
    """
    own = weighted.detach().sum(dim=1)
    shared = auxiliary.detach() / world_size(group)
    if alone:
        return (own + sum_over_processes(shared, group)).repeat_interleave(weighted.shape[1])
    return sum_over_processes(own.sum() + shared, group)
