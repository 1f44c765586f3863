r"""Products of a vector with the second derivatives of the inner loss.

With ``g(x, y)`` the inner loss, ``H = d2g/dy2`` and ``J = d2g/dxdy``; all vectors are flat. ``H z``
and ``J z`` are the derivative of both gradients of ``g`` along ``z`` in ``y``, so each way of
differentiating gives the two at the price of one.
"""

import warnings
from collections.abc import Callable
from typing import Literal, Protocol, final

import torch
from torch import Tensor

Loss = Callable[[Tensor, Tensor], Tensor]
"""A scalar of the outer and the inner vector."""

HvpMode = Literal["double-backward", "forward-over-reverse", "central-difference"]

# Products at once keep as many copies of what one keeps: so many, or fewer if they are long.
_MOST_AT_ONCE = 64
_MOST_ENTRIES = 2**24


class SecondDerivatives(Protocol):
    """Second derivatives of the inner loss at one point."""

    def hessian(self, vector: Tensor) -> Tensor:
        """Returns ``H v``, shape ``(d_y,)``."""
        ...

    def hessian_many(self, vectors: Tensor) -> Tensor:
        """Returns ``H`` times each row, shape ``(n, d_y)``.

        Many at once where the operations of the loss allow for it, with memory for up to 64 times
        what one product needs; one by one where they do not, and with central differences.
        """
        ...

    def hessian_and_cross(self, vector: Tensor) -> tuple[Tensor, Tensor]:
        """Returns ``H v`` and ``J v``, shapes ``(d_y,)`` and ``(d_x,)``."""
        ...


def second_derivatives(
    mode: HvpMode, loss: Loss, outer: Tensor, inner: Tensor, *, retain_graph: bool = True
) -> SecondDerivatives:
    """Returns the products at a point by the given way of differentiating.

    Args:
        mode: ``"double-backward"`` is exact and the fastest where the graph fits in memory;
            ``"forward-over-reverse"`` is exact, keeps no graph and needs operations with a forward
            derivative; ``"central-difference"`` needs first derivatives only, so that fused kernels
            will do, and loses about a third of the digits.
        loss: The inner loss.
        outer: Shape ``(d_x,)``.
        inner: Shape ``(d_y,)``.
        retain_graph: Whether ``"double-backward"`` keeps the graph of the gradient between
            products, or runs the loss again for each.

    Raises:
        ValueError: If the mode is none of the three.

    Examples:
        >>> x, y = torch.ones(2), torch.tensor([1.0, 2.0])
        >>> products = second_derivatives("double-backward", lambda x, y: (x * y**3).sum(), x, y)
        >>> products.hessian(torch.ones(2))
        tensor([ 6., 12.])
    """
    if mode == "double-backward":
        outer, inner = leaf(outer), leaf(inner)

        def gradient() -> Tensor:
            with torch.enable_grad():
                value = loss(outer, inner)
                (found,) = torch.autograd.grad(value, inner, create_graph=True)
            return found

        return _DoubleBackward(outer, inner, gradient, gradient() if retain_graph else None)
    if mode == "forward-over-reverse":
        return _ForwardOverReverse(loss, outer, inner)
    if mode == "central-difference":
        return _CentralDifference(loss, outer, inner)
    raise ValueError(
        "hvp must be 'double-backward', 'forward-over-reverse' or 'central-difference', "
        f"got {mode!r}"
    )


def gradients(
    loss: Loss, outer: Tensor, inner: Tensor, *, create_graph: bool = False
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Returns the loss and its gradients in both vectors, None for one it does not depend on."""
    with torch.enable_grad():
        value = loss(outer, inner)
        if not value.requires_grad:
            return value, None, None
        by_outer, by_inner = torch.autograd.grad(
            value, (outer, inner), create_graph=create_graph, allow_unused=True
        )
    return value, by_outer, by_inner


def products_of_gradient(gradient: Tensor, outer: Tensor, inner: Tensor) -> SecondDerivatives:
    """Returns the products by double backward from a gradient in ``inner`` that has its graph.

    Args:
        gradient: Of :func:`gradients` with ``create_graph``.
        outer: The very :func:`leaf` that it was taken at.
        inner: Likewise.
    """
    return _DoubleBackward(outer, inner, lambda: gradient, gradient)


def leaf(vector: Tensor) -> Tensor:
    """Returns a copy of a vector to differentiate in."""
    return vector.detach().clone().requires_grad_()


def _in_chunks(
    vectors: Tensor, together: Callable[[Tensor], Tensor], alone: Callable[[Tensor], Tensor]
) -> Tensor:
    """Returns the images of rows, taken together where vmap can and else one by one."""
    images: list[Tensor] = []
    chunks = vectors.split(max(1, min(_MOST_AT_ONCE, _MOST_ENTRIES // vectors.shape[1])))
    try:
        with warnings.catch_warnings():
            # An operation that vmap has no rule for is repeated by vmap: right, and no faster.
            warnings.filterwarnings("ignore", message="There is a performance drop")
            for chunk in chunks:
                images.append(together(chunk))  # noqa: PERF401
    except RuntimeError:  # what is not about vmap is raised again by the first one alone
        rest = chunks[len(images) :]
        images.extend(alone(vector).unsqueeze(0) for chunk in rest for vector in chunk.unbind())
    return torch.cat(images)


@final
class _DoubleBackward:
    def __init__(
        self,
        outer: Tensor,
        inner: Tensor,
        graph: Callable[[], Tensor],
        retained: Tensor | None,
    ) -> None:
        self._outer, self._inner = outer, inner
        self._graph, self._retained = graph, retained

    def hessian(self, vector: Tensor) -> Tensor:
        (product,) = self._products(vector, (self._inner,))
        return product

    def hessian_many(self, vectors: Tensor) -> Tensor:
        return _in_chunks(vectors, self._hessian_at_once, self.hessian)

    def _hessian_at_once(self, vectors: Tensor) -> Tensor:
        gradient = self._retained if self._retained is not None else self._graph()
        if not gradient.requires_grad:
            return torch.zeros_like(vectors)

        def product(vector: Tensor) -> Tensor:
            return self._derivatives(gradient, vector, (self._inner,))[0]

        # Not is_grads_batched of autograd.grad, which loops over a product of matrix and vector.
        return torch.func.vmap(product)(vectors)

    def hessian_and_cross(self, vector: Tensor) -> tuple[Tensor, Tensor]:
        hessian, cross = self._products(vector, (self._inner, self._outer))
        return hessian, cross

    def _products(self, vector: Tensor, inputs: tuple[Tensor, ...]) -> list[Tensor]:
        gradient = self._retained if self._retained is not None else self._graph()
        if not gradient.requires_grad:  # linear in the inner parameters
            return [torch.zeros_like(point) for point in inputs]
        return self._derivatives(gradient, vector, inputs)

    def _derivatives(
        self, gradient: Tensor, vector: Tensor, inputs: tuple[Tensor, ...]
    ) -> list[Tensor]:
        found = torch.autograd.grad(
            gradient,
            inputs,
            vector,
            retain_graph=self._retained is not None,
            allow_unused=True,
        )
        return [
            torch.zeros_like(point) if product is None else product
            for product, point in zip(found, inputs, strict=True)
        ]


@final
class _ForwardOverReverse:
    def __init__(self, loss: Loss, outer: Tensor, inner: Tensor) -> None:
        self._loss, self._outer, self._inner = loss, outer.detach(), inner.detach()

    def hessian(self, vector: Tensor) -> Tensor:
        gradient = torch.func.grad(lambda inner: self._loss(self._outer, inner))
        product: Tensor = torch.func.jvp(gradient, (self._inner,), (vector,))[1]
        return product.detach()

    def hessian_many(self, vectors: Tensor) -> Tensor:
        return _in_chunks(vectors, torch.func.vmap(self.hessian), self.hessian)

    def hessian_and_cross(self, vector: Tensor) -> tuple[Tensor, Tensor]:
        both = torch.func.grad(self._loss, argnums=(0, 1))
        along: tuple[Tensor, Tensor] = torch.func.jvp(
            lambda inner: both(self._outer, inner), (self._inner,), (vector,)
        )[1]
        cross, hessian = along
        return hessian.detach(), cross.detach()


@final
class _CentralDifference:
    """``(grad g(y + h v) - grad g(y - h v)) / 2h``.

    The error is of order ``h^2`` times third derivatives plus rounding of the gradients over ``h``;
    for a smooth loss both are least, in order of magnitude, at ``|h v| = eps^(1/3) max(1, |y|)``.
    """

    def __init__(self, loss: Loss, outer: Tensor, inner: Tensor) -> None:
        self._loss, self._outer, self._inner = loss, leaf(outer), inner.detach()
        self._distance = torch.finfo(inner.dtype).eps ** (1 / 3) * inner.norm().clamp_min(1.0)

    def hessian(self, vector: Tensor) -> Tensor:
        return self.hessian_and_cross(vector)[0]

    def hessian_many(self, vectors: Tensor) -> Tensor:
        return torch.stack([self.hessian(vector) for vector in vectors.unbind()])

    def hessian_and_cross(self, vector: Tensor) -> tuple[Tensor, Tensor]:
        length = vector.norm()
        step = self._distance / torch.where(length > 0, length, 1.0)
        ahead_outer, ahead_inner = self._gradients(self._inner + step * vector)
        behind_outer, behind_inner = self._gradients(self._inner - step * vector)
        hessian = (ahead_inner - behind_inner) / (2 * step)
        return hessian, (ahead_outer - behind_outer) / (2 * step)

    def _gradients(self, inner: Tensor) -> tuple[Tensor, Tensor]:
        inner = leaf(inner)
        _, by_outer, by_inner = gradients(self._loss, self._outer, inner)
        return (
            torch.zeros_like(self._outer) if by_outer is None else by_outer,
            torch.zeros_like(inner) if by_inner is None else by_inner,
        )
