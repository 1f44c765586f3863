"""The price at which a greedy pass stops: between the last value kept and the first refused."""

import torch
from torch import Tensor


def price_between(ordered: Tensor, num_kept: Tensor) -> Tensor:
    """Returns the middle of the last value kept and the first refused, of the finite ``ordered``.

    With nothing kept it is the best value refused; with nothing refused, just below the worst value
    kept; without any candidate there is no price: NaN.

    Args:
        ordered: Values, greatest first, shape ``(..., N)``; ``-inf`` is no candidate.
        num_kept: How many are kept, at most the finite ones, shape ``(...)``, int64.

    Returns:
        Shape ``(...)``, dtype of the values.

    Complexity:
        O(N) for each price, no host synchronisation.

    Examples:
        >>> import torch
        >>> price_between(torch.tensor([0.75, 0.5, 0.25]), torch.tensor(1))
        tensor(0.6250)
    """
    if ordered.shape[-1] == 0:
        return ordered.new_full(ordered.shape[:-1], torch.nan)
    num_finite = torch.isfinite(ordered).sum(dim=-1)
    last = (num_finite - 1).clamp_min(0)
    places = torch.stack([(num_kept - 1).clamp_min(0), num_kept], dim=-1)
    places = places.minimum(last.unsqueeze(-1))
    kept, refused = ordered.gather(-1, places).unbind(dim=-1)
    middle = (kept + refused) / 2
    # Between neighbouring floats the middle may round up to the value kept, which must exceed it.
    middle = torch.where(middle >= kept, refused, middle)
    below = torch.nextafter(kept, torch.full_like(kept, -torch.inf))
    middle = torch.where(num_kept >= num_finite, below, middle)
    middle = torch.where(num_kept == 0, refused, middle)
    return torch.where(num_finite == 0, torch.full_like(middle, torch.nan), middle)
