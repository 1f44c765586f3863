"""Every divergence with the formulas of the literature: NumPy, SciPy and CVXPY, no package code."""

import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

import cvxpy as cp
import numpy as np
import torch
from scipy.optimize import brentq, linprog

from drgr.ambiguity import (
    KL,
    AlphaDivergence,
    Burg,
    ChiSquare,
    CressieRead,
    CVaR,
    Hellinger,
    JensenShannon,
    KLCVaR,
    Neyman,
    Spectral,
    TotalVariation,
)

Array = np.ndarray


@dataclass(frozen=True, kw_only=True)
class FDivergence:
    """``D(q||p) = sum_i p_i f(q_i / p_i)`` and what is known of ``f``.

    The generator takes arrays, or ``Decimal`` for as many digits as one likes.
    """

    generator: Callable[[Any], Any]
    at_zero: float
    conjugate: Callable[[Array], Array]
    ratio: Callable[[Array], Array] | None
    """Derivative of the conjugate; None where it jumps."""
    program: Callable[[cp.Variable, Array], cp.Expression]
    """``D(q||p)`` as a convex expression, for ``q`` that sum to 1."""
    slope_end: float = math.inf
    """Where the conjugate becomes infinite."""
    cap: float = math.inf
    """Largest ratio inside the set."""
    curvature: float = 1.0
    """``f''(1)``."""
    saturation: Callable[[float], float] | None = None
    """Largest divergence in the set if the largest loss has mass ``P`` and the others are equal."""

    def divergence(self, q: Array, p: Array) -> Array:
        """Returns ``D(q||p)`` of each row of ``q`` over the atoms with mass."""
        q, p = q[..., p > 0], p[p > 0]
        values = np.where(q > 0, self.generator(np.where(q > 0, q, p) / p), self.at_zero)
        return (p * values).sum(-1)

    def best(self, losses: Array, p: Array, **level: float) -> float:
        """Returns the value of the primal problem, by an interior point method."""
        q = cp.Variable(len(p), nonneg=True)
        constraints = [cp.sum(q) == 1]
        if self.cap < math.inf:
            constraints.append(q <= p * self.cap)
        scale = np.ptp(losses)
        objective = q @ ((losses - losses.mean()) / scale)
        if "radius" in level:
            constraints.append(self.program(q, p) <= level["radius"])
        if "penalty" in level:
            objective -= level["penalty"] / scale * self.program(q, p)
        return float(losses.mean() + scale * _solved(objective, constraints))

    def dual(self, losses: Array, p: Array, **level: float) -> float:
        """Returns the value by roots of the two optimality conditions, one inside the other."""
        assert self.ratio is not None
        if "penalty" in level:
            return self._penalized(losses, p, level["penalty"])[0]
        radius, scale = level["radius"], np.ptp(losses)

        def excess(log_penalty: float) -> float:
            return self._penalized(losses, p, math.exp(log_penalty))[1] - radius

        low, high = math.log(scale) - 12, math.log(scale) + 12
        penalty = math.exp(brentq(excess, low, high, xtol=1e-13, rtol=1e-14))
        return penalty * radius + self._penalized(losses, p, penalty)[0]

    def _penalized(self, losses: Array, p: Array, penalty: float) -> tuple[float, float]:
        depths = losses - losses.max()

        @np.errstate(over="ignore")
        def surplus(depth: float) -> float:
            return float((p * self.ratio((depths + depth) / penalty)).sum()) - 1

        deepest = -depths.min()
        if self.slope_end < math.inf:
            deepest = min(deepest, penalty * self.slope_end * (1 - 1e-15))
        depth = brentq(surplus, 0.0, deepest, xtol=1e-300, rtol=1e-15)
        slope = (depths + depth) / penalty
        conjugate = self.conjugate(slope)
        spent = (p * (slope * self.ratio(slope) - conjugate)).sum()
        return float(losses.max() - depth + penalty * (p * conjugate).sum()), float(spent)


@dataclass(frozen=True, kw_only=True)
class RankWeights:
    """``q(A) <= g(p(A))`` for all sets of atoms, with an f-divergence for a penalty if any."""

    distortion: Callable[[Array], Array]
    smoothing: FDivergence | None = None

    def best(self, losses: Array, p: Array, *, penalty: float = 0.0) -> float:
        """Returns the value of the primal problem with one constraint for each set."""
        q = cp.Variable(len(p), nonneg=True)
        members = np.array(list(itertools.product([0.0, 1.0], repeat=len(p))))[1:-1]
        inside = members @ q <= self.distortion(members @ p)
        return self._best(losses, p, penalty, q, [inside])

    def best_of_equal_masses(self, losses: Array, *, penalty: float = 0.0) -> float:
        """Returns the value for equal masses, where a set's size alone counts."""
        n = len(losses)
        q = cp.Variable(n, nonneg=True)
        largest = [
            cp.sum_largest(q, k) <= float(self.distortion(np.array(k / n))) for k in range(1, n)
        ]
        return self._best(losses, np.full(n, 1 / n), penalty, q, largest)

    def _best(self, losses, p, penalty, q, constraints) -> float:
        objective = q @ (losses - losses.mean())
        if self.smoothing is not None:
            objective -= penalty * self.smoothing.program(q, p)
        return float(losses.mean() + _solved(objective, [cp.sum(q) == 1, *constraints]))

    def vertices(self, p: Array) -> Iterator[Array]:
        """Yields the extreme points of the set: one for each order of the atoms."""
        for order in itertools.permutations(range(len(p))):
            index = np.array(order)
            sums = self.distortion(np.concatenate([[0.0], p[index].cumsum().clip(max=1.0)]))
            q = np.empty(len(p))
            q[index] = np.diff(sums)
            yield q

    def by_rank(self, losses: Array, p: Array) -> Array:
        """Returns the plain weights of distinct losses, by sorting."""
        index = np.argsort(-losses)
        sums = self.distortion(np.concatenate([[0.0], p[index].cumsum().clip(max=1.0)]))
        q = np.empty(len(p))
        q[index] = np.diff(sums)
        return q


@dataclass(frozen=True)
class Case:
    """A divergence of the package, its oracle, and the sizes that it takes."""

    name: str
    divergence: Any
    exact: Any
    modes: tuple[str, ...]

    @property
    def is_smooth(self) -> bool:
        """Whether its weights have derivatives."""
        return isinstance(self.exact, FDivergence) and self.exact.ratio is not None

    @property
    def curvature(self) -> float:
        """``f''(1)``, by which to scale a radius that means the same for all."""
        return self.exact.curvature if isinstance(self.exact, FDivergence) else 1.0

    @property
    def is_spectral(self) -> bool:
        """Whether weights go by rank."""
        return isinstance(self.exact, RankWeights)

    @property
    def is_strictly_convex(self) -> bool:
        """Whether the generator is: then worst cases are unique and any mass can move."""
        return self.is_smooth and self.exact.cap == math.inf


@dataclass(frozen=True)
class Sized:
    """A case with one of the sizes that it takes."""

    case: Case
    mode: str

    @property
    def name(self) -> str:
        """The name of the case, with the mode."""
        return f"{self.case.name}-{self.mode}" if self.mode else self.case.name

    def level(self, *, radius: Any, penalty: Any) -> dict[str, Any]:
        """Returns the keyword that gives the size, of the two numbers the one that fits."""
        given = {"radius": radius, "penalty": penalty}
        return {self.mode: given[self.mode]} if self.mode else {}


def tail_mean(losses: Array, p: Array, level: float) -> float:
    """Returns CVaR as the linear program over ``0 <= q <= p / level``."""
    found = linprog(
        -losses, A_eq=np.ones((1, len(p))), b_eq=[1.0], bounds=[(0.0, m / level) for m in p]
    )
    assert found.status == 0
    return float(-found.fun)


def _solved(objective: cp.Expression, constraints: list[cp.Constraint]) -> float:
    problem = cp.Problem(cp.Maximize(objective), constraints)
    problem.solve(solver=cp.CLARABEL)
    assert problem.status == cp.OPTIMAL
    return float(problem.value)


def _log(x: Any) -> Any:
    return x.ln() if isinstance(x, Decimal) else np.log(x)


def _number(like: Any, value: float) -> Any:
    return Decimal(value) if isinstance(like, Decimal) else value


def cressie_read(order: float) -> FDivergence:
    """Cressie-Read of an order other than 0 and 1."""
    shift = order - 1

    def generator(r: Any) -> Any:
        k = _number(r, order)
        return (r**k - k * r + k - 1) / (k * (k - 1))

    def base(s: Array) -> Array:
        return np.maximum(1 + shift * s, 0.0)

    def saturation(mass: float) -> float:
        return (mass**-shift - 1) / (order * shift) if order > 0 else math.inf

    def program(q: cp.Variable, p: Array) -> cp.Expression:
        return (p @ cp.power(q / p, order, approx=False) - 1) / (order * shift)

    return FDivergence(
        generator=generator,
        at_zero=1 / order if order > 0 else math.inf,
        conjugate=lambda s: (base(s) ** (order / shift) - 1) / order,
        ratio=lambda s: base(s) ** (1 / shift),
        program=program,
        slope_end=math.inf if shift > 0 else -1 / shift,
        saturation=saturation,
    )


KULLBACK_LEIBLER = FDivergence(
    generator=lambda r: r * _log(r) - r + 1,
    at_zero=1.0,
    conjugate=np.expm1,
    ratio=np.exp,
    program=lambda q, p: cp.sum(cp.kl_div(q, p)),
    saturation=lambda mass: -math.log(mass),
)
_CHI_SQUARE = FDivergence(
    generator=lambda r: (r - 1) ** 2 / 2,
    at_zero=0.5,
    conjugate=lambda s: (np.maximum(1 + s, 0) ** 2 - 1) / 2,
    ratio=lambda s: np.maximum(1 + s, 0),
    program=lambda q, p: cp.sum_squares((q - p) / np.sqrt(p)) / 2,
    saturation=lambda mass: (1 / mass - 1) / 2,
)
_BURG = FDivergence(
    generator=lambda r: -_log(r) + r - 1,
    at_zero=math.inf,
    conjugate=lambda s: -np.log(1 - s),
    ratio=lambda s: 1 / (1 - s),
    program=lambda q, p: cp.sum(cp.rel_entr(p, q)),
    slope_end=1.0,
    saturation=lambda _mass: math.inf,
)
_HELLINGER = FDivergence(
    generator=lambda r: (r ** _number(r, 0.5) - 1) ** 2 / 2,
    at_zero=0.5,
    conjugate=lambda s: s / (1 - 2 * s),
    ratio=lambda s: (1 - 2 * s) ** -2.0,
    program=lambda q, p: 1 - np.sqrt(p) @ cp.sqrt(q),
    slope_end=0.5,
    curvature=0.25,
    saturation=lambda mass: 1 - math.sqrt(mass),
)
_NEYMAN = FDivergence(
    generator=lambda r: (r - 1) ** 2 / (2 * r),
    at_zero=math.inf,
    conjugate=lambda s: 1 - np.sqrt(1 - 2 * s),
    ratio=lambda s: 1 / np.sqrt(1 - 2 * s),
    program=lambda q, p: (p @ cp.inv_pos(q / p) - 1) / 2,
    slope_end=0.5,
    saturation=lambda _mass: math.inf,
)
_JENSEN_SHANNON = FDivergence(
    generator=lambda r: (r * _log(r) - (1 + r) * _log((1 + r) / 2)) / 2,
    at_zero=math.log(2) / 2,
    conjugate=lambda s: -np.log(2 - np.exp(2 * s)) / 2,
    ratio=lambda s: np.exp(2 * s) / (2 - np.exp(2 * s)),
    program=lambda q, p: cp.sum(cp.rel_entr(q, (p + q) / 2) + cp.rel_entr(p, (p + q) / 2)) / 2,
    slope_end=math.log(2) / 2,
    curvature=0.25,
    saturation=lambda mass: (
        math.log(2) + (mass * math.log(mass) - (1 + mass) * math.log1p(mass)) / 2
    ),
)
_TOTAL_VARIATION = FDivergence(
    generator=lambda r: abs(r - 1) / 2,
    at_zero=0.5,
    conjugate=lambda s: np.where(s > 0.5, np.inf, np.maximum(s, -0.5)),
    ratio=None,
    program=lambda q, p: cp.norm1(q - p) / 2,
    slope_end=0.5,
    saturation=lambda mass: 1 - mass,
)


def _capped_kl(level: float) -> FDivergence:
    corner = -math.log(level)

    def saturation(mass: float) -> float:
        if mass >= level:
            return -math.log(mass)
        rest = (1 - mass / level) / (1 - mass)
        return mass / level * corner + (1 - mass) * rest * math.log(rest)

    return FDivergence(
        generator=KULLBACK_LEIBLER.generator,
        at_zero=1.0,
        conjugate=lambda s: np.where(
            s <= corner, np.expm1(np.minimum(s, corner)), (1 + s - corner) / level - 1
        ),
        ratio=lambda s: np.exp(np.minimum(s, corner)),
        program=KULLBACK_LEIBLER.program,
        cap=1 / level,
        saturation=saturation,
    )


def _tail(level: float) -> FDivergence:
    return FDivergence(
        generator=lambda r: 0 * r,
        at_zero=0.0,
        conjugate=lambda s: np.maximum(s, 0) / level,
        ratio=None,
        program=lambda _q, _p: cp.Constant(0.0),
        cap=1 / level,
    )


_SPECTRUM = (0.05, 0.1, 0.15, 0.3, 0.4)


def _spectrum_sum(mass: Array) -> Array:
    steps = np.linspace(0, 1, len(_SPECTRUM) + 1)
    return np.interp(mass, steps, np.concatenate([[0.0], np.cumsum(_SPECTRUM[::-1])]))


def _extremile(mass: Array) -> Array:
    return 1 - (1 - mass) ** 3


def _decaying(mass: Array) -> Array:
    return (1 - np.exp(-4 * mass)) / (1 - np.exp(-4.0))


_BOTH = ("radius", "penalty")

CASES = (
    Case("kl", KL(), KULLBACK_LEIBLER, _BOTH),
    Case("chi_square", ChiSquare(), _CHI_SQUARE, _BOTH),
    Case("cressie_read_3", CressieRead(3.0), cressie_read(3.0), _BOTH),
    Case("cressie_read_1.5", CressieRead(1.5), cressie_read(1.5), _BOTH),
    Case("cressie_read_0.3", CressieRead(0.3), cressie_read(0.3), _BOTH),
    Case("cressie_read_-2", CressieRead(-2.0), cressie_read(-2.0), _BOTH),
    Case("alpha_0.4", AlphaDivergence(0.4), cressie_read(0.7), _BOTH),
    Case("burg", Burg(), _BURG, _BOTH),
    Case("hellinger", Hellinger(), _HELLINGER, _BOTH),
    Case("neyman", Neyman(), _NEYMAN, _BOTH),
    Case("jensen_shannon", JensenShannon(), _JENSEN_SHANNON, _BOTH),
    Case("total_variation", TotalVariation(), _TOTAL_VARIATION, _BOTH),
    Case("kl_cvar", KLCVaR(0.25), _capped_kl(0.25), _BOTH),
    Case("cvar", CVaR(0.3), _tail(0.3), ()),
    Case("extremile", Spectral.extremile(3.0), RankWeights(distortion=_extremile), ()),
    Case("exponential", Spectral.exponential(4.0), RankWeights(distortion=_decaying), ()),
    Case(
        "steps",
        Spectral.from_weights(torch.tensor(_SPECTRUM, dtype=torch.float64)),
        RankWeights(distortion=_spectrum_sum),
        (),
    ),
    Case(
        "extremile_kl",
        Spectral.extremile(3.0, KL()),
        RankWeights(distortion=_extremile, smoothing=KULLBACK_LEIBLER),
        ("penalty",),
    ),
    Case(
        "steps_chi_square",
        Spectral.from_weights(torch.tensor(_SPECTRUM, dtype=torch.float64), ChiSquare()),
        RankWeights(distortion=_spectrum_sum, smoothing=_CHI_SQUARE),
        ("penalty",),
    ),
)

SIZED = tuple(Sized(case, mode) for case in CASES for mode in case.modes or ("",))
