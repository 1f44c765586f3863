"""The machine that moves ``x``, ``y`` and ``z`` along what an estimator says."""

from collections.abc import Callable, Mapping
from dataclasses import astuple, dataclass
from typing import Any, final, get_args

import torch
from torch import Tensor

from drgr._checks import check_not_negative
from drgr.bilevel.alternation import ProximalMap
from drgr.bilevel.inner_level import InnerOptimizer
from drgr.bilevel.products import HvpMode
from drgr.bilevel.single_loop.estimator import Directions, Estimator
from drgr.bilevel.single_loop.inner_variable import InnerVariable
from drgr.bilevel.single_loop.oracle import Curvature, Oracle, OracleCalls, Point
from drgr.bilevel.single_loop.problem import FiniteSumProblem
from drgr.bilevel.structures import Layout, Parameters, check_same_structure, layout_of
from drgr.errors import NonFiniteLossError

Schedule = float | Callable[[int], float]
"""A step size, or a function of the number of the step, from 0."""

_SEED = 0
_REMEDY = (
    "lower outer_step, auxiliary_step or the learning rate, add damping, or look for a root, "
    "logarithm or division at 0"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class SingleLoopResult:
    """Result of :meth:`SingleLoop.minimize`; everything is detached and a copy."""

    outer_params: Parameters
    inner_params: Parameters
    auxiliary: Tensor
    """``z`` flat, shape ``(d_y,)``, or what the estimator keeps in its place."""
    num_steps: int
    calls: OracleCalls
    curvature: float
    """Lowest ``z'Hz / z'z`` of a product, without damping; ``inf`` where none was taken."""
    num_negative_curvatures: int
    """Products with ``z'Hz < 0``: where not 0, the inner problem was not at a strict minimum along
    ``z`` on those batches, and the method's assumptions did not hold there."""
    state_numel: int
    """Entries kept between steps beyond ``x`` and ``y``: ``z``, the estimator's memory and the
    state of the inner optimizer."""


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class SingleLoop:
    r"""Minimises ``F(x, y*(x)) + Omega(x)`` over batches without solving the inner problem.

    A step asks the estimator for directions and follows them: ``y`` by a torch optimizer,
    ``z -= rho D_z``, ``x <- prox_{alpha Omega}(x - alpha D_x)``. Theory needs an inner loss that is
    strongly convex; elsewhere the methods are local, ``damping`` helps, and the result counts the
    products that met negative curvature.

    Args:
        estimator: :class:`SOBA`, :class:`MASOBA`, :class:`SABA`, :class:`SRBA`, :class:`AmIGO`,
            :class:`StocBiO`, :class:`F2SA`, :class:`BlockWise`, :class:`SubspaceSOBA`,
            :class:`GalerkinSOBA`, or any :class:`Estimator`.
        inner_optimizer: Makes a ``torch.optim`` optimizer of a list of tensors; the direction of
            ``y`` is their gradient.
        auxiliary_step: ``rho``.
        outer_step: ``alpha``.
        inner_schedule: Factor on the learning rates of the inner optimizer.
        prox: Proximal map of ``Omega``, or a projection; None is none.
        damping: Added to the Hessian, at least 0.
        hvp: How to take products: see :func:`second_derivatives`.

    Raises:
        ValueError: If ``damping`` or ``hvp`` is out of range.

    Examples:
        >>> import torch
        >>> from drgr.bilevel import SABA, FiniteSumProblem
        >>> data = torch.tensor([1.0, 2.0, 3.0])
        >>> problem = FiniteSumProblem(
        ...     inner_loss=lambda x, y, value: (y - value * x).square() / 2,
        ...     outer_loss=lambda x, y, value: (y - value).square() / 2,
        ...     inner_batches=data,
        ...     outer_batches=data + 2,
        ... )
        >>> method = SingleLoop(
        ...     estimator=SABA(),
        ...     inner_optimizer=lambda params: torch.optim.SGD(params, lr=0.2),
        ...     auxiliary_step=0.2,
        ...     outer_step=0.05,
        ... )
        >>> zero = torch.tensor(0.0)
        >>> result = method.minimize(problem, zero, zero, num_steps=1000)
        >>> round(result.outer_params.item(), 3)
        2.0
    """

    estimator: Estimator
    inner_optimizer: InnerOptimizer
    auxiliary_step: Schedule
    outer_step: Schedule
    inner_schedule: Schedule = 1.0
    prox: ProximalMap | None = None
    damping: float = 0.0
    hvp: HvpMode = "double-backward"

    def __post_init__(self) -> None:
        check_not_negative("damping", self.damping)
        if self.hvp not in get_args(HvpMode):
            raise ValueError(f"hvp must be one of {get_args(HvpMode)}, got {self.hvp!r}")

    def minimize(
        self,
        problem: FiniteSumProblem,
        outer_params: Parameters,
        inner_params: Parameters,
        *,
        num_steps: int,
        generator: torch.Generator | None = None,
    ) -> SingleLoopResult:
        """Takes steps from given parameters, which are left alone.

        Args:
            problem: The losses and their batches.
            outer_params: First ``x``, nested tensors.
            inner_params: First ``y``, nested tensors.
            num_steps: How many.
            generator: Draws batches and subspaces; None takes a fixed seed.

        Raises:
            TypeError: If parameters are not nested tensors, or a loss is none.
            ValueError: If a loss is not a scalar or does not depend on its parameters, a step size
                is negative, or parameters do not suit the estimator.
            NonFiniteLossError: If a loss or a direction is not finite.
        """
        run = self.start(problem, outer_params, inner_params, generator=generator)
        run.advance(num_steps)
        return run.result()

    def start(
        self,
        problem: FiniteSumProblem,
        outer_params: Parameters,
        inner_params: Parameters,
        *,
        generator: torch.Generator | None = None,
    ) -> "SingleLoopRun":
        """Returns a run to advance by hand, save and restore; arguments as in :meth:`minimize`."""
        layouts = layout_of("outer_params", outer_params), layout_of("inner_params", inner_params)
        outer, inner = layouts[0].vector(outer_params), layouts[1].vector(inner_params)
        if generator is None:
            generator = torch.Generator().manual_seed(_SEED)
        # First parameters that only the run would hold are memory for nothing.
        shapes = layouts[0].without_values(), layouts[1].without_values()
        oracle = Oracle(problem, shapes, hvp=self.hvp, damping=self.damping, generator=generator)
        return SingleLoopRun(self, oracle, Point(outer, inner, torch.zeros_like(inner)))


@final
class SingleLoopRun:
    """A method on its way; made by :meth:`SingleLoop.start`.

    After an error the point may have moved in part: return to a saved state.
    """

    def __init__(self, method: SingleLoop, oracle: Oracle, point: Point) -> None:
        self._method, self._oracle, self._point = method, oracle, point
        begin = method.estimator.start(oracle, point)
        self._memory = begin.memory
        point.auxiliary = begin.auxiliary
        self._inner = InnerVariable(
            oracle.inner_layout, point.inner, method.inner_optimizer, begin.num_coordinates
        )
        self._num_steps = 0

    def advance(self, num_steps: int = 1) -> None:
        """Takes steps, at least 0."""
        check_not_negative("num_steps", num_steps)
        for _ in range(num_steps):
            try:
                self._advance()
            except NonFiniteLossError as error:
                raise NonFiniteLossError(f"step {self._num_steps}: {error}; {_REMEDY}") from error
            self._num_steps += 1

    def result(self) -> SingleLoopResult:
        """Returns where the run is.

        Raises:
            NonFiniteLossError: If the last step led to parameters that are not finite.
        """
        point, oracle = self._point, self._oracle
        for name in ("outer", "inner", "auxiliary"):
            _check_finite(f"{name} variable", getattr(point, name))
        memory = sum(tensor.numel() for tensor in self._memory.values())
        return SingleLoopResult(
            outer_params=oracle.outer_layout.structure(point.outer.clone()),
            inner_params=oracle.inner_layout.structure(point.inner.clone()),
            auxiliary=point.auxiliary.clone(),
            num_steps=self._num_steps,
            calls=oracle.calls,
            curvature=oracle.curvature.lowest,
            num_negative_curvatures=oracle.curvature.num_negative,
            state_numel=point.auxiliary.numel() + memory + self._inner.state_numel,
        )

    def state_dict(self) -> dict[str, Any]:
        """Returns a copy of everything that a run needs to go on bit for bit, for ``torch.save``.

        The problem, the method and the first parameters are not in it.
        """
        point, oracle = self._point, self._oracle
        return {
            "estimator": type(self._method.estimator).__name__,
            "num_steps": self._num_steps,
            "outer": point.outer.clone(),
            "inner": self._inner.state_dict(),
            "auxiliary": point.auxiliary.clone(),
            "memory": {name: tensor.clone() for name, tensor in self._memory.items()},
            "generator": oracle.generator.get_state(),
            "calls": astuple(oracle.calls),
            "curvature": astuple(oracle.curvature),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Returns to a saved state of a run of the same method on parameters of the same shapes.

        Raises:
            ValueError: If the state is of another estimator or has other shapes.
        """
        name = type(self._method.estimator).__name__
        if state["estimator"] != name:
            raise ValueError(f"the state is of estimator {state['estimator']!r}, not {name!r}")
        point, oracle = self._point, self._oracle
        for variable in ("outer", "auxiliary"):
            _check_same_shape(variable, state[variable], getattr(point, variable))
        _check_same_shape("inner", state["inner"]["vector"], point.inner)
        self._num_steps = state["num_steps"]
        self._memory = {key: tensor.clone() for key, tensor in state["memory"].items()}
        point.outer, point.auxiliary = state["outer"].clone(), state["auxiliary"].clone()
        self._inner.load_state_dict(state["inner"])
        oracle.generator.set_state(state["generator"])
        oracle.calls = _calls(state["calls"])
        oracle.curvature = Curvature(*state["curvature"])

    def _advance(self) -> None:
        estimator = self._method.estimator
        for directions in estimator.directions(
            self._oracle, self._point, self._memory, self._num_steps
        ):
            for name in ("inner", "auxiliary", "outer"):
                direction = getattr(directions, name)
                if direction is not None:
                    _check_finite(f"{name} direction", direction)
            self._follow(directions)

    def _follow(self, directions: Directions) -> None:
        method, point = self._method, self._point
        if directions.inner is not None:
            if directions.renew:
                self._inner.renew_optimizer()
            self._inner.move(
                directions.inner,
                factor=self._value("inner_schedule"),
                touched=directions.touched,
                basis=directions.basis,
            )
        if directions.auxiliary is not None:
            point.auxiliary.sub_(directions.auxiliary, alpha=self._value("auxiliary_step"))
        if directions.outer is not None:
            step = self._value("outer_step")
            point.outer = point.outer - step * directions.outer
            if method.prox is not None:
                point.outer = _nearer(method.prox, self._oracle.outer_layout, point.outer, step)

    def _value(self, name: str) -> float:
        schedule: Schedule = getattr(self._method, name)
        value = schedule(self._num_steps) if callable(schedule) else schedule
        check_not_negative(f"{name} at step {self._num_steps}", value)
        return value


def _nearer(prox: ProximalMap, layout: Layout, outer: Tensor, step: float) -> Tensor:
    found = prox(layout.structure(outer), step)
    check_same_structure("the result of prox", found, layout)
    return layout.vector(found)


def _calls(counts: tuple[int, ...]) -> OracleCalls:
    names = ("inner_gradients", "hessian_products", "cross_products", "outer_gradients")
    return OracleCalls(**dict(zip(names, counts, strict=True)))


def _check_finite(name: str, vector: Tensor) -> None:
    if not bool(vector.isfinite().all()):
        raise NonFiniteLossError(f"the {name} is not finite")


def _check_same_shape(name: str, saved: Tensor, have: Tensor) -> None:
    if saved.shape != have.shape:
        raise ValueError(
            f"{name} of the state has shape {tuple(saved.shape)}, this run {tuple(have.shape)}; "
            "start it from parameters of the same structure"
        )
