"""A loss that is one finite number, or an error that says what it is."""

from torch import Tensor

from drgr.bilevel.products import Loss
from drgr.errors import NonFiniteLossError


def checked(name: str, loss: Loss) -> Loss:
    """Returns a loss that raises unless it is one finite number."""

    def checked(outer: Tensor, inner: Tensor) -> Tensor:
        value = loss(outer, inner)
        if not (isinstance(value, Tensor) and value.is_floating_point()):
            kind = value.dtype if isinstance(value, Tensor) else type(value).__name__
            raise TypeError(f"{name}_loss must return a floating-point tensor, got {kind}")
        if value.dim() != 0:
            raise ValueError(
                f"{name}_loss must return a scalar, got shape {tuple(value.shape)}; "
                "take its mean or sum"
            )
        if not bool(value.isfinite()):
            raise NonFiniteLossError(f"{name}_loss must be finite, got {value.item()}")
        return value

    return checked
