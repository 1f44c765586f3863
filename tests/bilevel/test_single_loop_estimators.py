"""Estimators of single-loop methods against dense formulas, their means and their rates."""

import itertools
from dataclasses import replace

import pytest
import torch

from drgr.bilevel import (
    F2SA,
    SABA,
    SOBA,
    SRBA,
    AmIGO,
    BlockWise,
    FiniteSumProblem,
    OracleCalls,
    SingleLoop,
    StocBiO,
)

DOUBLE = torch.float64
X = torch.tensor([0.3, -0.2, 0.5], dtype=DOUBLE)
Y = torch.tensor([0.1, 0.7, -0.4, 0.2], dtype=DOUBLE)
ZERO = torch.zeros_like(Y)


def sgd(rate):
    return lambda params: torch.optim.SGD(params, lr=rate)


def loop(estimator, rate=0.2, auxiliary_step=0.1, outer_step=0.05):
    return SingleLoop(
        estimator=estimator,
        inner_optimizer=sgd(rate),
        auxiliary_step=auxiliary_step,
        outer_step=outer_step,
    )


def one(index):
    return slice(index, index + 1)


def variables(run):
    result = run.result()
    return result.inner_params, result.auxiliary, result.outer_params


def moves(run, state):
    """The move of each variable in the next step from a saved state, as a direction."""
    run.load_state_dict(state)
    before = variables(run)
    run.advance()
    return [old - new for old, new in zip(before, variables(run), strict=True)]


def test_saba_follows_its_tables(quadratic_sum, drawn, monkeypatch):
    """Three steps with the tables written out."""
    sums = quadratic_sum()
    run = loop(SABA()).start(sums.problem, X, Y)
    assert run.result().calls.total == 5 * 3 + 3
    x, y, z = X, Y, ZERO
    hessians, _, crosses, linear, _ = sums.inner

    def inner_rows(i):
        slope = hessians[i] @ y + crosses[i].T @ x + linear[i]
        return [slope, hessians[i] @ z, crosses[i] @ z]

    inner = [inner_rows(i) for i in range(5)]
    outer = [list(sums.outer_gradients(x, y, one(j))) for j in range(3)]

    def reduced(table, index, new):
        found = [
            new[k] - table[index][k] + sum(row[k] for row in table) / len(table)
            for k in range(len(new))
        ]
        table[index] = new
        return found

    for i, j in ((3, 0), (1, 2), (3, 0)):
        drawn(monkeypatch, i, j)
        run.advance()
        slope, hessian, cross = reduced(inner, i, inner_rows(i))
        by_inner, by_outer = reduced(outer, j, list(sums.outer_gradients(x, y, one(j))))
        y, z, x = y - 0.2 * slope, z - 0.1 * (hessian - by_inner), x - 0.05 * (by_outer - cross)
        for found, expected in zip(variables(run), (y, z, x), strict=True):
            torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("estimator", [SABA(), SRBA(period=100)], ids=repr)
def test_variance_reduction_keeps_the_mean(quadratic_sum, drawn, monkeypatch, estimator):
    """Over all pairs of batches the mean direction is exact, for SRBA given an exact start."""
    sums = quadratic_sum()
    run = loop(estimator, rate=1.0, auxiliary_step=1.0, outer_step=1.0)
    small = loop(estimator, rate=0.1, auxiliary_step=0.1, outer_step=0.1)
    begun = small.start(sums.problem, X, Y)
    begun.advance(1)  # a full pass for SRBA
    state = begun.state_dict()
    run = run.start(sums.problem, X, Y)
    y, z, x = variables(begun)
    found = []
    for pair in itertools.product(range(5), range(3)):
        drawn(monkeypatch, *pair)
        state["inner"]["optimizer"]["param_groups"][0]["lr"] = 1.0
        found.append(moves(run, state))
    means = [torch.stack(parts).mean(dim=0) for parts in zip(*found, strict=True)]
    for mean, expected in zip(means, sums.directions(x, y, z), strict=True):
        torch.testing.assert_close(mean, expected)
    spread = torch.stack([parts[0] for parts in found]).std(dim=0).max()
    assert spread > 1e-3  # the draws mattered


def test_srba_takes_a_full_pass_every_period(quadratic_sum):
    sums = quadratic_sum()
    run = loop(SRBA(period=3)).start(sums.problem, X, Y)
    costs, directions = [], []
    for _ in range(7):
        before, calls = variables(run), run.result().calls.total
        run.advance()
        costs.append(run.result().calls.total - calls)
        y, z, x = before
        exact = sums.directions(x, y, z)[0]
        directions.append((0.2 * exact - (y - variables(run)[0])).norm().item())
    assert costs == [18, 8, 8, 18, 8, 8, 18]
    assert all((gap < 1e-14) == (step % 3 == 0) for step, gap in enumerate(directions))


def test_a_step_of_srba_adds_a_difference_on_one_pair(quadratic_sum, drawn, monkeypatch):
    sums = quadratic_sum()
    drawn(monkeypatch, 2, 1)
    run = loop(SRBA(period=10)).start(sums.problem, X, Y)
    run.advance()
    first = sums.directions(X, Y, ZERO)
    y, z, x = Y - 0.2 * first[0], ZERO - 0.1 * first[1], X - 0.05 * first[2]
    run.advance()
    new = sums.directions(x, y, z, one(2), one(1))
    old = sums.directions(X, Y, ZERO, one(2), one(1))
    steps = (0.2, 0.1, 0.05)
    for found, before, step, d, n, o in zip(
        variables(run), (y, z, x), steps, first, new, old, strict=True
    ):
        torch.testing.assert_close(found, before - step * (d + n - o))


@pytest.mark.slow
@pytest.mark.parametrize("estimator", [SABA(), SRBA(period=5)], ids=repr)
def test_variance_reduction_converges_linearly_with_constant_steps(quadratic_sum, estimator):
    sums = quadratic_sum()
    run = loop(estimator, rate=0.15, auxiliary_step=0.15, outer_step=0.08).start(sums.problem, X, Y)
    norms = []
    for _ in range(4):
        run.advance(120)
        norms.append(sums.value_gradient(run.result().outer_params).norm().item())
    assert norms[-1] < 1e-6
    assert all(
        after < 0.2 * before for before, after in itertools.pairwise(norms) if before > 1e-12
    )
    plain = loop(SOBA(), rate=0.15, auxiliary_step=0.15, outer_step=0.08)
    noisy = plain.minimize(sums.problem, X, Y, num_steps=200)
    assert sums.value_gradient(noisy.outer_params).norm() > 1e-4


@pytest.mark.parametrize("mode", ["double-backward", "forward-over-reverse"])
def test_amigo_is_its_phases(quadratic_sum, drawn, monkeypatch, mode):
    sums = quadratic_sum()
    drawn(monkeypatch, 4, 0)
    method = replace(loop(AmIGO(inner_steps=3, linear_steps=2)), hvp=mode)
    result = method.minimize(sums.problem, X, Y, num_steps=2)
    x, y, z = X, Y, ZERO
    for _ in range(2):
        for _ in range(3):
            y = y - 0.2 * sums.directions(x, y, z, one(4), one(0))[0]
        for _ in range(2):
            z = z - 0.1 * sums.directions(x, y, z, one(4), one(0))[1]
        x = x - 0.05 * sums.directions(x, y, z, one(4), one(0))[2]
    torch.testing.assert_close(result.inner_params, y)
    torch.testing.assert_close(result.auxiliary, z)
    torch.testing.assert_close(result.outer_params, x)
    assert result.calls == OracleCalls(
        inner_gradients=6, hessian_products=4, cross_products=2, outer_gradients=2
    )


def test_stocbio_sums_a_neumann_series(quadratic_sum, drawn, monkeypatch):
    sums = quadratic_sum()
    drawn(monkeypatch, 4, 0)
    method = loop(StocBiO(inner_steps=2, num_products=3), auxiliary_step=0.3)
    run = method.start(sums.problem, X, Y)
    run.advance()
    y = Y
    for _ in range(2):
        y = y - 0.2 * sums.directions(X, y, ZERO, one(4), one(0))[0]
    right, by_outer = sums.outer_gradients(X, y, one(0))
    shrink = torch.eye(4, dtype=DOUBLE) - 0.3 * sums.inner[0][4]
    z = 0.3 * sum(torch.linalg.matrix_power(shrink, q) @ right for q in range(4))
    torch.testing.assert_close(run.result().auxiliary, z)
    expected = X - 0.05 * (by_outer - sums.inner[2][4] @ z)
    torch.testing.assert_close(run.result().outer_params, expected)
    assert run.result().calls == OracleCalls(
        inner_gradients=2, hessian_products=3, cross_products=1, outer_gradients=1
    )
    run.advance()  # forgets z: the same series again from the new point
    y, z, _ = variables(run)
    right, _ = sums.outer_gradients(expected, y, one(0))
    torch.testing.assert_close(
        z, 0.3 * sum(torch.linalg.matrix_power(shrink, q) @ right for q in range(4))
    )
    assert run.result().calls.hessian_products == 6


def test_f2sa_is_its_formula(quadratic_sum, drawn, monkeypatch):
    sums = quadratic_sum()
    drawn(monkeypatch, 1, 2)
    method = loop(F2SA(inner_steps=2, penalty=3.0, increment=0.5, decay=0.5))
    run = method.start(sums.problem, X, Y)
    run.advance(2)
    x, y, u = X, Y, Y
    cross = sums.inner[2][1]
    for step in range(2):
        penalty = 3.0 if step == 0 else 3.5
        for _ in range(2):
            slope, tilted = (sums.directions(x, v, ZERO, one(1))[0] for v in (y, u))
            by_u = tilted + sums.outer_gradients(x, u, one(2))[0] / penalty
            y, u = y - 0.2 * slope, u - 0.1 * by_u
        x = x - 0.05 * (sums.outer_gradients(x, u, one(2))[1] + penalty * cross @ (u - y))
    for found, expected in zip(variables(run), (y, u, x), strict=True):
        torch.testing.assert_close(found, expected)
    assert run.result().calls == OracleCalls(inner_gradients=12, outer_gradients=6)


def test_the_penalty_grows_like_the_seventh_root(quadratic_sum):
    run = loop(F2SA(increment=1.0), 0.0, 0.0, 0.0).start(quadratic_sum().problem, X, Y)
    seen = []
    for count in (30, 90):
        run.advance(count)
        seen.append(run.state_dict()["memory"]["penalty"].item() - 1.0)
    # The sum of k^(-6/7) up to n is 7 n^(1/7) plus a constant.
    assert seen[1] - seen[0] == pytest.approx(7 * (120 ** (1 / 7) - 30 ** (1 / 7)), rel=1e-2)


def test_the_distance_of_f2sa_tends_to_the_auxiliary(quadratic_sum):
    """``lam (y - u)`` is ``z`` up to O(1 / lam)."""
    sums = quadratic_sum(num_inner=1, num_outer=1)
    hessian = sums.inner[0][0]
    gaps = []
    for penalty in (100.0, 1000.0):
        estimator = F2SA(inner_steps=200, penalty=penalty, increment=0.0)
        run = loop(estimator, 0.5, 0.5, 0.0).start(sums.problem, X, Y)
        run.advance(1)
        y, u, _ = variables(run)
        slope = sums.outer_gradients(X, y)[0]
        exact = torch.linalg.solve(hessian, slope)
        gaps.append((penalty * (y - u) - exact).norm().item())
    assert gaps[0] / gaps[1] == pytest.approx(10, rel=0.2)


def blocks(num_blocks=3):
    """Each inner batch depends on one or two of the blocks, each of two tensors."""
    generator = torch.Generator().manual_seed(2)

    def normal(*shape):
        return torch.randn(shape, generator=generator, dtype=DOUBLE)

    touches = [{0}, {1}, {0, 2}, {2}, {0}]
    targets = normal(len(touches), 2, 3)
    aims = normal(2, num_blocks, 3)

    def inner_loss(x, y, batch):
        value = 0.0
        for key in touches[batch]:
            weight = y[key]["weight"]
            value = (
                value
                + (1 + y[key]["bias"].square()) * (weight - x[0] * targets[batch, 0]).square().sum()
            )
            value = value + (y[key]["bias"] - x[1]).square()
        if len(touches[batch]) == 2:
            value = value + (y[0]["weight"] * y[2]["weight"]).sum() / 4
        return value

    def outer_loss(x, y, batch):
        values = [
            (block["weight"] - aims[batch, key]).square().sum() for key, block in enumerate(y)
        ]
        return sum(values) + sum(block["bias"] for block in y) + x.square().sum()

    problem = FiniteSumProblem(
        inner_loss=inner_loss,
        outer_loss=outer_loss,
        inner_batches=range(5),
        outer_batches=range(2),
    )
    start = [{"weight": normal(3), "bias": normal(1)[0]} for _ in range(num_blocks)]
    return problem, normal(2), start, lambda batch: touches[batch]


@pytest.mark.parametrize(
    "optimizer",
    [
        lambda params: torch.optim.Adam(params, lr=0.1, weight_decay=0.1),
        lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.9),
    ],
)
def test_untouched_blocks_stay_bit_for_bit(drawn, monkeypatch, optimizer):
    problem, x, y, touched = blocks()
    method = SingleLoop(
        estimator=BlockWise(touched=touched),
        inner_optimizer=optimizer,
        auxiliary_step=0.1,
        outer_step=0.01,
        damping=0.1,
    )
    run = method.start(problem, x, y)
    run.advance(6)
    for batch in range(5):
        drawn(monkeypatch, batch, 0)
        before, state = run.result(), run.state_dict()
        run.advance()
        after, new = run.result(), run.state_dict()
        z_before, z_after = before.auxiliary.view(3, 4), after.auxiliary.view(3, 4)
        for key in range(3):
            moves = key in touched(batch)
            for name in ("weight", "bias"):
                same = torch.equal(before.inner_params[key][name], after.inner_params[key][name])
                assert same != moves
            assert torch.equal(z_before[key], z_after[key]) != moves
            old, now = (entry["inner"]["optimizer"]["state"][2 * key] for entry in (state, new))
            assert all(torch.equal(old[name], now[name]) for name in old) != moves


def test_block_wise_directions_are_unbiased(drawn, monkeypatch):
    problem, x, y, touched = blocks()
    method = SingleLoop(
        estimator=BlockWise(touched=touched),
        inner_optimizer=sgd(1.0),
        auxiliary_step=1.0,
        outer_step=1.0,
        damping=0.7,
    )
    run = method.start(problem, x, y, generator=torch.Generator().manual_seed(0))
    state = run.state_dict()
    state["auxiliary"] = torch.linspace(-1, 1, 12, dtype=DOUBLE)
    z = state["auxiliary"]
    total = [0.0, 0.0, 0.0]
    for pair in itertools.product(range(5), range(2)):
        drawn(monkeypatch, *pair)
        run.load_state_dict(state)
        before = run.result()
        run.advance()
        after = run.result()
        flat = [
            torch.cat(
                [leaf.reshape(-1) for block in result.inner_params for leaf in block.values()]
            )
            for result in (before, after)
        ]
        found = (flat[0] - flat[1], z - after.auxiliary, x - after.outer_params)
        total = [old + part / 10 for old, part in zip(total, found, strict=True)]

    def nested(vector):
        return [{"weight": part[:3], "bias": part[3]} for part in vector.view(3, 4)]

    def inner(x, v):
        return sum(problem.inner_loss(x, nested(v), i) for i in range(5)) / 5

    def outer(x, v):
        return sum(problem.outer_loss(x, nested(v), j) for j in range(2)) / 2

    start = torch.cat([torch.cat([b["weight"], b["bias"].reshape(1)]) for b in y])
    hessian = torch.func.hessian(inner, argnums=1)(x, start)
    slope = torch.func.grad(inner, argnums=1)
    cross = torch.func.jacrev(slope)(x, start).T
    by_outer, by_inner = torch.func.grad(outer, argnums=(0, 1))(x, start)
    torch.testing.assert_close(total[0], slope(x, start))
    torch.testing.assert_close(total[1], hessian @ z + 0.7 * z - by_inner)
    torch.testing.assert_close(total[2], by_outer - cross @ z)


def test_blocks_that_do_not_fit():
    problem, x, y, touched = blocks()
    with pytest.raises(ValueError, match="must be a dict, list or tuple of blocks, got Tensor"):
        loop(BlockWise(touched=touched)).start(problem, x, torch.zeros(4))
    with pytest.raises(ValueError, match="touched must return keys of inner_params, got 7"):
        loop(BlockWise(touched=lambda _batch: [7])).start(problem, x, y)
    with pytest.raises(ValueError, match="no inner batch touches block 1; leave it out of inner"):
        loop(BlockWise(touched=lambda _batch: [0, 2])).start(problem, x, y)
    silent = BlockWise(touched=lambda batch: [batch % 3])
    with pytest.raises(ValueError, match=r"step \d: inner batch \d has a gradient outside"):
        loop(silent).minimize(problem, x, y, num_steps=30)
    named = BlockWise(touched=lambda batch: [f"e{key}" for key in touched(batch)])
    by_name = FiniteSumProblem(
        inner_loss=lambda x, y, batch: problem.inner_loss(x, list(y.values()), batch),
        outer_loss=lambda x, y, batch: problem.outer_loss(x, list(y.values()), batch),
        inner_batches=range(5),
        outer_batches=range(2),
    )
    experts = {f"e{key}": block for key, block in enumerate(y)}
    found = loop(named).minimize(by_name, x, experts, num_steps=5)
    expected = loop(BlockWise(touched=touched)).minimize(problem, x, y, num_steps=5)
    assert torch.equal(found.outer_params, expected.outer_params)


@pytest.mark.parametrize(
    "make",
    [
        lambda: SRBA(period=0),
        lambda: AmIGO(inner_steps=0),
        lambda: AmIGO(linear_steps=0),
        lambda: StocBiO(inner_steps=0),
        lambda: StocBiO(num_products=-1),
        lambda: F2SA(inner_steps=0),
        lambda: F2SA(penalty=0.0),
        lambda: F2SA(increment=-1.0),
        lambda: F2SA(decay=-1.0),
    ],
)
def test_settings_out_of_range(make):
    with pytest.raises(
        ValueError, match=r"(period|steps|products|penalty|increment|decay) must be"
    ):
        make()
