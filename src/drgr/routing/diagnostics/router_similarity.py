r"""How alike the rows of a router are: balance losses add every token to all rows.

.. math:: \frac{1}{E (E - 1)} \sum_{i \neq j} \cos( R_i, R_j )
"""

import torch
from torch import Tensor

from drgr._checks import check_shape


@torch.no_grad()
def router_similarity(router: Tensor) -> Tensor:
    """Returns the mean cosine between two router rows.

    Args:
        router: Router rows ``R``, shape ``(E, d)``.

    Returns:
        Scalar in ``[-1 / (E - 1), 1]``, float64, detached; 0 for one expert. A row of zeros has
        cosine 0 with any other.

    Raises:
        ValueError: If ``router`` is not a matrix.

    References:
        *Routers Learn the Geometry of Their Experts*, 2026 (arXiv:2605.12476).
    """
    check_shape("router", router, (None, None))
    rows = router.double()
    norms = torch.linalg.vector_norm(rows, dim=1, keepdim=True)
    units = rows / torch.where(norms > 0, norms, 1.0)
    num_experts = rows.shape[0]
    cosines = units @ units.T
    return (cosines.sum() - cosines.diagonal().sum()) / max(num_experts * (num_experts - 1), 1)
