"""Worst-case expectation over an f-divergence ball, with its certificate and its derivatives."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.function import BackwardCFunction, FunctionCtx

from drgr.ambiguity.certificate import CertifiedSaddlePoint, certified_saddle_point
from drgr.ambiguity.divergence import Divergence, Problem, SmoothDivergence
from drgr.ambiguity.implicit import attached
from drgr.ambiguity.infinite import marked_infinite
from drgr.ambiguity.inputs import checked_level, checked_losses, checked_nominal
from drgr.ambiguity.scaling import Level, Scaling, scaled_problem
from drgr.ambiguity.spectral import Spectral
from drgr.numerics import Status


@dataclass(frozen=True, slots=True, kw_only=True)
class WorstCase:
    """Result of :func:`worst_case`; shapes are those of the losses ``(..., n)``.

    Values, thresholds, gaps and multipliers are in the unit of the losses.
    """

    value: Tensor
    """``<q, l>``, minus ``penalty * D(q||p)`` if penalised; shape ``(...)``. Differentiable."""
    weights: Tensor
    """Worst-case probabilities ``q``, shape ``(..., n)``. Detached unless asked for otherwise."""
    multiplier: Tensor
    """``lam``, shape ``(...)``. Detached.

    The penalty, or the price of the radius: 0 where the radius is slack (saturation, equal losses)
    or the set has none, ``inf`` at radius 0.
    """
    threshold: Tensor
    """``eta`` in ``q_i = p_i (f*)'((l_i - eta) / lam)``, shape ``(...)``. Detached."""
    divergence: Tensor
    """``D(q||p)``, shape ``(...)``. Detached."""
    gap: Tensor
    """Dual minus primal objective at the returned points, at least 0, shape ``(...)``. Detached."""
    status: Status
    """Whether every gap is within tolerance, and if not, why."""


def worst_case(
    losses: Tensor,
    *,
    divergence: Divergence | Spectral,
    radius: float | Tensor | None = None,
    penalty: float | Tensor | None = None,
    nominal: Tensor | None = None,
    weights_require_grad: bool = False,
    allow_infinite: bool = False,
) -> WorstCase:
    r"""Finds the distribution near ``nominal`` under which the expected loss is largest.

    With ``D`` the divergence, ``p`` the nominal and ``q`` in the simplex, one of

    .. math::
        \max_q \langle q, l \rangle \ \text{s.t.}\ D(q \| p) \le \rho
        \qquad\text{or}\qquad
        \max_q \langle q, l \rangle - \lambda D(q \| p)

    is solved exactly for every leading index. The constrained weights do not depend on the scale
    of the losses, so they turn noise between near-equal losses into full-strength weights; the
    penalised ones fade to ``p``. Prefer a penalty for estimated losses.

    Args:
        losses: Finite losses of any sign, shape ``(..., n)``.
        divergence: For instance ``KL()`` or ``CVaR(0.1)``; its docstring states the normalisation
            and whether it takes a radius or penalty.
        radius: ``rho >= 0``, a number or a tensor that broadcasts to ``(...)``. At or above the
            saturation radius the weights are the nominal restricted to the largest loss.
        penalty: ``lam > 0``, in the unit of the losses; same shapes as ``radius``. Exactly one of
            radius and penalty must be given.
        nominal: Probabilities, shape ``(n,)`` or broadcasting to that of ``losses``; uniform if
            None. Renormalised when within 1e-4 of summing to 1. Atoms without nominal mass are
            dropped and get no weight, also where ``f`` grows so slowly (Burg, Hellinger, Neyman,
            Jensen-Shannon, total variation) that a mathematical supremum would move mass to them.
        weights_require_grad: Whether the weights carry derivatives, and value and weights such of
            higher order. For divergences whose weights are smooth (:class:`SmoothDivergence`).
        allow_infinite: Whether losses may be ``inf``. The value is then ``inf``, and the weights
            are the limit as these losses grow together; ``multiplier``, ``threshold`` and ``gap``
            speak of a finite problem with these weights.

    Returns:
        The worst case. ``gap`` bounds the error of the value: weights are feasible to rounding, and
        any dual point bounds the true value from above.

    Raises:
        TypeError: If losses or nominal are not floating-point tensors.
        ValueError: If a shape, a probability or the level is wrong, if losses are not finite (the
            index is named), unless exactly one of radius and penalty is given (none for sets that
            fix their size), or if weights without derivatives are asked for theirs.

    Gradients:
        Of the value, by Danskin's theorem: in losses exactly ``weights``; in radius the multiplier
        (``inf`` at radius 0); in penalty ``-D(q||p)``; in nominal ``lam f*((l - eta) / lam)``
        through its normalisation (0 at atoms without mass). A second derivative raises, unless
        ``weights_require_grad``: then value and weights have derivatives to third order by the
        implicit function theorem, exact where the active set does not change.

    Numerics:
        Computed in float64 for every input dtype. The result has the dtype of the losses, float32
        for half types. The gap is that of the float64 solution, relative to the range of the
        losses below 1e-9 when ``status`` is CONVERGED; float32 results add one rounding.

    Complexity:
        That of the divergence, plus O(n) per problem for scaling, certificate and gradients.

    Examples:
        >>> import torch
        >>> from drgr.ambiguity import KL, worst_case
        >>> result = worst_case(torch.tensor([1.0, 2.0, 4.0]), divergence=KL(), penalty=1.0)
        >>> result.weights
        tensor([0.0420, 0.1142, 0.8438])
    """
    losses = checked_losses(losses, allow_infinite=allow_infinite)
    if weights_require_grad and not isinstance(divergence, SmoothDivergence):
        raise ValueError(
            f"weights_require_grad needs weights that are smooth in the losses, got {divergence}; "
            "detach them, or take KLCVaR, KL or ChiSquare"
        )
    probabilities = checked_nominal(nominal, losses)
    level = checked_level(divergence, losses, radius, penalty)
    num_atoms = losses.shape[-1]
    flat = losses.double().reshape(-1, num_atoms)
    mass = probabilities.reshape(-1, num_atoms)
    size = Level(kind=level.kind, value=level.value.reshape(-1))
    if allow_infinite:
        flat, size, is_infinite = marked_infinite(flat, mass, size, divergence)
    with torch.no_grad():
        problem, scaling = scaled_problem(flat, mass, is_uniform=nominal is None)
        found = _solved(divergence, problem, size.detached().scaled(scaling))
    if weights_require_grad and isinstance(divergence, SmoothDivergence):
        graph = Problem(
            losses=_within(scaling, flat, problem),
            nominal=mass,
            has_empty_atoms=problem.has_empty_atoms,
        )
        smooth = attached(divergence, graph, size.scaled(scaling), found)
        value, weights = scaling.levels(smooth.objective), smooth.weights
    else:
        value = _differentiable_value(flat, mass, size, scaling, found)
        weights = found.weights
    if allow_infinite:
        value = value.masked_fill(is_infinite, torch.inf)
    multiplier = scaling.differences(found.multiplier)
    if level.kind == "penalty":
        given = level.value.detach().reshape(-1)
        multiplier = given if divergence.has_level else torch.zeros_like(given)
    shape = losses.shape[:-1]
    return WorstCase(
        value=value.reshape(shape).to(losses.dtype),
        weights=weights.reshape(losses.shape).to(losses.dtype),
        multiplier=multiplier.reshape(shape).to(losses.dtype),
        threshold=scaling.levels(found.threshold).reshape(shape).to(losses.dtype),
        divergence=found.divergence.reshape(shape).to(losses.dtype),
        gap=scaling.differences(found.gap).reshape(shape).to(losses.dtype),
        status=found.status,
    )


def _solved(
    divergence: Divergence | Spectral, problem: Problem, level: Level
) -> CertifiedSaddlePoint:
    if isinstance(divergence, Spectral):
        return divergence.certified(problem, level.value)
    return certified_saddle_point(divergence, problem, level)


def _within(scaling: Scaling, losses: Tensor, problem: Problem) -> Tensor:
    """Returns the scaled losses as a function of the losses, hidden ones constant."""
    scaled = (losses - scaling.top.unsqueeze(-1)) / scaling.scale.unsqueeze(-1)
    return torch.where(problem.nominal > 0, scaled, problem.losses)


def _differentiable_value(
    losses: Tensor, nominal: Tensor, level: Level, scaling: Scaling, found: CertifiedSaddlePoint
) -> Tensor:
    multiplier = scaling.differences(found.multiplier)
    value: Tensor = _ValueWithDerivatives.apply(  # type: ignore[no-untyped-call]  # torch's stub
        losses,
        nominal,
        level.value,
        scaling.levels(found.objective),
        found.weights,
        scaling.differences(found.nominal_slope),
        multiplier if level.kind == "radius" else -found.divergence,
    )
    return value


class _ValueWithDerivatives(torch.autograd.Function):
    """Passes the solved value through and attaches its derivatives."""

    @staticmethod
    def forward(ctx: FunctionCtx, *arguments: Tensor) -> Tensor:
        """Takes losses, nominal, level, the value, and the three derivatives in that order."""
        losses, nominal, level, value, *slopes = arguments
        ctx.save_for_backward(losses, nominal, level, *slopes)
        return value.clone()

    @staticmethod
    def backward(ctx: BackwardCFunction, gradient: Tensor) -> tuple[Tensor | None, ...]:
        """Multiplies each derivative by the gradient of its problem's value."""
        saved: tuple[Tensor, ...] = ctx.saved_tensors
        *inputs, by_loss, by_nominal, by_level = saved
        per_atom = gradient.unsqueeze(-1)
        slopes = (per_atom * by_loss, per_atom * by_nominal, gradient * by_level)
        if torch.is_grad_enabled():
            by_input = [_without_derivative(slope, inputs) for slope in slopes]
            return (*by_input, None, None, None, None)
        return (*slopes, None, None, None, None)


def _without_derivative(slope: Tensor, inputs: list[Tensor]) -> Tensor:
    """Returns a first derivative of which a second one raises instead of being wrong."""
    result: Tensor = _NoDerivative.apply(slope, *inputs)  # type: ignore[no-untyped-call]
    return result


class _NoDerivative(torch.autograd.Function):
    """Depends on its arguments, but refuses to say how."""

    @staticmethod
    def forward(_ctx: FunctionCtx, slope: Tensor, *_inputs: Tensor) -> Tensor:
        """Returns the first argument."""
        return slope.clone()

    @staticmethod
    def backward(_ctx: BackwardCFunction, _gradient: Tensor) -> tuple[Tensor | None, ...]:
        """Raises."""
        raise RuntimeError(
            "a second derivative of a worst case needs its weights' derivatives; "
            "call worst_case with weights_require_grad=True"
        )
