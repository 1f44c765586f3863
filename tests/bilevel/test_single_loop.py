"""The machine of the single-loop methods, and its plain estimators."""

import gc
import io
import itertools
import math
import weakref
from collections.abc import Sequence

import pytest
import torch

from drgr.bilevel import (
    F2SA,
    MASOBA,
    SABA,
    SOBA,
    SRBA,
    AmIGO,
    Directions,
    FiniteSumProblem,
    GalerkinSOBA,
    OracleCalls,
    SingleLoop,
    Start,
    StocBiO,
    SubspaceSOBA,
)
from drgr.errors import NonFiniteLossError
from drgr.numerics import project_simplex, soft_threshold

DOUBLE = torch.float64
X = torch.tensor([0.3, -0.2, 0.5], dtype=DOUBLE)
Y = torch.tensor([0.1, 0.7, -0.4, 0.2], dtype=DOUBLE)


def sgd(rate=0.2, **arguments):
    return lambda params: torch.optim.SGD(params, lr=rate, **arguments)


def loop(estimator=None, **arguments):
    settings = {"inner_optimizer": sgd(), "auxiliary_step": 0.1, "outer_step": 0.05}
    return SingleLoop(estimator=estimator or SOBA(), **(settings | arguments))


def started(method, problem, z=None, x=X, y=Y):
    """A run at given variables."""
    run = method.start(problem, x, y, generator=torch.Generator().manual_seed(3))
    if z is not None:
        state = run.state_dict()
        state["auxiliary"] = z.clone()
        run.load_state_dict(state)
    return run


@pytest.mark.parametrize("mode", ["double-backward", "forward-over-reverse", "central-difference"])
def test_a_step_of_soba_is_its_formula(quadratic_sum, drawn, monkeypatch, mode):
    sums, z = quadratic_sum(), torch.tensor([1.0, -0.5, 0.3, 0.8], dtype=DOUBLE)
    drawn(monkeypatch, 2, 1)
    run = started(loop(hvp=mode, damping=0.3), sums.problem, z)
    run.advance()
    result = run.result()
    by_y, by_z, by_x = sums.directions(X, Y, z, slice(2, 3), slice(1, 2))
    tolerance = {"rtol": 1e-6, "atol": 1e-8} if mode == "central-difference" else {}
    torch.testing.assert_close(result.inner_params, Y - 0.2 * by_y, **tolerance)
    torch.testing.assert_close(result.auxiliary, z - 0.1 * (by_z + 0.3 * z), **tolerance)
    torch.testing.assert_close(result.outer_params, X - 0.05 * by_x, **tolerance)
    curvature = (z @ sums.inner[0][2] @ z / (z @ z)).item()
    assert result.curvature == pytest.approx(curvature, rel=1e-6)
    assert result.num_negative_curvatures == 0
    assert result.calls == OracleCalls(
        inner_gradients=1, hessian_products=1, cross_products=1, outer_gradients=1
    )


def test_directions_of_soba_are_unbiased(quadratic_sum, drawn, monkeypatch):
    """The mean of a step of size 1 over all pairs of batches is the step on all batches."""
    sums, z = quadratic_sum(), torch.tensor([1.0, -0.5, 0.3, 0.8], dtype=DOUBLE)
    method = loop(inner_optimizer=sgd(1.0), auxiliary_step=1.0, outer_step=1.0)
    moves = []
    for inner, outer in itertools.product(range(5), range(3)):
        drawn(monkeypatch, inner, outer)
        run = started(method, sums.problem, z)
        run.advance()
        result = run.result()
        moves.append([Y - result.inner_params, z - result.auxiliary, X - result.outer_params])
    for found, expected in zip(zip(*moves, strict=True), sums.directions(X, Y, z), strict=True):
        torch.testing.assert_close(torch.stack(found).mean(dim=0), expected)


def test_batches_are_drawn_uniformly(quadratic_sum):
    run = loop().start(quadratic_sum().problem, X, Y)
    for draw, count in ((run._oracle.draw_inner, 5), (run._oracle.draw_outer, 3)):
        found = torch.bincount(torch.tensor([draw() for _ in range(3000)]), minlength=count)
        assert len(found) == count
        assert (found / 3000 - 1 / count).abs().max() < 0.04


def test_steps_of_ma_soba_are_their_formula(quadratic_sum, drawn, monkeypatch):
    sums = quadratic_sum()
    drawn(monkeypatch, 4, 2)
    result = loop(MASOBA(weight=0.25)).minimize(sums.problem, X, Y, num_steps=3)
    x, y, z, average = X, Y, torch.zeros_like(Y), torch.zeros_like(X)
    for _ in range(3):
        by_y, by_z, by_x = sums.directions(x, y, z, slice(4, 5), slice(2, 3))
        y, z, x = y - 0.2 * by_y, z - 0.1 * by_z, x - 0.05 * average
        average = 0.75 * average + 0.25 * by_x
    torch.testing.assert_close(result.outer_params, x)
    torch.testing.assert_close(result.inner_params, y)
    torch.testing.assert_close(result.auxiliary, z)


def test_schedules_are_functions_of_the_step(quadratic_sum, drawn, monkeypatch):
    sums = quadratic_sum()
    drawn(monkeypatch, 0, 0)
    method = loop(
        auxiliary_step=lambda step: 0.1 / (step + 1),
        outer_step=lambda step: 0.2 / (step + 2),
        inner_schedule=lambda step: 1 / (step + 1) ** 0.5,
    )
    result = method.minimize(sums.problem, X, Y, num_steps=3)
    x, y, z = X, Y, torch.zeros_like(Y)
    for step in range(3):
        by_y, by_z, by_x = sums.directions(x, y, z, slice(1), slice(1))
        y = y - 0.2 / (step + 1) ** 0.5 * by_y
        z, x = z - 0.1 / (step + 1) * by_z, x - 0.2 / (step + 2) * by_x
    torch.testing.assert_close(result.outer_params, x)
    torch.testing.assert_close(result.inner_params, y)


ESTIMATORS = [
    SOBA(),
    MASOBA(),
    SABA(),
    SRBA(period=4),
    AmIGO(inner_steps=2, linear_steps=2),
    StocBiO(inner_steps=2, num_products=2),
    F2SA(inner_steps=2, penalty=2.0),
    SubspaceSOBA(rank=2, period=3, correction="probe"),
    SubspaceSOBA(rank=2, period=3, correction="independent"),
    GalerkinSOBA(rank=2, period=3, warmup=2),
    SubspaceSOBA(rank=2, period=3, subspaces="signs"),
    GalerkinSOBA(rank=2, period=3, warmup=2, subspaces="signs"),
]


@pytest.mark.parametrize("estimator", ESTIMATORS, ids=repr)
def test_a_run_does_not_keep_the_first_parameters(quadratic_sum, estimator):
    first = X.clone(), Y.clone()
    watched = [weakref.ref(tensor) for tensor in first]
    run = loop(estimator).start(quadratic_sum().problem, *first)
    del first
    gc.collect()
    assert [reference() for reference in watched] == [None, None]
    run.advance(2)
    assert run.result().inner_params.shape == Y.shape


@pytest.mark.parametrize("estimator", ESTIMATORS, ids=repr)
@pytest.mark.parametrize(
    "optimizer", [sgd(momentum=0.9), lambda params: torch.optim.Adam(params, lr=0.01)]
)
def test_a_restored_run_goes_on_bit_for_bit(quadratic_sum, estimator, optimizer):
    problem = quadratic_sum().problem
    method = loop(
        estimator,
        inner_optimizer=optimizer,
        auxiliary_step=0.02,
        outer_step=lambda step: 0.02 / (step + 1) ** 0.5,
    )
    straight = method.start(problem, X, Y, generator=torch.Generator().manual_seed(1))
    straight.advance(13)
    first = method.start(problem, X, Y, generator=torch.Generator().manual_seed(1))
    first.advance(7)
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    first.advance(2)
    file.seek(0)
    zeros = torch.zeros_like(X), torch.zeros_like(Y)
    second = method.start(problem, *zeros, generator=torch.Generator().manual_seed(99))
    second.load_state_dict(torch.load(file, weights_only=True))
    second.advance(6)
    expected, found = straight.result(), second.result()
    for name in ("outer_params", "inner_params", "auxiliary"):
        assert torch.equal(getattr(found, name), getattr(expected, name)), name
    assert found.calls == expected.calls
    assert found.num_steps == expected.num_steps == 13
    assert found.curvature == expected.curvature
    assert found.state_numel == expected.state_numel
    # The saved state is a copy: a run that went on did not change it.
    state = second.state_dict()
    second.advance(3)
    first.load_state_dict(state)
    copy = first.result()
    for name in ("outer_params", "inner_params", "auxiliary"):
        assert torch.equal(getattr(copy, name), getattr(expected, name)), name


def test_nested_parameters_of_several_dtypes(quadratic_sum, drawn, monkeypatch):
    sums = quadratic_sum()
    drawn(monkeypatch, 1, 1)

    def flat(loss):
        return lambda x, y, batch: loss(
            torch.cat([x["a"], x["b"][0].reshape(1)]),
            torch.cat([y[0].double().reshape(-1), y[1]["c"]]),
            batch,
        )

    plain = sums.problem
    nested = FiniteSumProblem(
        inner_loss=flat(plain.inner_loss),
        outer_loss=flat(plain.outer_loss),
        inner_batches=plain.inner_batches,
        outer_batches=plain.outer_batches,
    )
    x = {"a": X[:2], "b": [X[2]]}
    y = (Y[:2].float().reshape(1, 2), {"c": Y[2:]})
    adam = loop(inner_optimizer=lambda params: torch.optim.Adam(params, lr=0.01))
    found = adam.minimize(nested, x, y, num_steps=5)
    expected = adam.minimize(plain, X, Y.clone(), num_steps=5)
    torch.testing.assert_close(
        found.outer_params["b"][0], expected.outer_params[2], rtol=1e-5, atol=1e-6
    )
    assert found.inner_params[0].shape == (1, 2)
    assert found.inner_params[0].dtype == torch.float32
    torch.testing.assert_close(
        found.inner_params[1]["c"], expected.inner_params[2:], rtol=1e-5, atol=1e-6
    )
    assert torch.equal(y[1]["c"], Y[2:])


def test_a_projection_is_honoured_at_every_step(quadratic_sum):
    x = torch.full((3,), 1 / 3, dtype=DOUBLE)
    method = loop(prox=lambda x, _step: project_simplex(x))
    run = method.start(quadratic_sum().problem, x, Y)
    for _ in range(20):
        run.advance()
        mixture = run.result().outer_params
        assert mixture.sum().item() == pytest.approx(1)
        assert (mixture >= 0).all()


def test_a_proximal_map_gets_the_step_size(quadratic_sum, drawn, monkeypatch):
    sums = quadratic_sum()
    drawn(monkeypatch, 0, 0)
    method = loop(
        outer_step=lambda step: 0.5 / (step + 1),
        prox=lambda x, step: soft_threshold(x, threshold=0.8 * step),
    )
    result = method.minimize(sums.problem, X, Y, num_steps=1)
    by_x = sums.directions(X, Y, torch.zeros_like(Y), slice(1), slice(1))[2]
    moved = X - 0.5 * by_x
    torch.testing.assert_close(result.outer_params, moved.sign() * (moved.abs() - 0.4).clamp_min(0))
    assert 0 < (result.outer_params == 0).sum() < 3


def test_plain_methods_reach_the_stationary_point_of_all_batches(quadratic_sum):
    """Falling steps average the noise away."""
    sums = quadratic_sum()
    start = sums.value_gradient(X).norm()
    for estimator in (SOBA(), MASOBA()):
        method = loop(
            estimator,
            auxiliary_step=lambda step: 0.5 / (step + 4) ** 0.5,
            inner_schedule=lambda step: 2.5 / (step + 4) ** 0.5,
            outer_step=lambda step: 0.2 / (step + 4) ** 0.5,
        )
        result = method.minimize(sums.problem, X, Y, num_steps=400)
        assert sums.value_gradient(result.outer_params).norm() < 0.3 * start


def test_negative_curvature_along_the_auxiliary_is_reported(drawn, monkeypatch):
    problem = FiniteSumProblem(
        inner_loss=lambda x, y, _batch: (y[0] ** 2 - y[1] ** 2) / 2 + x.sum() * y.sum(),
        outer_loss=lambda x, y, _batch: y[1] + x.sum(),
        inner_batches=range(1),
        outer_batches=range(1),
    )
    x = torch.zeros(1, dtype=DOUBLE)
    result = loop().minimize(problem, x, torch.zeros(2, dtype=DOUBLE), num_steps=4)
    # In the first step z is 0, then it moves along the second entry alone.
    assert result.curvature == pytest.approx(-1)
    assert result.num_negative_curvatures == 3
    damped = loop(damping=2.0).minimize(problem, x, torch.zeros(2, dtype=DOUBLE), num_steps=4)
    assert damped.curvature == pytest.approx(-1)


def test_state_is_counted(quadratic_sum):
    problem = quadratic_sum().problem
    adam = {"inner_optimizer": lambda params: torch.optim.Adam(params, lr=0.01)}
    plain = loop(**adam).minimize(problem, X, Y, num_steps=1)
    assert plain.state_numel == 4 + 2 * 4 + 1  # z, two moments, the number of Adam's step
    averaged = loop(MASOBA()).minimize(problem, X, Y, num_steps=1)
    assert averaged.state_numel == 4 + 3
    tables = loop(SABA()).minimize(problem, X, Y, num_steps=1)
    assert tables.state_numel == 4 + (5 + 1) * (4 + 4 + 3) + (3 + 1) * (4 + 3)


def test_batches_of_any_kind():
    def made(batches):
        return FiniteSumProblem(
            inner_loss=lambda x, y, batch: (y - x * batch).square().mean(),
            outer_loss=lambda _x, y, batch: (y - batch).square().mean(),
            inner_batches=batches,
            outer_batches=[1.0, 2.0],
        )

    data = torch.arange(6, dtype=DOUBLE)
    loader = torch.utils.data.DataLoader(data.tolist(), batch_size=2)
    zero = torch.tensor(0.5, dtype=DOUBLE)
    results = [
        loop().minimize(made(batches), zero, zero, num_steps=9).outer_params
        for batches in (data.split(2), iter(data.split(2)), loader, list(data.split(2)))
    ]
    for result in results[1:]:
        assert torch.equal(result, results[0])

    class Lazy(Sequence):
        def __len__(self):
            return 1000

        def __getitem__(self, index):
            return data[index % 6]

    assert len(made(Lazy()).inner_batches) == 1000


def test_an_estimator_of_ones_own(quadratic_sum):
    class Nothing:
        def start(self, _oracle, point):
            return Start(point.auxiliary, {})

        def directions(self, *_arguments):
            yield Directions()

    result = loop(Nothing()).minimize(quadratic_sum().problem, X, Y, num_steps=2)
    assert torch.equal(result.outer_params, X)
    assert result.calls.total == 0


def test_losses_that_ignore_variables(drawn, monkeypatch):
    drawn(monkeypatch, 0, 0)
    problem = FiniteSumProblem(
        inner_loss=lambda _x, y, _batch: y.sum(),
        outer_loss=lambda x, _y, _batch: x.sum(),
        inner_batches=[0],
        outer_batches=[0],
    )
    result = loop().minimize(problem, X, Y, num_steps=1)
    torch.testing.assert_close(result.outer_params, X - 0.05)
    torch.testing.assert_close(result.inner_params, Y - 0.2)
    unrelated = FiniteSumProblem(
        inner_loss=lambda _x, _y, _batch: torch.tensor(1.0),
        outer_loss=lambda x, _y, _batch: x.sum(),
        inner_batches=[0],
        outer_batches=[0],
    )
    for estimator in (SOBA(), AmIGO()):
        with pytest.raises(ValueError, match="inner_loss does not depend on inner_params"):
            loop(estimator).minimize(unrelated, X, Y, num_steps=1)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_losses_and_directions_that_are_not_finite(quadratic_sum, bad):
    problem = FiniteSumProblem(
        inner_loss=lambda x, y, _batch: (y.sum() - x.sum()) * bad,
        outer_loss=lambda _x, y, _batch: y.sum(),
        inner_batches=[0],
        outer_batches=[0],
    )
    with pytest.raises(NonFiniteLossError, match=r"step 0: inner_loss must be finite.*lower outer"):
        loop().minimize(problem, X, Y, num_steps=1)
    rooted = FiniteSumProblem(
        inner_loss=lambda _x, y, _batch: (y - Y).abs().sqrt().sum(),
        outer_loss=lambda _x, y, _batch: y.sum(),
        inner_batches=[0],
        outer_batches=[0],
    )
    with pytest.raises(NonFiniteLossError, match="step 0: the inner direction is not finite; lo"):
        loop().minimize(rooted, X, Y, num_steps=1)


def test_steps_that_diverge(quadratic_sum):
    problem = quadratic_sum().problem
    with pytest.raises(NonFiniteLossError, match=r"step \d+: .*lower outer_step"):
        loop(inner_optimizer=sgd(1e30)).minimize(problem, X, Y, num_steps=50)
    with pytest.raises(NonFiniteLossError, match="the outer variable is not finite"):
        loop(prox=lambda x, _step: x * math.inf).minimize(problem, X, Y, num_steps=1)


def test_arguments_out_of_range(quadratic_sum):
    problem = quadratic_sum().problem
    with pytest.raises(ValueError, match="damping must be a finite number of at least 0, got -1"):
        loop(damping=-1.0)
    with pytest.raises(ValueError, match=r"hvp must be one of .*got 'reverse'"):
        loop(hvp="reverse")
    with pytest.raises(ValueError, match=r"weight must lie in \(0, 1\], got 0"):
        MASOBA(weight=0.0)
    with pytest.raises(ValueError, match=r"outer_step at step 1 must be .* at least 0, got -1"):
        loop(outer_step=lambda step: -step).minimize(problem, X, Y, num_steps=2)
    with pytest.raises(ValueError, match="inner_batches is empty"):
        FiniteSumProblem(
            inner_loss=problem.inner_loss,
            outer_loss=problem.outer_loss,
            inner_batches=[],
            outer_batches=[1],
        )
    with pytest.raises(ValueError, match="got LBFGS, which calls for losses; take SGD or Adam"):
        loop(inner_optimizer=torch.optim.LBFGS).minimize(problem, X, Y, num_steps=1)
    with pytest.raises(ValueError, match="the result of prox must have the structure"):
        loop(prox=lambda x, _step: x[:1]).minimize(problem, X, Y, num_steps=1)
    with pytest.raises(ValueError, match="num_steps must be a finite number of at least 0, got -1"):
        loop().minimize(problem, X, Y, num_steps=-1)
    with pytest.raises(TypeError, match=r"inner_params must be a floating-point tensor"):
        loop().start(problem, X, torch.tensor([1]))


def test_a_state_of_another_run(quadratic_sum):
    problem = quadratic_sum().problem
    run = loop().start(problem, X, Y)
    state = loop(MASOBA()).start(problem, X, Y).state_dict()
    with pytest.raises(ValueError, match="the state is of estimator 'MASOBA', not 'SOBA'"):
        run.load_state_dict(state)
    other = loop().start(problem, X[:2], Y).state_dict()
    with pytest.raises(ValueError, match=r"outer of the state has shape \(2,\), this run \(3,\)"):
        run.load_state_dict(other)
