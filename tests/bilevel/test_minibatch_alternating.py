"""Mini-batches behind a probe: the same steps on whole data, and no rise beyond the allowance."""

import math
from itertools import pairwise
from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from drgr.bilevel import ProximalAlternating, StopReason, minimize_on_batches
from drgr.bilevel.alternation import State
from drgr.bilevel.probe import Probe
from drgr.numerics import soft_threshold

DOUBLE = torch.float64


class FiniteSum(NamedTuple):
    """Inner and outer losses that are means of quadratics over samples."""

    hessians: torch.Tensor
    couplings: torch.Tensor
    targets: torch.Tensor
    outer: torch.Tensor
    inner: torch.Tensor

    def inner_loss(self, x, y, batch):
        hessian, coupling = self.hessians[batch].mean(0), self.couplings[batch].mean(0)
        return y @ hessian @ y / 2 - y @ coupling @ x

    def outer_loss(self, x, y, batch):
        return (y - self.targets[batch]).square().sum(-1).mean() / 2 + 0.05 * x.square().sum()

    @property
    def start(self):
        return self.outer_loss, self.inner_loss, self.outer, self.inner

    def value(self, x):
        """The outer loss of all samples at the inner solution, by a dense solve."""
        y = torch.linalg.solve(self.hessians.mean(0), self.couplings.mean(0) @ x)
        return ((y - self.targets).square().sum(-1).mean() / 2 + 0.05 * x.square().sum()).item()

    def best_value(self):
        solution = torch.linalg.solve(self.hessians.mean(0), self.couplings.mean(0))
        normal = solution.T @ solution + 0.1 * torch.eye(len(self.outer), dtype=DOUBLE)
        return self.value(torch.linalg.solve(normal, solution.T @ self.targets.mean(0)))

    def merit(self, x, y, z, batch, weight):
        """The merit from dense matrices."""
        hessian, coupling = self.hessians[batch].mean(0), self.couplings[batch].mean(0)
        slope = hessian @ y - coupling @ x
        residual = hessian @ z - (y - self.targets[batch].mean(0))
        gaps = slope.square().sum() + residual.square().sum()
        return (self.outer_loss(x, y, batch) - z @ slope + weight / 2 * gaps).item()


def finite_sum(*, seed=0, samples=60, inner_size=6, outer_size=3, noise=0.3, least=0.3):
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(shape, generator=generator, dtype=DOUBLE)

    roots = normal(samples, inner_size, 2) * (noise / 2)
    spectrum = torch.linspace(least, 1, inner_size, dtype=DOUBLE)
    return FiniteSum(
        spectrum.diag() + roots @ roots.mT,
        (normal(inner_size, outer_size) + noise * normal(samples, inner_size, outer_size)) / 2,
        normal(inner_size) + noise * normal(samples, inner_size),
        normal(outer_size),
        normal(inner_size),
    )


def method(rate=0.4, weight=20.0, **options):
    return ProximalAlternating(
        inner_optimizer=lambda params: torch.optim.SGD(params, lr=rate),
        merit_weight=weight,
        **options,
    )


def drawing(samples, size):
    return lambda generator: torch.randint(samples, (size,), generator=generator)


def excess(solution):
    """By how much a step rose beyond its allowance."""
    rises = [after - before for before, after in pairwise(solution.merits)]
    assert len(rises) == len(solution.allowances)
    return max(
        (rise - allowed for rise, allowed in zip(rises, solution.allowances, strict=True)),
        default=0.0,
    )


@pytest.mark.parametrize(
    ("step_size", "threshold"), [(0.1, 0.0), (0.3, 0.05), (100.0, 0.0), (100.0, 0.05)]
)
def test_whole_batches_are_the_deterministic_method(step_size, threshold):
    problem, whole = finite_sum(), torch.arange(60)
    options = {}
    if threshold:
        options = {
            "prox": lambda x, step: soft_threshold(x, threshold=threshold * step),
            "penalty": lambda x: threshold * x.abs().sum(),
        }
    guarded = method(step_size=step_size, **options)
    expected = guarded.minimize(
        lambda x, y: problem.outer_loss(x, y, whole),
        lambda x, y: problem.inner_loss(x, y, whole),
        problem.outer,
        problem.inner,
        tolerance=1e-3,
    )
    solution = minimize_on_batches(
        guarded, *problem.start, draw=lambda _: whole, probe=[whole], tolerance=1e-3
    )
    assert solution.status is expected.status is StopReason.CONVERGED
    assert solution.num_accepted == expected.num_steps
    assert solution.merits == pytest.approx(expected.merits, rel=1e-12)
    torch.testing.assert_close(solution.outer_params, expected.outer_params)
    assert solution.num_inner_steps == expected.num_inner_steps
    assert solution.stationarity == pytest.approx(expected.stationarity)
    assert solution.step_size == expected.step_size


@settings(max_examples=10, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    noise=st.floats(0.01, 1.5),
    least=st.floats(0.05, 0.9),
    step_size=st.floats(-3, 2),
    size=st.integers(1, 30),
    num_probes=st.integers(2, 6),
    allowance=st.none() | st.just(0.0) | st.floats(1e-6, 1.0),
)
def test_no_kept_step_raises_the_merit_by_more_than_the_allowance(
    seed, noise, least, step_size, size, num_probes, allowance
):
    problem = finite_sum(seed=seed, noise=noise, least=least)
    probe = list(torch.arange(30).chunk(num_probes))
    solution = minimize_on_batches(
        method(rate=0.1, step_size=10.0**step_size, inner_steps=5),
        *problem.start,
        draw=drawing(60, size),
        probe=[batch[: 30 // num_probes] for batch in probe],
        allowance=allowance,
        max_trials=15,
    )
    assert excess(solution) <= 1e-9 * max(map(abs, solution.merits))
    assert solution.num_accepted + solution.num_rejected <= 15
    assert all(allowed >= 0 and math.isfinite(allowed) for allowed in solution.allowances)
    if allowance is not None:
        assert set(solution.allowances) <= {0.0, allowance}


def test_the_merit_is_that_of_the_probe():
    problem, probe = finite_sum(), [torch.arange(10), torch.arange(10, 20)]
    solution = minimize_on_batches(
        method(), *problem.start, draw=drawing(60, 8), probe=probe, max_trials=5
    )
    dense = problem.merit(
        solution.outer_params,
        solution.inner_params,
        solution.last.auxiliary,
        torch.arange(20),
        weight=20.0,
    )
    assert solution.merits[-1] == pytest.approx(dense, rel=1e-10)


def test_batches_come_close_to_the_solution_of_all_samples():
    problem = finite_sum(samples=400, noise=0.2)
    start, best = problem.value(problem.outer), problem.best_value()
    solution = minimize_on_batches(
        method(rate=0.1),
        *problem.start,
        draw=drawing(400, 40),
        probe=list(torch.arange(200).chunk(4)),
        allowance=None,
        max_trials=50,
    )
    assert problem.value(solution.outer_params) - best <= 0.01 * (start - best)
    assert solution.num_accepted > 20
    assert min(solution.allowances) >= 0 < max(solution.allowances)


def test_the_estimated_allowance_is_a_standard_error_of_the_merit():
    """Against the spread of the merit over probes drawn anew, from dense matrices."""
    problem, weight = finite_sum(samples=4000, noise=0.5), 20.0
    x, y = problem.outer, problem.inner
    after = x + 0.1, y + 0.05
    probes = torch.randperm(4000, generator=torch.Generator().manual_seed(1)).view(50, 8, 10)
    z = torch.linalg.solve(problem.hessians.mean(0), y - problem.targets.mean(0))

    def state(point):
        found = SimpleNamespace(auxiliary=z)
        return State(point[0], point[1], found, 0.0, 0.0, 0.0)

    def change(batch):
        # Without the linear residual, which the estimate leaves out.
        def value(x, y):
            hessian, coupling = problem.hessians[batch].mean(0), problem.couplings[batch].mean(0)
            slope = hessian @ y - coupling @ x
            gap = weight / 2 * slope.square().sum()
            return problem.outer_loss(x, y, batch) - z @ slope + gap

        return (value(*after) - value(x, y)).item()

    spread = torch.tensor([change(probe.flatten()) for probe in probes]).std().item()
    estimates = []
    for batches in probes:
        probe = Probe(
            outer_loss=problem.outer_loss,
            inner_loss=problem.inner_loss,
            batches=list(batches),
            merit_weight=weight,
            allowance=None,
        )
        estimates.append(probe.allowed((x, after[0]), state((x, y)), state(after)))
    assert torch.tensor(estimates).mean().item() == pytest.approx(spread, rel=0.25)


def test_the_same_generator_draws_the_same_steps():
    problem = finite_sum()

    def merits(seed):
        return minimize_on_batches(
            method(rate=0.1),
            *problem.start,
            draw=drawing(60, 8),
            probe=[torch.arange(30)],
            max_trials=8,
            generator=None if seed is None else torch.Generator().manual_seed(seed),
        ).merits

    assert merits(None) == merits(None) == merits(0)
    assert merits(1) == merits(1) != merits(2)


def test_noise_that_hides_every_gain_is_named():
    problem = finite_sum(noise=2.0)
    solution = minimize_on_batches(
        method(rate=0.2),
        *problem.start,
        draw=drawing(60, 1),
        probe=[torch.arange(60)],
        max_trials=2000,
    )
    assert solution.status is StopReason.NOISE
    assert "larger batches" in str(solution.status)
    assert solution.num_rejected >= 30
    assert excess(solution) <= 1e-9 * max(map(abs, solution.merits))


def test_the_limit_of_trials_says_so_and_counts():
    problem = finite_sum()
    drawn = []

    def draw(generator):
        drawn.append(torch.randint(60, (8,), generator=generator))
        return drawn[-1]

    solution = minimize_on_batches(
        method(rate=0.1, step_size=1e2),
        *problem.start,
        draw=draw,
        probe=[torch.arange(30)],
        max_trials=30,
    )
    assert solution.status is StopReason.MAX_STEPS
    assert solution.num_accepted > 0 < solution.num_rejected
    assert solution.num_batches == len(drawn)
    assert solution.num_inner_steps < solution.num_batches


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"probe": []}, "probe must hold a batch, got none"),
        ({"allowance": None}, "at least 2 batches to estimate an allowance, got 1"),
        ({"allowance": -1.0}, "allowance must be a finite number of at least 0, got -1"),
        ({"tolerance": 0.0}, "tolerance must be a finite number above 0, got 0"),
        ({"max_trials": 0}, "max_trials must be a finite number above 0, got 0"),
    ],
    ids=str,
)
def test_arguments_out_of_range(bad, message):
    problem = finite_sum()
    arguments = {"draw": drawing(60, 8), "probe": [torch.arange(30)]} | bad
    with pytest.raises(ValueError, match=message):
        minimize_on_batches(method(), *problem.start, **arguments)
