"""Moves of the inner level in random subspaces."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol, final, get_args

import torch
from torch import Tensor

from drgr._checks import check_positive
from drgr.bilevel.single_loop.basis import Basis, RandomBasis, SignBasis
from drgr.bilevel.single_loop.estimator import Directions, Memory, Start
from drgr.bilevel.single_loop.oracle import Oracle, Point

Correction = Literal["one-sided", "probe", "independent"]
Subspaces = Literal["uniform", "signs"]


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class SubspaceSOBA:
    r"""SOBA whose moves of ``y`` and ``z`` lie in a random subspace, drawn anew every period.

    With ``P`` orthonormal and random, ``(d, r)``, and ``s = d / r``, ``E[s P P'] = I``: the inner
    optimizer trains the ``r`` coordinates of ``y``'s move on ``s P' grad_y g``, so its moments have
    ``r`` entries, and ``z`` moves along an estimate of ``s P P' (H z - grad_y F)``. How the product
    is taken:

    - ``"one-sided"``: ``s P P' (H z)``, a product with ``z`` itself; the least noise;
    - ``"probe"``: the product with ``P P' z`` within the same subspace, ``s^2 P P' H P P' z``. Its
      mean is ``a H z + b tr(H) z``, so a probe with random signs ``xi`` corrects it:
      ``(s^2 P P' H P P' z - b (xi' H xi) z) / a``;
    - ``"independent"``: ``s^2 P P' H Q Q' z`` with another subspace ``Q``, drawn each step.

    How ``P`` is drawn:

    - ``"uniform"``: over all subspaces, from normal numbers; each product draws ``d r`` of them
      again and a factor of ``r^2`` entries of float64 is kept, so ``r`` well below ``sqrt(d)``;
    - ``"signs"``: columns of random signs with disjoint supports; a product draws ``d`` bits and
      only a seed is kept, so that any ``r`` is cheap. Not with ``"probe"``, whose constants are
      those of uniform subspaces.

    All three products are unbiased over fresh subspaces of either kind. The last two need products
    along ``r`` directions only, at several times the noise; they take ``J`` along the same vector.
    This follows the idea of BROS, whose equations were not at hand: it does not claim to be that
    method.

    ``z`` keeps ``d_y`` entries, without which no method reaches ``H^-1 grad_y F`` exactly;
    :class:`GalerkinSOBA` drops them too. Within a period the subspace is fixed and the mean over
    subspaces does not apply; at its end the optimizer forgets its moments.

    Args:
        rank: ``r``, at least 1; ``d_y`` if larger.
        period: Steps with one subspace, at least 1.
        correction: How to take the product.
        subspaces: How to draw ``P``.

    Raises:
        ValueError: If an argument is out of range, or a probe is to correct subspaces of signs.

    Complexity:
        4 oracle calls a step, 5 with ``"probe"``; O(d r) random numbers for each of about six
        multiplications with ``P``, O(d) with signs. Memory ``d_y + r^2 + r + 1``, or
        ``d_y + r + 1`` with signs, and the optimizer's state of ``r``: less than :class:`SOBA`
        keeps with Adam where ``r^2`` is well below ``2 d_y``.

    References:
        Zhang, Kong, Zhang, Yuan, 2026 (BROS; the idea only).

    Examples:
        >>> SubspaceSOBA(rank=4, correction="probe")
        SubspaceSOBA(rank=4, period=1, correction='probe', subspaces='uniform')
    """

    rank: int
    period: int = 1
    correction: Correction = "one-sided"
    subspaces: Subspaces = "uniform"

    def __post_init__(self) -> None:
        check_positive("rank", self.rank)
        check_positive("period", self.period)
        if self.correction not in get_args(Correction):
            raise ValueError(
                f"correction must be one of {get_args(Correction)}, got {self.correction!r}"
            )
        check_subspaces(self.subspaces)
        if self.correction == "probe" and self.subspaces == "signs":
            raise ValueError(
                "correction 'probe' holds for subspaces 'uniform', got 'signs'; take 'one-sided' "
                "or 'independent'"
            )

    def start(self, oracle: Oracle, point: Point) -> Start:  # noqa: ARG002
        """Begins at ``z = 0`` with coordinates to train."""
        return Start(point.auxiliary, {}, num_coordinates=min(self.rank, len(point.inner)))

    def directions(
        self, oracle: Oracle, point: Point, memory: Memory, step: int
    ) -> Iterator[Directions]:
        """Yields the three directions, that of ``y`` in coordinates."""
        is_new = step % self.period == 0
        basis = next_basis(oracle, point, memory, self, is_new=is_new)
        scale = len(point.inner) / basis.rank
        product = self._product(oracle, point, basis, [oracle.draw_inner()])
        outer = oracle.outer_gradients([oracle.draw_outer()], point.outer, point.inner)
        product.hessian.sub_(basis.projected(outer.by_inner), alpha=scale)
        yield Directions(
            inner=scale * product.gradient,
            auxiliary=product.hessian,
            outer=outer.by_outer - product.cross,
            basis=basis,
            renew=is_new,
        )

    def _product(self, oracle: Oracle, point: Point, basis: Basis, inner: list[int]) -> "_Product":
        """Returns the gradient in coordinates, and estimates of ``H z`` and ``J z``."""
        scale = len(point.inner) / basis.rank
        if self.correction == "one-sided":
            along = point.auxiliary
        elif self.correction == "independent":
            along = scale * drawn_basis(oracle, point, self).projected(point.auxiliary)
        else:
            along = scale * basis.projected(point.auxiliary)
        terms = oracle.inner_terms(inner, point, along)
        hessian = basis.projected(terms.hessian).mul_(scale)
        product = _Product(basis.coordinates(terms.gradient), hessian, terms.cross)
        if self.correction != "probe":
            return product
        by_hessian, by_trace = two_sided_moments(len(point.inner), basis.rank)
        signs = _signs(oracle, point.inner)
        trace = torch.dot(signs, oracle.hessian(inner, point, signs))
        hessian.sub_(by_trace * trace * point.auxiliary).div_(by_hessian)
        return product


class _Product(NamedTuple):
    """Beyond ``hessian``, nothing of the size of ``y``."""

    gradient: Tensor
    hessian: Tensor
    cross: Tensor


def two_sided_moments(dimension: int, rank: int) -> tuple[float, float]:
    """Returns ``a`` and ``b`` of ``E[s^2 P P' H P P'] = a H + b tr(H) I`` for symmetric ``H``."""
    if rank == dimension:
        return 1.0, 0.0
    d, r = dimension, rank
    common = (d / r) ** 2 * r / (d * (d - 1) * (d + 2))
    return common * (d * r + d - 2), common * (d - r)


class Draws(Protocol):
    """What says how to draw subspaces."""

    @property
    def rank(self) -> int:
        """Dimension, at most; that of the inner parameters if larger."""
        ...

    @property
    def subspaces(self) -> Subspaces:
        """Which kind."""
        ...


def check_subspaces(subspaces: Subspaces) -> None:
    """Raises ValueError for a kind that is none."""
    if subspaces not in get_args(Subspaces):
        raise ValueError(f"subspaces must be one of {get_args(Subspaces)}, got {subspaces!r}")


def next_basis(
    oracle: Oracle, point: Point, memory: Memory, draws: Draws, *, is_new: bool
) -> Basis:
    """Returns the basis of this step and keeps what it takes to build it again."""
    if is_new:
        memory["seed"] = torch.tensor(drawn_seed(oracle))
        memory.pop("factor", None)
    seed, rank = int(memory["seed"]), min(draws.rank, len(point.inner))
    if draws.subspaces == "signs":
        return SignBasis(seed, point.inner, rank)
    basis = RandomBasis(seed, point.inner, rank, factor=memory.get("factor"))
    memory["factor"] = basis.factor
    return basis


def drawn_basis(oracle: Oracle, point: Point, draws: Draws) -> Basis:
    """Returns a basis for one step."""
    seed, rank = drawn_seed(oracle), min(draws.rank, len(point.inner))
    if draws.subspaces == "signs":
        return SignBasis(seed, point.inner, rank)
    return RandomBasis(seed, point.inner, rank)


def drawn_seed(oracle: Oracle) -> int:
    """Returns a seed for a basis."""
    device = oracle.generator.device
    return int(torch.randint(2**62, (), generator=oracle.generator, device=device))


def _signs(oracle: Oracle, like: Tensor) -> Tensor:
    device = oracle.generator.device
    bits = torch.randint(0, 2, like.shape, generator=oracle.generator, device=device)
    return (2 * bits - 1).to(like)
