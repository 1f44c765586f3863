r"""How far loads are from even, batch by batch and over all batches together.

.. math:: \text{MaxVio} = \max_e \frac{c_e}{\bar c} - 1, \qquad
          \text{MinVio} = \min_e \frac{c_e}{\bar c} - 1, \qquad
          \text{AvgVio} = \frac1E \sum_e \Big| \frac{c_e}{\bar c} - 1 \Big|

*Batch* is the mean over batches of each batch's value, *global* the value of the summed counts. A
router that favours other experts in every batch is bad by the first and good by the second.
"""

from dataclasses import dataclass
from typing import final

from torch import Tensor

from drgr.routing.load import max_violation, mean_violation, min_violation


@final
@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Violations:
    """The violations of one layer or, as further dimensions, of several.

    Attributes:
        batch_max: Mean over batches of MaxVio (AvgMaxVio), shape ``(...)``, float64.
        batch_min: Mean over batches of MinVio.
        batch_mean: Mean over batches of AvgVio.
        worst_batch: The largest MaxVio of a batch (SupMaxVio).
        global_max: MaxVio of the counts of all batches.
        global_min: MinVio of the counts of all batches.
        global_mean: AvgVio of the counts of all batches.
    """

    batch_max: Tensor
    batch_min: Tensor
    batch_mean: Tensor
    worst_batch: Tensor
    global_max: Tensor
    global_min: Tensor
    global_mean: Tensor


def load_violations(loads: Tensor) -> Violations:
    """Measures loads of several batches.

    Args:
        loads: Assignments per expert in each batch, over all processes, shape ``(B, ..., E)`` with
            at least one batch. A batch without assignments counts as balanced.

    Returns:
        The violations, each of shape ``(...)``.

    Raises:
        ValueError: If there is no batch.

    References:
        Wang et al., *Auxiliary-Loss-Free Load Balancing*, 2024 (MaxVio of batch and global); Sun,
        *Binary-Integer-Programming Based Balancing*, 2025 (AvgMaxVio and SupMaxVio).
    """
    if loads.shape[0] == 0:
        raise ValueError("loads must hold at least one batch, got 0")
    total = loads.sum(dim=0)
    largest = max_violation(loads)
    return Violations(
        batch_max=largest.mean(dim=0),
        batch_min=min_violation(loads).mean(dim=0),
        batch_mean=mean_violation(loads).mean(dim=0),
        worst_batch=largest.amax(dim=0),
        global_max=max_violation(total),
        global_min=min_violation(total),
        global_mean=mean_violation(total),
    )
