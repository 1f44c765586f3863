r"""Which experts each source uses: the specialisation histogram.

.. math:: h_{re} = \frac{c_{re}}{\sum_j c_{rj}}

with ``c_re`` the assignments of tokens from source ``r`` to expert ``e``.
"""

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from drgr._checks import check_shape
from drgr.collectives import sum_over_processes
from drgr.routing.tokens import kept_and_real


def source_loads(
    expert_ids: Tensor,
    keep: Tensor,
    source: Tensor,
    *,
    num_sources: int,
    num_experts: int,
    valid: Tensor | None = None,
    group: ProcessGroup | None = None,
) -> Tensor:
    """Counts the assignments from each source to each expert.

    Args:
        expert_ids: Candidate experts, shape ``(T, K)``, int64.
        keep: Which candidates run, shape ``(T, K)``, bool.
        source: Source of each token in ``[0, G)``, a domain for instance, shape ``(T,)``, int64.
        num_sources: Number of sources ``G``.
        num_experts: Number of experts ``E``.
        valid: Which tokens are real, shape ``(T,)``, bool.
        group: Processes over which to count.

    Returns:
        Counts, shape ``(G, E)``, int64.

    Raises:
        ValueError: If shapes do not fit.
    """
    check_shape("source", source, (expert_ids.shape[0],))
    runs = kept_and_real(keep, valid)
    sources = source if valid is None else source.masked_fill(~valid, 0)
    links = sources.unsqueeze(1) * num_experts + expert_ids
    counts = expert_ids.new_zeros(num_sources * num_experts)
    links = links.masked_fill(~runs, 0).reshape(-1)
    counts.scatter_add_(0, links, runs.reshape(-1).to(counts.dtype))
    return sum_over_processes(counts.view(num_sources, num_experts), group)


def specialisation_histogram(loads: Tensor) -> Tensor:
    """Returns the share of each source's assignments that each expert gets.

    Args:
        loads: :func:`source_loads`, shape ``(..., G, E)``.

    Returns:
        Shape ``(..., G, E)``, float64; rows sum to 1, those of absent sources are 0.

    References:
        Qiu et al., *Demons in the Detail*, ACL 2025, the selection frequency by domain.
    """
    counts = loads.double()
    total = counts.sum(dim=-1, keepdim=True)
    return counts / torch.where(total > 0, total, 1.0)
