"""Worst-case expectation over an f-divergence ball, with its certificate and its derivatives."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.function import BackwardCFunction, FunctionCtx, once_differentiable

from drgr.ambiguity.certificate import certified_saddle_point
from drgr.ambiguity.divergence import Divergence
from drgr.ambiguity.inputs import (
    Level,
    checked_level,
    checked_losses,
    checked_nominal,
    scaled_problem,
)
from drgr.numerics import Status


@dataclass(frozen=True, slots=True, kw_only=True)
class WorstCase:
    """Result of :func:`worst_case`; shapes are those of the losses ``(..., n)``.

    Values, thresholds, gaps and multipliers are in the unit of the losses.
    """

    value: Tensor
    """``<q, l>``, minus ``penalty * D(q||p)`` if penalised; shape ``(...)``. Differentiable."""
    weights: Tensor
    """Worst-case probabilities ``q``, shape ``(..., n)``. Detached."""
    multiplier: Tensor
    """``lam``, shape ``(...)``. Detached.

    The penalty, or the price of the radius: 0 where the radius is slack (saturation, equal losses),
    ``inf`` at radius 0.
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
    divergence: Divergence,
    radius: float | Tensor | None = None,
    penalty: float | Tensor | None = None,
    nominal: Tensor | None = None,
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
        divergence: For instance ``KL()`` or ``ChiSquare()``; its docstring states the
            normalisation.
        radius: ``rho >= 0``, a number or a tensor that broadcasts to ``(...)``. At or above the
            saturation radius the weights are the nominal restricted to the largest loss.
        penalty: ``lam > 0``, in the unit of the losses; same shapes as ``radius``. Exactly one of
            radius and penalty must be given.
        nominal: Probabilities, shape ``(n,)`` or broadcasting to that of ``losses``; uniform if
            None. Renormalised when within 1e-4 of summing to 1. Atoms without nominal mass get no
            weight.

    Returns:
        The worst case. ``gap`` bounds the error of the value: weights are feasible to rounding, and
        any dual point bounds the true value from above.

    Raises:
        TypeError: If losses or nominal are not floating-point tensors.
        ValueError: If a shape, a probability or the level is wrong, if losses are not finite (the
            index is named), or unless exactly one of radius and penalty is given.

    Gradients:
        Of the value, by Danskin's theorem: in losses exactly ``weights``; in radius the multiplier
        (``inf`` at radius 0); in penalty ``-D(q||p)``; in nominal ``lam f*((l - eta) / lam)``
        through its normalisation (0 at atoms without mass). A second derivative raises.

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
    losses = checked_losses(losses)
    num_atoms = losses.shape[-1]
    probabilities = checked_nominal(nominal, losses)
    level = checked_level(divergence, losses, radius, penalty)
    with torch.no_grad():
        problem, scaling = scaled_problem(
            losses.double().reshape(-1, num_atoms), probabilities.reshape(-1, num_atoms)
        )
        flat = Level(kind=level.kind, value=level.value.reshape(-1))
        found = certified_saddle_point(divergence, problem, flat.scaled(scaling))
        multiplier = scaling.differences(found.multiplier) if level.kind == "radius" else flat.value
        level_slope = multiplier if level.kind == "radius" else -found.divergence

    def per_problem(entry: Tensor) -> Tensor:
        return entry.reshape(losses.shape[:-1]).to(losses.dtype)

    weights = found.weights.reshape(losses.shape).to(losses.dtype)
    value: Tensor = _ValueWithDerivatives.apply(  # type: ignore[no-untyped-call]  # torch's stub
        losses,
        probabilities,
        level.value,
        per_problem(scaling.levels(found.objective)),
        weights,
        scaling.differences(found.nominal_slope).reshape(losses.shape),
        level_slope.reshape(level.value.shape),
    )
    return WorstCase(
        value=value,
        weights=weights,
        multiplier=per_problem(multiplier),
        threshold=per_problem(scaling.levels(found.threshold)),
        divergence=per_problem(found.divergence),
        gap=per_problem(scaling.differences(found.gap)),
        status=found.status,
    )


class _ValueWithDerivatives(torch.autograd.Function):
    """Passes the solved value through and attaches its derivatives."""

    @staticmethod
    def forward(ctx: FunctionCtx, *arguments: Tensor) -> Tensor:
        """Takes losses, nominal, level, the value, and the three derivatives in that order."""
        _losses, _nominal, _level, value, *slopes = arguments
        ctx.save_for_backward(*slopes)
        return value.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: BackwardCFunction, gradient: Tensor) -> tuple[Tensor | None, ...]:
        """Multiplies each derivative by the gradient of its problem's value."""
        saved: tuple[Tensor, ...] = ctx.saved_tensors
        by_loss, by_nominal, by_level = saved
        per_atom = gradient.unsqueeze(-1)
        slopes = (per_atom * by_loss, per_atom * by_nominal, gradient * by_level)
        return (*slopes, None, None, None, None)
