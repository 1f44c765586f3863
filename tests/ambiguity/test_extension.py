"""A divergence is one class: two written here, outside the package, and some that are wrong."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import pytest
import torch
from torch import Tensor

from drgr.ambiguity import (
    KL,
    Problem,
    SaddlePoint,
    Status,
    divergence_of_top,
    exact_saddle_point,
    restricted_to_top,
    worst_case,
)
from drgr.numerics import increasing_root


@dataclass(frozen=True)
class Burg:
    """Reverse Kullback-Leibler: ``f(r) = -log r + r - 1``; weights ``p lam / (nu - l)``."""

    has_level: ClassVar[bool] = True

    def generator(self, log_ratio: Tensor) -> Tensor:
        return torch.expm1(log_ratio) - log_ratio

    def conjugate(self, slope: Tensor) -> Tensor:
        return -torch.log1p(-slope)

    def limit(self, problem: Problem) -> Tensor:
        return restricted_to_top(problem)

    def saturation_radius(self, problem: Problem) -> Tensor:
        return divergence_of_top(self.generator, problem)

    def constrained(self, problem: Problem, radius: Tensor) -> SaddlePoint:
        def residual(log_level: Tensor) -> tuple[Tensor, Tensor]:
            saddle = self._at(problem, log_level.exp())
            spent = problem.mean(self.generator(saddle.log_ratio))
            return radius - spent, torch.full_like(radius, torch.nan)

        ends = torch.full_like(radius, 60.0)
        root = increasing_root(residual, start=0 * ends, lower=-ends, upper=ends, tolerance=1e-13)
        return self._at(problem, root.point.exp())

    def penalized(self, problem: Problem, penalty: Tensor) -> SaddlePoint:
        def residual(level: Tensor) -> tuple[Tensor, Tensor]:
            return self._at(problem, level).multiplier - penalty, torch.full_like(level, torch.nan)

        top = problem.mean(problem.is_top().double())
        root = increasing_root(
            residual, start=penalty, lower=penalty * top, upper=penalty, tolerance=0.0
        )
        return self._at(problem, root.point)

    def _at(self, problem: Problem, level: Tensor) -> SaddlePoint:
        inverse = 1 / (level.unsqueeze(-1) - problem.losses)
        multiplier = 1 / problem.mean(inverse)
        return exact_saddle_point(
            log_ratio=(multiplier.unsqueeze(-1) * inverse).log(),
            multiplier=multiplier,
            threshold=level - multiplier,
        )


@dataclass(frozen=True)
class TailMean:
    """Conditional value at risk: ``q <= p / level``; it takes no radius and no penalty."""

    level: float
    has_level: ClassVar[bool] = False

    def generator(self, log_ratio: Tensor) -> Tensor:
        return torch.zeros_like(log_ratio)

    def conjugate(self, slope: Tensor) -> Tensor:
        return slope.clamp_min(0) / self.level

    def limit(self, problem: Problem) -> Tensor:
        raise NotImplementedError

    def saturation_radius(self, problem: Problem) -> Tensor:
        raise NotImplementedError

    def constrained(self, problem: Problem, radius: Tensor) -> SaddlePoint:
        raise NotImplementedError

    def penalized(self, problem: Problem, penalty: Tensor) -> SaddlePoint:
        losses, order = problem.losses.sort(dim=-1, descending=True)
        mass = problem.nominal.gather(-1, order)
        taken = (self.level - (mass.cumsum(-1) - mass)).clamp_min(0).minimum(mass) / self.level
        log_ratio = torch.zeros_like(mass).scatter(-1, order, (taken / mass).log())
        last = (taken > 0).sum(-1, keepdim=True) - 1
        threshold = losses.gather(-1, last).squeeze(-1)
        return exact_saddle_point(log_ratio=log_ratio, multiplier=penalty, threshold=threshold)


@dataclass(frozen=True)
class Broken:
    """KL with a solver that returns ``log_ratio`` and says whether it ran out of steps."""

    log_ratio: float
    exhausted: bool = False
    has_level: ClassVar[bool] = True

    def generator(self, log_ratio: Tensor) -> Tensor:
        return KL().generator(log_ratio)

    def conjugate(self, slope: Tensor) -> Tensor:
        return KL().conjugate(slope)

    def limit(self, problem: Problem) -> Tensor:
        return KL().limit(problem)

    def saturation_radius(self, problem: Problem) -> Tensor:
        return KL().saturation_radius(problem)

    def constrained(self, problem: Problem, radius: Tensor) -> SaddlePoint:
        return self.penalized(problem, radius)

    def penalized(self, problem: Problem, penalty: Tensor) -> SaddlePoint:
        right = KL().penalized(problem, penalty)
        return SaddlePoint(
            log_ratio=torch.full_like(right.log_ratio, self.log_ratio),
            multiplier=right.multiplier,
            threshold=right.threshold,
            exhausted=torch.full_like(penalty, self.exhausted, dtype=torch.bool),
        )


LOSSES = torch.tensor([[0.3, 2.0, -1.0, 1.5], [5.0, 5.0, 1.0, 0.0]], dtype=torch.float64)
NOMINAL = torch.tensor([0.3, 0.1, 0.4, 0.2], dtype=torch.float64)


@pytest.mark.parametrize("radius", [1e-6, 0.1, 3.0])
def test_a_new_divergence_is_certified_without_further_code(radius):
    result = worst_case(LOSSES, divergence=Burg(), radius=radius, nominal=NOMINAL)
    assert result.status is Status.CONVERGED
    q, p = result.weights.numpy(), NOMINAL.numpy()
    np.testing.assert_allclose((p * np.log(p / q)).sum(-1), radius, rtol=1e-6)


def test_a_new_penalized_divergence_has_the_right_gradient():
    losses = LOSSES.clone().requires_grad_()
    result = worst_case(losses, divergence=Burg(), penalty=0.7, nominal=NOMINAL)
    assert result.status is Status.CONVERGED
    (gradient,) = torch.autograd.grad(result.value.sum(), losses)
    step = 1e-6 * torch.randn_like(LOSSES)
    ahead = worst_case(LOSSES + step, divergence=Burg(), penalty=0.7, nominal=NOMINAL).value
    torch.testing.assert_close(
        ahead - result.value.detach(), (gradient * step).sum(-1), rtol=1e-4, atol=1e-11
    )


def test_a_divergence_without_level():
    result = worst_case(torch.arange(1.0, 11.0), divergence=TailMean(0.25))
    assert result.value.item() == pytest.approx(9.2)
    assert result.status is Status.CONVERGED
    mean = worst_case(LOSSES, divergence=TailMean(1.0), nominal=NOMINAL)
    torch.testing.assert_close(mean.value, LOSSES @ NOMINAL)


@pytest.mark.parametrize("level", [{"radius": 0.1}, {"penalty": 1.0}])
def test_a_divergence_without_level_refuses_one(level):
    with pytest.raises(ValueError, match=r"TailMean\(level=0.5\) fixes its own size"):
        worst_case(LOSSES, divergence=TailMean(0.5), **level)


@pytest.mark.parametrize(
    ("broken", "expected"),
    [
        (Broken(0.0), Status.INACCURATE),
        (Broken(0.3), Status.INACCURATE),
        (Broken(0.0, exhausted=True), Status.MAX_STEPS),
        (Broken(float("nan")), Status.NON_FINITE),
    ],
)
@pytest.mark.parametrize("level", ["radius", "penalty"])
def test_a_wrong_solver_cannot_pass(broken, expected, level):
    result = worst_case(LOSSES, divergence=broken, nominal=NOMINAL, **{level: 0.5})
    assert result.status is expected
    if expected is not Status.NON_FINITE:
        torch.testing.assert_close(result.weights.sum(-1), torch.ones(2, dtype=torch.float64))
    assert not result.status.succeeded
    assert len(result.status.value) > 20


def test_weights_outside_the_ball_are_moved_into_it():
    @dataclass(frozen=True)
    class TooFar(Broken):
        def constrained(self, problem: Problem, radius: Tensor) -> SaddlePoint:
            return KL().constrained(problem, radius * 1.1)

    result = worst_case(LOSSES, divergence=TooFar(0.0), radius=0.1, nominal=NOMINAL)
    assert (result.divergence <= 0.1).all()
    assert result.status is Status.INACCURATE
    # The dual point is still valid, so value and gap enclose the truth.
    truth = worst_case(LOSSES, divergence=KL(), radius=0.1, nominal=NOMINAL).value
    assert (result.value <= truth).all()
    assert (truth <= result.value + result.gap).all()
