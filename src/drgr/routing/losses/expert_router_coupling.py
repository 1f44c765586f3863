r"""Expert-router coupling: an expert answers its own router row most, and each row its own expert.

.. math:: L = \frac{1}{E^2} \sum_i \sum_{j \neq i} \big[ M_{ij} - \alpha M_{ii} \big]_+
              + \big[ M_{ji} - \alpha M_{ii} \big]_+ , \qquad
          M_{ij} = \big\| W_j \tilde R_i \big\|_2

A router row stands for the tokens of its cluster. Its *proxy* is the row with noise,

.. math:: \tilde R_i = R_i \odot (1 + \epsilon_i u_i), \qquad u_i \in [-1, 1]^d, \qquad
          \epsilon_i = \frac{\min_{j \neq i} \| R_i - R_j \|}{2 \| R_i \|} ,

which is never nearer to another row than to its own.
"""

import torch
from torch import Tensor

from drgr._checks import check_not_negative, check_shape


def expert_router_coupling_loss(
    router: Tensor, gates: Tensor, *, noise: Tensor | None = None, tolerance: float = 1.0
) -> Tensor:
    """Penalises experts and rows that answer others more than each other.

    It depends on parameters alone, not on tokens: take it once for each optimizer step, or divide
    it by the number of micro-batches.

    Args:
        router: Router rows ``R``, shape ``(E, d)``.
        gates: Gate projections ``W`` of the experts, as linear layers hold them, one row for each
            neuron, shape ``(E, D, d)``. Of packed weights take the half of the gate.
        noise: Numbers ``u`` in ``[-1, 1]``, shape ``(E, d)``: draw them anew each step, alike on
            every process. ``None`` puts proxies on the rows; the paper found that noise matters.
        tolerance: The share ``alpha >= 0`` of its own response that a foreign one may reach without
            a penalty: 1 is loose, 0 wants foreign responses gone.

    Returns:
        Scalar; 0 for one expert.

    Raises:
        ValueError: If shapes do not fit or ``tolerance`` is negative or not finite.

    Gradients:
        Reach router and gates. None flows through the size of the noise.

    Complexity:
        O(E^2 D d) time, O(E^2 D) memory.

    References:
        *Coupling Experts and Routers in Mixture-of-Experts via an Auxiliary Loss*, ICLR 2026
        (arXiv:2512.23447). Formula as reported; that gradients reach both sides, while the size of
        the noise is a constant, is our reading.
    """
    check_not_negative("tolerance", tolerance)
    responses = router_responses(router, gates, noise=noise)
    own = tolerance * responses.diagonal().unsqueeze(1)
    excess = (responses - own).relu() + (responses.T - own).relu()
    is_own = torch.eye(router.shape[0], dtype=torch.bool, device=router.device)
    return excess.masked_fill(is_own, 0.0).sum() / router.shape[0] ** 2


def router_responses(router: Tensor, gates: Tensor, *, noise: Tensor | None = None) -> Tensor:
    """Returns how strongly each expert answers each router row.

    Args:
        router: Router rows, shape ``(E, d)``.
        gates: Gate projections, shape ``(E, D, d)``.
        noise: As for :func:`expert_router_coupling_loss`.

    Returns:
        Responses ``M``, row ``i`` for proxy ``i`` and column ``j`` for expert ``j``, shape
        ``(E, E)``, float32 at least. Off-diagonal over diagonal entries tell how specialised a
        layer is.

    Raises:
        ValueError: If shapes do not fit.
    """
    check_shape("router", router, (None, None))
    check_shape("gates", gates, (router.shape[0], None, router.shape[1]))
    dtype = torch.promote_types(router.dtype, torch.float32)
    proxies = router.to(dtype)
    if noise is not None:
        check_shape("noise", noise, tuple(router.shape))
        spread = noise_radius(router).unsqueeze(1) * noise.detach().to(dtype)
        proxies = proxies * (1 + spread)
    answers = torch.einsum("id,jkd->ijk", proxies, gates.to(dtype))
    responses: Tensor = torch.linalg.vector_norm(answers, dim=2)
    return responses


def noise_radius(router: Tensor) -> Tensor:
    """Returns the largest relative noise that leaves each row nearest to itself.

    Args:
        router: Router rows, shape ``(E, d)``.

    Returns:
        Radii ``epsilon``, shape ``(E,)``, float32 at least, detached; 0 for a row of zeros, for a
        row that occurs twice and for a single row. It grows as rows move apart: worth watching.
    """
    rows = router.detach().to(torch.promote_types(router.dtype, torch.float32))
    if rows.shape[0] == 1:
        return rows.new_zeros(1)
    distances = torch.cdist(rows, rows, compute_mode="donot_use_mm_for_euclid_dist")
    nearest = distances.fill_diagonal_(torch.inf).amin(dim=1)
    norms = torch.linalg.vector_norm(rows, dim=1)
    return torch.where(norms > 0, nearest / (2 * torch.where(norms > 0, norms, 1.0)), 0.0)
