r"""Cross-layer coupling: confident routing in one layer should go with confidence in the next.

.. math:: L = - \frac{1}{(L-1) n} \sum_{l < L} \sum_t S^l_t S^{l+1}_t , \qquad
          S^l_t = \sum_{e \in I^l_t} p^l_{te}

The published sum over pairs of experts, one of each layer, is this product of masses: expert ids of
the two layers need not match.
"""

from torch import Tensor
from torch.distributed import ProcessGroup

from drgr._checks import check_shape
from drgr.routing.tokens import expert_probabilities, kept_and_real, shared_mean


def selected_mass(
    scores: Tensor, expert_ids: Tensor, keep: Tensor, *, valid: Tensor | None = None
) -> Tensor:
    """Returns the probability of each token's experts, before any renormalisation over them.

    Args:
        scores: Non-negative router scores of all experts, shape ``(T, E)``.
        expert_ids: Candidate experts, shape ``(T, K)``, int64.
        keep: Which candidates run, shape ``(T, K)``, bool.
        valid: Which tokens are real, shape ``(T,)``, bool.

    Returns:
        Masses ``S`` in [0, 1], shape ``(T,)``, float32 at least; 0 for padding.
    """
    runs = kept_and_real(keep, valid)
    ids = expert_ids.masked_fill(~runs, 0)
    chosen = expert_probabilities(scores, valid).gather(1, ids)
    return chosen.masked_fill(~runs, 0.0).sum(dim=1)


def layer_coupling_loss(
    masses: Tensor, *, valid: Tensor | None = None, group: ProcessGroup | None = None
) -> Tensor:
    """Rewards tokens whose experts carry much probability in two adjacent layers.

    Args:
        masses: :func:`selected_mass` of each layer in order, shape ``(L, T)``.
        valid: Which tokens are real, shape ``(T,)``, bool.
        group: Processes that share the batch.

    Returns:
        Scalar in [-1, 0], the same on every process; 0 for fewer than two layers.

    Raises:
        ValueError: If ``masses`` is not a matrix.

    Gradients:
        To both layers of a pair, as of :func:`drgr.routing.tokens.shared_ratio` over processes.

    Notes:
        It pulls against balance: a large coefficient makes routers collapse. With weights that are
        renormalised over the selected experts it would be constant.

    References:
        Hu et al., *Synergistic Intra- and Cross-Layer Regularization Losses*, 2026
        (arXiv:2602.14159), equation 7; the form as a product is derived.
    """
    check_shape("masses", masses, (None, None))
    if masses.shape[0] < 2:
        return masses.new_zeros(())
    products = (masses[:-1] * masses[1:]).mean(dim=0)
    return -shared_mean(products, valid, group)
