r"""The outer loop: hypergradients of held-out losses move the mixture, routers and link gates.

With ``F`` the worst case of the held-out losses, ``g = sum_e w_e l_e`` the training loss at the
mixture ``w``, ``b = grad_y F`` and ``D`` the metric of the optimizer (Adam's root second moment, or
1), the parameters' response to the outer variables over the next ``horizon`` steps is taken as that
of the damped inner problem:

    (H + D / (learning_rate * horizon)) z = b        gain_e = <grad l_e, z> = -dF/dw_e

With ``H`` left out, ``z`` is what ``horizon`` steps of the optimizer along ``b`` would do; a gain
is then a predicted fall of ``F`` in its own unit. The horizon bounds how far the local model of a
problem without a strict minimum is trusted, as damping does elsewhere. The Hessian of a network is
indefinite at every useful horizon, so that its Gauss-Newton matrix stands in by default.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, final

import torch
from torch import Tensor

from drgr.ambiguity import WorstCase
from drgr.bilevel import LinearSolver, LinearSystem, SolveStatus, adam_diagonal
from drgr.data import Batch
from drgr.routing import GateGroup, LinkGates
from drgr.training.adversary import DomainWeights
from drgr.training.domain_passes import DomainPasses, Routes
from drgr.training.gain_estimates import Calibration, GainAverage
from drgr.training.mixture import entropic_step, lookahead_mixture

_UNUSABLE = (SolveStatus.NEGATIVE_CURVATURE, SolveStatus.DIVERGED, SolveStatus.NON_FINITE)
# Share of the uniform distribution in an anchor that the adversary sets: a mixture cannot come back
# from a share of 0, and what is never drawn shows no gain.
_EXPLORED = 1e-3
# Least entry of Adam's metric as a share of the mean: a damping that is nowhere 0.
_FLOOR = 0.01


@dataclass(frozen=True, slots=True, kw_only=True)
class OuterSettings:
    """What stays the same from outer step to outer step; see :class:`OuterConfig`.

    Attributes:
        moves_mixture: Whether the mixture is an outer variable.
        lookahead: Whether it moves to the least predicted worst case, or along the hypergradient.
        adam_metric: Whether the metric is Adam's, or the identity.
        solver: Solves with the inner Hessian; None leaves it out.
        gauss_newton: Whether the Gauss-Newton matrix stands for the inner Hessian.
        horizon: Steps of the inner response.
        rate: Step size of the mixture along the hypergradient.
        anchor: Mixture to stay close to, shape ``(G,)``; None for the adversary's weights.
        anchor_strength: Price of leaving it.
        smoothing: Share of the old gains that an estimate keeps.
        unit: Factor from nats per token to the unit of ``F``, shape ``(G,)``.
    """

    moves_mixture: bool
    lookahead: bool
    adam_metric: bool
    solver: LinearSolver | None
    gauss_newton: bool
    horizon: float
    rate: float
    anchor: Tensor | None
    anchor_strength: float
    smoothing: float
    unit: Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class GateSteps:
    """Proximal steps of link gates.

    Attributes:
        gates: The gates, the last of the outer tensors.
        rate: Step size.
        penalty: Weight of the group norm.
        group: What closes together.
    """

    gates: LinkGates
    rate: float
    penalty: float
    group: GateGroup

    def take(self, hypergradient: Tensor) -> int:
        """Moves against a hypergradient; returns how many links that closed."""
        values = self.gates.values.detach()
        step = self.gates.propose(
            values - self.rate * hypergradient.view_as(values),
            threshold=self.rate * self.penalty,
            group=self.group,
        )
        self.gates.take(step)
        return int(step.closed.sum())


@dataclass(slots=True, kw_only=True)
class OuterReport:
    """What one outer step did.

    Attributes:
        mixture: Shares from now on, shape ``(G,)``.
        gain: Predicted fall of the worst case if the horizon were trained on one domain, shape
            ``(G,)``, in its unit.
        scale: Factor from predicted to observed falls, that gains are multiplied by; None before
            the first comparison, while the mixture stays.
        gap: Bound on the mixture's distance from optimal in value (lookahead).
        status: How the linear solve ended; ``"none"`` without one.
        residual: Its relative residual.
        curvature: Smallest curvature it met, in units of the damping, which is not included.
        num_hvps: Hessian-vector products.
        gradient_norm: Norm of the hypergradient in the router's weights and the gates.
        links_closed: Links that the step closed.
        flops: FLOPs of the outer step over all processes.
    """

    mixture: Tensor
    gain: Tensor
    scale: float | None = None
    gap: float = 0.0
    status: str = "none"
    residual: float | None = None
    curvature: float | None = None
    num_hvps: int = 0
    gradient_norm: float | None = None
    links_closed: int = 0
    flops: float = 0.0


@final
class OuterLoop:
    """Keeps the outer variables and the estimates that move them.

    Args:
        settings: See :class:`OuterSettings`.
        passes: Losses and gradients by domain; its outer tensors are the router's weights, then
            the gates.
        inner_optimizer: The optimizer of the inner level, for its metric and learning rate.
        outer_optimizer: Steps the router's weights; None if they are no outer variable.
        gate_steps: Steps the link gates; None if they are no outer variable.
    """

    def __init__(
        self,
        settings: OuterSettings,
        passes: DomainPasses,
        *,
        inner_optimizer: torch.optim.Optimizer,
        outer_optimizer: torch.optim.Optimizer | None,
        gate_steps: GateSteps | None = None,
    ) -> None:
        self.settings, self.passes = settings, passes
        self._inner_optimizer, self._outer_optimizer = inner_optimizer, outer_optimizer
        self._gate_steps = gate_steps
        self._gains = GainAverage(settings.smoothing)
        self._calibration = Calibration(settings.smoothing)
        self._warm: Tensor | None = None

    def step(
        self,
        risk: Callable[[Tensor], WorstCase],
        losses: Tensor,
        weights: DomainWeights,
        *,
        step: int,
    ) -> OuterReport:
        """Moves the outer variables of the model, and says how the mixture is to move.

        Args:
            risk: The worst case as a function of losses by domain, shape ``(G,)``.
            losses: The adversary's estimates, in its unit, shape ``(G,)``.
            weights: Its weights, and what is drawn and counts by them.
            step: Steps taken by now; determines the batches.

        Raises:
            NonFiniteLossError: If a gradient is not finite.
        """
        spent = self.passes.flops
        if self.settings.lookahead:
            report = self._look_ahead(risk, losses, weights, step)
        else:
            report = self._descend(risk(losses).value, weights, step)
        report.flops = self.passes.flops - spent
        return report

    def state_dict(self) -> dict[str, Any]:
        """Returns the outer variables that are not the model's, and the estimates."""
        outer = self._outer_optimizer
        return {
            "gains": self._gains.state_dict(),
            "calibration": self._calibration.state_dict(),
            "warm": None if self._warm is None else self._warm.clone(),
            "optimizer": None if outer is None else outer.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores :meth:`state_dict`, bit for bit."""
        self._gains.load_state_dict(state["gains"])
        self._calibration.load_state_dict(state["calibration"])
        self._warm = state["warm"]
        if self._outer_optimizer is not None:
            self._outer_optimizer.load_state_dict(state["optimizer"])

    def _anchor(self, weights: DomainWeights) -> Tensor:
        """Returns the mixture to stay close to; all of its shares are above 0."""
        if self.settings.anchor is not None:
            return self.settings.anchor
        share = _EXPLORED / len(weights.adversary)
        return (1 - _EXPLORED) * weights.adversary + share

    def _report(self, weights: DomainWeights, gain: Tensor) -> OuterReport:
        """Returns what is the case as long as nothing is known of gains."""
        follows = self.settings.moves_mixture and self.settings.anchor is None
        mixture = self._anchor(weights) if follows else weights.sampling
        return OuterReport(mixture=mixture, gain=gain)

    def _response(self, squares: Tensor) -> Tensor:
        """Returns the inverse of ``D / (learning_rate * horizon)``, shape ``(d_y,)``.

        Adam's second moments hold what was drawn. Directions that were not, such as the embeddings
        of rare tokens, have moments near 0 and would be taken to respond without bound; so the
        squared gradients that are about to act are added, and entries below a hundredth of the mean
        are raised to it. No entry of the response to ``g`` then exceeds
        ``learning_rate * horizon * |g| / sqrt(squares)``.
        """
        rate: float = self._inner_optimizer.param_groups[0]["lr"]
        reach = rate * self.settings.horizon
        if not self.settings.adam_metric:
            return torch.full_like(squares, reach)
        seen = adam_diagonal(self._inner_optimizer, self.passes.inner)
        metric = (seen.square() + squares).sqrt()
        return reach / metric.clamp_min(_FLOOR * metric.mean().item())

    def _look_ahead(
        self,
        risk: Callable[[Tensor], WorstCase],
        losses: Tensor,
        weights: DomainWeights,
        step: int,
    ) -> OuterReport:
        """Takes the mixture whose losses after the horizon are predicted to be best."""
        passes, settings = self.passes, self.settings
        train = torch.stack(list(passes.gradients_by_domain(passes.draw("train", step))))
        response = self._response(train.square().mean(dim=0)) * train
        held_out = passes.gradients_by_domain(passes.draw("validation", step))
        fresh = torch.stack([response @ slope for slope in held_out])
        gains = self._gains.updated(settings.unit.unsqueeze(1) * fresh.double().cpu())
        scale = self._calibration.updated(losses)
        report = self._report(weights, weights.adversary @ gains)
        report.scale = scale
        if scale is not None:
            report.gain *= scale
            found = lookahead_mixture(
                risk,
                losses,
                scale * gains,
                anchor=self._anchor(weights),
                anchor_strength=settings.anchor_strength,
            )
            report.mixture, report.gap = found.mixture, found.gap
        self._calibration.predict(gains @ report.mixture, losses)
        return report

    def _descend(self, value: Tensor, weights: DomainWeights, step: int) -> OuterReport:
        """Takes a step along the hypergradient."""
        passes, settings = self.passes, self.settings
        factors = weights.adversary * settings.unit
        slope, direct, _ = passes.gradient(passes.draw("validation", step), factors)
        report = self._report(weights, torch.zeros_like(factors))
        root = self._response(slope.square()).sqrt()
        batch = passes.draw("train", step)
        routes = passes.routes(batch)
        product = partial(self._product, batch, routes, weights.shares)
        direction = self._solve(slope, root, product, report)
        change = passes.along(
            batch,
            direction,
            weights.shares,
            routes=routes,
            with_gradients=bool(passes.outer),
        )
        gain = report.gain = self._gains.updated(change.losses)
        report.scale = self._calibration.updated(value.reshape(1))
        if settings.moves_mixture and report.scale is not None:
            report.gain = report.scale * gain
            report.mixture = entropic_step(
                weights.sampling,
                report.gain,
                rate=settings.rate,
                anchor=self._anchor(weights),
                anchor_strength=settings.anchor_strength,
            )
        self._calibration.predict((report.mixture @ gain).reshape(1), value.reshape(1))
        if change.outer is not None:
            hypergradient = direct - change.outer
            report.gradient_norm = hypergradient.norm().item()
            report.links_closed = self._move_outer(hypergradient)
        return report

    def _product(self, batch: Batch, routes: Routes, shares: Tensor, vector: Tensor) -> Tensor:
        """Returns the product of the curvature of ``g`` with a vector."""
        passes = self.passes
        if self.settings.gauss_newton:
            return passes.gauss_newton(batch, vector, shares, routes=routes)
        change = passes.along(batch, vector, shares, routes=routes, with_gradients=True)
        assert change.inner is not None
        return change.inner

    def _solve(
        self,
        slope: Tensor,
        root: Tensor,
        product: Callable[[Tensor], Tensor],
        report: OuterReport,
    ) -> Tensor:
        """Returns ``z``, solved for in the metric in which the damping is 1.

        Where the solver meets negative curvature the local problem has no minimum, and what it
        stopped at may be far off, as it is where a series diverges; the response without ``H``
        stands in, and the status says so.
        """
        rhs = root * slope
        if self.settings.solver is None:
            return root * rhs

        def apply(vector: Tensor) -> Tensor:
            return root * product(root * vector) + vector if bool(vector.any()) else vector

        found = self.settings.solver.solve(LinearSystem(apply=apply, rhs=rhs), self._warm)
        is_usable = found.status not in _UNUSABLE
        self._warm = found.point if is_usable else None
        point = found.point if is_usable else rhs
        report.status = found.status.name.lower().replace("_", "-")
        report.residual = ((rhs - apply(point)).norm() / rhs.norm()).item()
        report.num_hvps = found.num_products + 1
        report.curvature = found.curvature - 1 if math.isfinite(found.curvature) else None
        return root * point

    def _move_outer(self, hypergradient: Tensor) -> int:
        """Moves routers and gates; returns how many links that closed."""
        tensors = self.passes.outer
        parts = list(hypergradient.split([tensor.numel() for tensor in tensors]))
        closed = 0
        if self._gate_steps is not None:
            closed = self._gate_steps.take(parts.pop())
        if self._outer_optimizer is not None:
            for tensor, part in zip(tensors, parts, strict=False):
                tensor.grad = part.view_as(tensor).to(tensor.dtype)
            self._outer_optimizer.step()
            self._outer_optimizer.zero_grad(set_to_none=True)
        return closed
