r"""The gradient of an outer loss at the solution of an inner problem."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from drgr._checks import check_not_negative
from drgr.bilevel.checked_loss import checked
from drgr.bilevel.conjugate_gradients import CG
from drgr.bilevel.linear_system import LinearSolution, LinearSolver, LinearSystem
from drgr.bilevel.process_mean import ProcessMean
from drgr.bilevel.products import (
    HvpMode,
    Loss,
    SecondDerivatives,
    gradients,
    leaf,
    products_of_gradient,
    second_derivatives,
)
from drgr.bilevel.status import SolveStatus
from drgr.bilevel.structures import Layout, Parameters, check_same_structure, layout_of
from drgr.errors import NonFiniteLossError

# A result counts as converged if its estimated error is within this many tolerances.
_FACTOR = 10.0

ParameterLoss = Callable[[Any, Any], Tensor]
"""A scalar of the outer and the inner parameters."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Hypergradient:
    """Result of :func:`hypergradient`; everything is detached."""

    grads: Parameters
    """Gradient in the outer parameters, of their structure, shapes and dtypes."""
    outer_loss: Tensor
    """Value of the outer loss, shape ``()``."""
    corrected_loss: Tensor
    """``F - z' grad_y g``, shape ``()``: an estimate of ``F(x, y*(x))``.

    Its error is of second order in those of ``y`` and ``z``; that of ``outer_loss`` is of first.
    """
    auxiliary: Parameters
    """``z``, of the structure of the inner parameters: the start of the next solve."""
    residual: float
    """``|(H + damping) z - grad_y F| / |grad_y F|``, from a product with ``z`` itself."""
    residual_norm: float
    """``|(H + damping) z - grad_y F|``."""
    error_estimate: float
    """Estimated relative error of ``z``: the residual over the smallest curvature met.

    The least eigenvalue may be smaller than what the solver met, so it is no bound. ``inf`` where
    the curvature is not positive.
    """
    damping_bias: float
    """Estimated relative distance to ``z`` without damping: ``damping / curvature``."""
    inner_gradient: float
    """``|grad_y g|``: 0 where the inner problem is solved, which the formula assumes."""
    outer_gradient: float
    """``|grad_y F|``."""
    num_hvps: int
    """Products with the Hessian, the last one, which also gives ``J z``, included."""
    curvature: float
    """Smallest ``p'Hp / p'p`` met, without damping."""
    status: SolveStatus

    def merit(self, weight: float) -> float:
        """Returns ``F - z' grad_y g + weight / 2 (|grad_y g|^2 + |(H + damping) z - grad_y F|^2)``.

        With exact ``y`` and ``z`` this is ``F(x, y*(x))``. Without damping, with ``mu`` the least
        curvature of the inner loss, ``rho`` the Lipschitz constant of its Hessian (0 if it is
        quadratic), ``L`` that of the gradient of the outer loss and ``A = L + rho |z|``, it is
        nowhere below that for ``weight >= (A + sqrt(A^2 + 4 mu^2)) / (2 mu^2)``, the least that
        will do (:func:`~drgr.bilevel.bounds.least_merit_weight`): its decrease then proves progress
        without exact solutions.
        """
        gaps = self.inner_gradient**2 + self.residual_norm**2
        return self.corrected_loss.item() + weight / 2 * gaps


def hypergradient(
    outer_loss: ParameterLoss,
    inner_loss: ParameterLoss,
    outer_params: Parameters,
    inner_params: Parameters,
    *,
    solver: LinearSolver | None = None,
    damping: float = 0.0,
    hvp: HvpMode = "double-backward",
    retain_graph: bool = True,
    start: Parameters | None = None,
    average_over_processes: bool = False,
    group: ProcessGroup | None = None,
) -> Hypergradient:
    r"""Differentiates ``F(x, y*(x))`` through ``y*(x) = argmin_y g(x, y)`` without its trajectory.

    By the implicit function theorem, with ``H = d2g/dy2`` and ``J = d2g/dxdy`` at the given point,

    .. math::
        z = (H + \delta I)^{-1} \nabla_y F, \qquad \nabla_x F(x, y^*(x)) = \nabla_x F - J z .

    The formula is exact at a minimum of ``g`` with positive curvature; near one its error is
    proportional to ``inner_gradient``. A trained network is neither: damping makes the problem
    local, at the bias that ``damping_bias`` estimates, and ``status`` says where curvature was
    missing.

    Args:
        outer_loss: ``F(outer_params, inner_params)``, a scalar; for modules call
            ``torch.func.functional_call(module, inner_params, ...)`` inside.
        inner_loss: ``g(outer_params, inner_params)``, a scalar, the same function of its arguments
            on every call: fix batches and random numbers.
        outer_params: ``x``, a tensor or a dict, list or tuple (of dicts, ...) of tensors.
        inner_params: ``y``, likewise; neither is changed, and their ``.grad`` is left alone.
        solver: :class:`CG` (default), :class:`Neumann`, :class:`Exact`, :class:`Identity`,
            :class:`RandomSubspace`, or any :class:`LinearSolver`.
        damping: ``delta >= 0``, added to the Hessian.
        hvp: How to take Hessian-vector products: see :func:`second_derivatives`.
        retain_graph: Whether double backward keeps its graph between products, or runs the loss
            again for each: slower, with less memory.
        start: ``auxiliary`` of an earlier solve; None starts at 0.
        average_over_processes: Whether each process holds the loss on its own batch, and the
            losses meant are the means over processes. Parameters and ``start`` must be equal on
            all of them. Costs a few all-reduces and one per product; one for all that
            :class:`Exact` and :class:`RandomSubspace` take at once.
        group: The processes; None is all.

    Returns:
        The hypergradient and what is known of its error.

    Raises:
        TypeError: If a loss is no floating-point tensor, or parameters are not nested tensors.
        ValueError: If a loss is not a scalar, if the inner loss does not depend on the inner
            parameters, or nothing on the outer ones, or an argument is out of range.
        NonFiniteLossError: If a loss or a gradient is not finite. If they are averaged over
            processes, it is raised on all of them, and names one where that was.
        RuntimeError: If they are averaged and a loss raised anything else on another process.

    Numerics:
        In the widest dtype of each structure, float32 for half types.

    Complexity:
        Two gradients and ``num_hvps`` products, each about two gradients of the inner loss; with
        double backward that keeps its graph, the inner loss is evaluated once.

    References:
        Pedregosa, *Hyperparameter optimization with approximate gradient*, ICML 2016. Grazzi,
        Franceschi, Pontil, Salzo, *On the Iteration Complexity of Hypergradient Computation*, ICML
        2020.

    Examples:
        >>> import torch
        >>> from drgr.bilevel import hypergradient
        >>> def inner_loss(x, y): return 0.5 * (y - x.exp()).square().sum()
        >>> def outer_loss(x, y): return y.sum()
        >>> x = torch.tensor([0.0, 1.0])
        >>> hypergradient(outer_loss, inner_loss, x, x.exp()).grads
        tensor([1.0000, 2.7183])
    """
    check_not_negative("damping", damping)
    outer, inner = layout_of("outer_params", outer_params), layout_of("inner_params", inner_params)
    point = _Point(outer, inner, outer.vector(outer_params), inner.vector(inner_params))
    mean = ProcessMean(group if average_over_processes else None, average_over_processes)
    terms = mean.agreed(
        lambda: _terms(point, outer_loss, inner_loss, hvp=hvp, retain_graph=retain_graph),
        point.inner.device,
    )
    slope, outer_value = mean(terms.slope), mean(terms.outer_value)
    rhs, direct, products = mean(terms.rhs), mean(terms.direct), terms.products
    system = LinearSystem(
        apply=lambda v: _damped(mean(products.hessian(v)), v, damping),
        rhs=rhs,
        apply_many=lambda rows: _damped(mean(products.hessian_many(rows)), rows, damping),
    )
    solver = solver or CG()
    found = _solved(solver, system, _start(start, inner))
    hessian, cross = (mean(product) for product in products.hessian_and_cross(found.point))
    quality = _quality(found, _damped(hessian, found.point, damping), system, solver)
    return Hypergradient(
        grads=outer.structure((direct - cross).detach()),
        outer_loss=outer_value,
        corrected_loss=outer_value - torch.dot(found.point, slope),
        auxiliary=inner.structure(found.point.detach()),
        residual=quality.residual,
        residual_norm=quality.residual_norm,
        error_estimate=quality.error,
        damping_bias=_ratio(damping, quality.curvature - damping),
        inner_gradient=slope.norm().item(),
        outer_gradient=rhs.norm().item(),
        num_hvps=found.num_products + 1,
        curvature=quality.curvature - damping,
        status=quality.status,
    )


@dataclass(frozen=True, slots=True)
class _Point:
    outer_layout: Layout
    inner_layout: Layout
    outer: Tensor
    inner: Tensor

    def loss(self, of_parameters: ParameterLoss) -> Loss:
        """Returns a loss of parameters as one of vectors."""
        return lambda outer, inner: of_parameters(
            self.outer_layout.structure(outer), self.inner_layout.structure(inner)
        )


@dataclass(frozen=True, slots=True)
class _Terms:
    """What one process computes of its losses before any product."""

    outer_value: Tensor
    direct: Tensor
    """``grad_x F``."""
    rhs: Tensor
    """``grad_y F``."""
    slope: Tensor
    """``grad_y g``."""
    products: SecondDerivatives


@dataclass(frozen=True, slots=True)
class _Quality:
    residual: float
    residual_norm: float
    error: float
    curvature: float
    status: SolveStatus


def _terms(
    point: _Point,
    outer_loss: ParameterLoss,
    inner_loss: ParameterLoss,
    *,
    hvp: HvpMode,
    retain_graph: bool,
) -> _Terms:
    """Checks and differentiates both losses; one graph serves gradients and products."""
    outer, inner = leaf(point.outer), leaf(point.inner)
    value, direct, rhs = _first_order("outer", point.loss(outer_loss), outer, inner)
    keeps_graph = hvp == "double-backward" and retain_graph
    loss = point.loss(inner_loss)
    _, cross, slope = _first_order("inner", loss, outer, inner, create_graph=keeps_graph)
    if slope is None:
        raise ValueError(
            "inner_loss does not depend on inner_params; use the tensors passed to it, not others"
        )
    if direct is None and cross is None:
        raise ValueError(
            "neither loss depends on outer_params; use the tensors passed to them, not others"
        )
    return _Terms(
        outer_value=value.detach(),
        direct=torch.zeros_like(point.outer) if direct is None else direct,
        rhs=torch.zeros_like(point.inner) if rhs is None else rhs,
        slope=slope.detach(),
        products=products_of_gradient(slope, outer, inner)
        if keeps_graph
        else second_derivatives(hvp, loss, outer, inner, retain_graph=retain_graph),
    )


def _first_order(
    name: str, loss: Loss, outer: Tensor, inner: Tensor, *, create_graph: bool = False
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Returns a checked loss and its gradients."""
    value, by_outer, by_inner = gradients(
        checked(name, loss), outer, inner, create_graph=create_graph
    )
    for variable, gradient in (("outer_params", by_outer), ("inner_params", by_inner)):
        if gradient is not None and not bool(gradient.isfinite().all()):
            raise NonFiniteLossError(
                f"the gradient of {name}_loss in {variable} is not finite; look for a root, "
                "logarithm or division at 0"
            )
    return value, by_outer, by_inner


def _start(start: Parameters | None, layout: Layout) -> Tensor | None:
    if start is None:
        return None
    check_same_structure("start", start, layout)
    return layout.vector(start)


def _damped(product: Tensor, vector: Tensor, damping: float) -> Tensor:
    return torch.add(product, vector, alpha=damping) if damping else product


def _solved(solver: LinearSolver, system: LinearSystem, start: Tensor | None) -> LinearSolution:
    if not bool(system.rhs.any()):
        return LinearSolution(
            point=torch.zeros_like(system.rhs),
            status=SolveStatus.CONVERGED,
            curvature=math.inf,
            num_products=0,
        )
    with torch.no_grad():
        return solver.solve(system, start)


def _quality(
    found: LinearSolution, image: Tensor, system: LinearSystem, solver: LinearSolver
) -> _Quality:
    """Judges a solution by its own product ``A z``."""
    size, length = system.rhs.norm().item(), found.point.norm().item()
    left = (system.rhs - image).norm().item()
    residual = _ratio(left, size)
    curvature = found.curvature
    if length > 0:
        curvature = min(curvature, torch.dot(found.point, image).item() / length**2)
    error = _ratio(left, curvature * length)
    status = _judged(found.status, residual, error, solver.rtol)
    return _Quality(
        residual=residual, residual_norm=left, error=error, curvature=curvature, status=status
    )


def _judged(status: SolveStatus, residual: float, error: float, rtol: float) -> SolveStatus:
    """Returns what a solver's verdict is worth by the residual of its result."""
    if not math.isfinite(residual):
        return SolveStatus.NON_FINITE
    if status is SolveStatus.APPROXIMATE and residual <= rtol and error <= _FACTOR * rtol:
        return SolveStatus.CONVERGED
    if status is SolveStatus.CONVERGED and error > _FACTOR * rtol:
        return SolveStatus.APPROXIMATE
    if status is SolveStatus.CONVERGED and residual > 2 * rtol:
        return SolveStatus.INACCURATE
    return status


def _ratio(top: float, bottom: float) -> float:
    """Returns a ratio of numbers of at least 0, ``inf`` where the bottom is not positive."""
    if top == 0:
        return 0.0
    return top / bottom if bottom > 0 else math.inf
