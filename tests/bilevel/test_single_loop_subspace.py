"""Random subspaces: closed-form means, memory, and what is biased."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from drgr.bilevel import GalerkinSOBA, SingleLoop, SubspaceSOBA
from drgr.bilevel.single_loop import basis as basis_module
from drgr.bilevel.single_loop.basis import RandomBasis, SignBasis
from drgr.bilevel.single_loop.subspace import two_sided_moments

DOUBLE = torch.float64
CORRECTIONS = ["one-sided", "probe", "independent"]
METHODS = [
    *({"correction": correction} for correction in CORRECTIONS),
    {"correction": "one-sided", "subspaces": "signs"},
    {"correction": "independent", "subspaces": "signs"},
]


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=DOUBLE)


def sgd(rate):
    return lambda params: torch.optim.SGD(params, lr=rate)


def loop(estimator, rate=1.0, auxiliary_step=1.0, outer_step=1.0):
    return SingleLoop(
        estimator=estimator,
        inner_optimizer=sgd(rate),
        auxiliary_step=auxiliary_step,
        outer_step=outer_step,
    )


def dense(basis, dimension):
    return torch.stack([basis.lifted(row) for row in torch.eye(basis.rank, dtype=DOUBLE)], dim=1)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**62 - 1), dimension=st.integers(1, 30), data=st.data())
def test_a_basis_is_orthonormal_whatever_its_chunks(seed, dimension, data):
    rank = data.draw(st.integers(1, dimension))
    chunk = data.draw(st.integers(1, 40))
    vector = normal(dimension)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(basis_module, "_CHUNK", chunk)
        basis = RandomBasis(seed, vector, rank)
        columns = dense(basis, dimension)
        torch.testing.assert_close(
            columns.T @ columns, torch.eye(rank, dtype=DOUBLE), atol=1e-7, rtol=0
        )
        torch.testing.assert_close(basis.coordinates(vector), columns.T @ vector)
        torch.testing.assert_close(basis.projected(vector), columns @ (columns.T @ vector))
        again = RandomBasis(seed, vector, rank, factor=basis.factor)
        assert torch.equal(again.projected(vector), basis.projected(vector))
    assert not torch.equal(RandomBasis(seed + 1, vector, rank).factor, basis.factor)


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 2**62 - 1), dimension=st.integers(1, 30), data=st.data())
def test_signs_are_orthonormal_columns_of_disjoint_supports(seed, dimension, data):
    rank = data.draw(st.integers(1, dimension))
    vector = normal(dimension)
    basis = SignBasis(seed, vector, rank)
    columns = dense(basis, dimension)
    torch.testing.assert_close(columns.T @ columns, torch.eye(rank, dtype=DOUBLE))
    assert ((columns != 0).sum(dim=1) == 1).all()
    torch.testing.assert_close(basis.coordinates(vector), columns.T @ vector)
    torch.testing.assert_close(basis.projected(vector), columns @ (columns.T @ vector))
    again = SignBasis(seed, vector, rank)
    assert torch.equal(again.projected(vector), basis.projected(vector))


@pytest.mark.parametrize(("dimension", "rank"), [(7, 3), (6, 3), (5, 4), (4, 1)])
def test_the_mean_projection_on_signs_is_a_multiple_of_the_identity(dimension, rank):
    """Also where columns have different lengths."""
    zeros = torch.zeros(dimension, dtype=DOUBLE)
    samples = torch.stack(
        [
            columns @ columns.T
            for columns in (dense(SignBasis(seed, zeros, rank), dimension) for seed in range(3000))
        ]
    )
    expected = rank / dimension * torch.eye(dimension, dtype=DOUBLE)
    error = (samples.mean(dim=0) - expected).abs()
    assert (error <= 4.5 * samples.std(dim=0) / 3000**0.5 + 1e-12).all()


@pytest.mark.parametrize(("dimension", "rank"), [(40_000, 50), (300, 20), (200, 150)])
def test_little_of_a_basis_exists_at_a_time(dimension, rank):
    """At most as many entries as a vector has, a row or 16384, whichever is most."""
    basis = RandomBasis(0, normal(dimension), rank, factor=torch.eye(1, dtype=DOUBLE))
    sizes = [chunk.numel() for _, chunk in basis._chunks()]
    assert sum(sizes) == dimension * rank
    assert max(sizes) <= max(dimension, rank, 2**14)


def test_a_basis_keeps_the_dtype_of_its_vectors():
    vector = normal(50).float()
    basis = RandomBasis(3, vector, 4)
    assert basis.coordinates(vector).dtype == torch.float32
    assert basis.projected(vector).dtype == torch.float32
    torch.testing.assert_close(
        basis.projected(vector).double(),
        RandomBasis(3, vector.double(), 4).projected(vector.double()),
        rtol=1e-5,
        atol=1e-6,
    )


@pytest.mark.parametrize(("dimension", "rank"), [(12, 3), (5, 4), (6, 1)])
def test_the_two_sided_mean_is_its_closed_form(dimension, rank):
    hessian = normal(dimension, dimension)
    hessian = hessian @ hessian.T / dimension
    z = normal(dimension, seed=1)
    columns = torch.linalg.qr(normal(20_000, dimension, rank, seed=2))[0]
    inside = columns.mT @ hessian @ columns @ (columns.mT @ z).unsqueeze(2)
    samples = (dimension / rank) ** 2 * (columns @ inside).squeeze(2)
    by_hessian, by_trace = two_sided_moments(dimension, rank)
    expected = by_hessian * hessian @ z + by_trace * hessian.trace() * z
    error = (samples.mean(dim=0) - expected) / (samples.std(dim=0) / 20_000**0.5)
    assert error.abs().max() < 4.5
    assert (samples.mean(dim=0) - hessian @ z).norm() > 0.1 * (hessian @ z).norm()


def test_the_moments_of_the_whole_space():
    assert two_sided_moments(1, 1) == (1.0, 0.0)
    assert two_sided_moments(7, 7) == (1.0, 0.0)
    by_hessian, by_trace = two_sided_moments(1000, 999)
    assert by_hessian == pytest.approx(1, abs=1e-2)
    assert by_trace == pytest.approx(0, abs=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("setting", METHODS)
def test_directions_are_unbiased_over_subspaces(quadratic_sum, setting):
    """Against the dense directions, within 4.5 standard errors of the samples' own spread."""
    sums = quadratic_sum(inner_size=6, outer_size=2, num_inner=1, num_outer=1)
    x, y, z = normal(2), normal(6, seed=1), normal(6, seed=2)
    estimator = SubspaceSOBA(rank=4 if "subspaces" in setting else 2, **setting)
    run = loop(estimator).start(sums.problem, x, y)
    state = run.state_dict()
    state["auxiliary"] = z
    found = []
    for _ in range(250):
        state["generator"] = run._oracle.generator.get_state()
        run.load_state_dict(state)
        run.advance()
        result = run.result()
        found.append((y - result.inner_params, z - result.auxiliary, x - result.outer_params))
    for parts, expected in zip(zip(*found, strict=True), sums.directions(x, y, z), strict=True):
        samples = torch.stack(parts)
        error = (samples.mean(dim=0) - expected).abs()
        allowed = 4.5 * samples.std(dim=0) / 250**0.5 + 1e-12
        assert (error <= allowed).all()


@pytest.mark.parametrize("setting", METHODS)
def test_the_whole_space_is_soba(quadratic_sum, drawn, monkeypatch, setting):
    sums = quadratic_sum()
    drawn(monkeypatch, 2, 1)
    x, y, z = normal(3), normal(4, seed=1), normal(4, seed=2)
    run = loop(SubspaceSOBA(rank=10, **setting)).start(sums.problem, x, y)
    state = run.state_dict()
    state["auxiliary"] = z
    run.load_state_dict(state)
    run.advance()
    result = run.result()
    expected = sums.directions(x, y, z, slice(2, 3), slice(1, 2))
    found = (y - result.inner_params, z - result.auxiliary, x - result.outer_params)
    for have, want in zip(found, expected, strict=True):
        torch.testing.assert_close(have, want)
    probes = int(setting["correction"] == "probe")
    assert result.calls.total == 4 + probes


@pytest.mark.parametrize("setting", METHODS)
def test_moves_stay_in_the_subspace_of_the_period(quadratic_sum, setting):
    sums = quadratic_sum(inner_size=8)
    x, y = normal(3), normal(8, seed=1)
    run = loop(SubspaceSOBA(rank=2, period=4, **setting), 0.01, 0.01, 0.01).start(
        sums.problem, x, y
    )
    found = []
    for _ in range(8):
        before = run.result().inner_params
        run.advance()
        found.append(run.result().inner_params - before)
    assert torch.linalg.matrix_rank(torch.stack(found[:4]), atol=1e-10) == 2
    assert torch.linalg.matrix_rank(torch.stack(found[4:]), atol=1e-10) == 2
    assert torch.linalg.matrix_rank(torch.stack(found), atol=1e-10) == 4


def test_one_sided_products_have_the_least_noise(quadratic_sum):
    sums = quadratic_sum(inner_size=12, outer_size=2, num_inner=1, num_outer=1)
    x, y, z = normal(2), normal(12, seed=1), normal(12, seed=2)
    spreads = {}
    for correction in CORRECTIONS:
        run = loop(SubspaceSOBA(rank=3, correction=correction)).start(sums.problem, x, y)
        state = run.state_dict()
        state["auxiliary"] = z
        samples = []
        for _ in range(100):
            state["generator"] = run._oracle.generator.get_state()
            run.load_state_dict(state)
            run.advance()
            samples.append(z - run.result().auxiliary)
        spreads[correction] = torch.stack(samples).var(dim=0).sum()
    assert spreads["one-sided"] < spreads["probe"]
    assert spreads["one-sided"] < spreads["independent"]


def test_subspace_steps_reach_the_stationary_point(quadratic_sum):
    """Without noise of batches the noise of subspaces vanishes with the directions."""
    sums = quadratic_sum(inner_size=6, num_inner=1, num_outer=1)
    x, y = normal(3), normal(6, seed=1)
    method = loop(SubspaceSOBA(rank=3), 0.3, 0.3, 0.05)
    result = method.minimize(sums.problem, x, y, num_steps=300)
    assert sums.value_gradient(result.outer_params).norm() < 0.05 * sums.value_gradient(x).norm()


@pytest.mark.parametrize("subspaces", ["uniform", "signs"])
def test_galerkin_is_exact_where_the_hessian_is_a_multiple_of_the_identity(
    quadratic_sum, subspaces
):
    """In the mean over subspaces; one of them is not."""
    sums = quadratic_sum(inner_size=6, outer_size=2, num_inner=1, num_outer=1)
    sums.inner[0][:] = 1.5 * torch.eye(6, dtype=DOUBLE)
    x = normal(2)
    y = -(x @ sums.inner[2][0] + sums.inner[3][0]) / 1.5
    estimator = GalerkinSOBA(rank=2, period=1, warmup=1, subspaces=subspaces)
    run = loop(estimator, 0.0, 1 / 1.5).start(sums.problem, x, y)
    state = run.state_dict()
    found = []
    for _ in range(144):
        state["generator"] = run._oracle.generator.get_state()
        run.load_state_dict(state)
        run.advance()
        found.append(x - run.result().outer_params)
    samples = torch.stack(found)
    error = (samples.mean(dim=0) - sums.value_gradient(x)).abs()
    assert (error <= 4.5 * samples.std(dim=0) / 12).all()
    assert samples.std(dim=0).max() > 1e-3


def test_galerkin_tends_to_the_solution_within_the_subspace(quadratic_sum):
    sums = quadratic_sum(inner_size=6, num_inner=1, num_outer=1)
    x, y = normal(3), normal(6, seed=1)
    run = loop(GalerkinSOBA(rank=3, period=500, warmup=100), 0.0, 0.5, 0.0).start(
        sums.problem, x, y
    )
    run.advance()
    state = run.state_dict()["memory"]
    basis = RandomBasis(int(state["seed"]), y, 3, factor=state["factor"])
    columns = dense(basis, 6)
    hessian, slope = sums.inner[0][0], sums.outer_gradients(x, y)[0]
    inside = columns.T @ hessian @ columns
    torch.testing.assert_close(
        run.result().auxiliary, torch.linalg.solve(inside, columns.T @ slope), rtol=1e-6, atol=1e-8
    )
    # Right on average over eigenvectors, for every subspace.
    solver = 6 / 3 * columns @ torch.linalg.solve(inside, columns.T)
    assert (solver @ hessian).trace().item() == pytest.approx(6)


def test_little_is_kept_in_a_subspace(quadratic_sum):
    """Entries beside x and y with Adam: 3 d in full, d + few, and few; no factor with signs."""
    sums = quadratic_sum(inner_size=200, num_inner=1, num_outer=1)
    x, y = normal(3), normal(200, seed=1)
    kept = {}
    for name, estimator in {
        "subspace": SubspaceSOBA(rank=4),
        "galerkin": GalerkinSOBA(rank=4, period=10),
        "signs": SubspaceSOBA(rank=4, subspaces="signs"),
        "galerkin, signs": GalerkinSOBA(rank=4, period=10, subspaces="signs"),
    }.items():
        method = SingleLoop(
            estimator=estimator,
            inner_optimizer=lambda params: torch.optim.Adam(params, lr=1e-3),
            auxiliary_step=1e-3,
            outer_step=1e-3,
        )
        run = method.start(sums.problem, x, y)
        run.advance(2)
        kept[name] = run.result().state_numel
        tensors = [*run.state_dict()["memory"].values()]
        assert all(tensor.numel() <= 16 for tensor in tensors)
    few = 4 + 2 * 4 + 1 + 1  # coordinates, moments, step; seed
    assert kept == {
        "subspace": 200 + few + 4 * 4,
        "galerkin": 4 + few + 4 * 4,
        "signs": 200 + few,
        "galerkin, signs": 4 + few,
    }


def test_adam_in_a_subspace_forgets_with_it(quadratic_sum):
    sums = quadratic_sum(inner_size=8, num_inner=1, num_outer=1)
    method = SingleLoop(
        estimator=SubspaceSOBA(rank=2, period=3),
        inner_optimizer=lambda params: torch.optim.Adam(params, lr=1e-2),
        auxiliary_step=1e-2,
        outer_step=1e-2,
    )
    run = method.start(sums.problem, normal(3), normal(8))
    counts = []
    for _ in range(7):
        run.advance()
        counts.append(int(run.state_dict()["inner"]["optimizer"]["state"][0]["step"]))
    assert counts == [1, 2, 3, 1, 2, 3, 1]


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (lambda: SubspaceSOBA(rank=0), "rank"),
        (lambda: SubspaceSOBA(rank=1, period=0), "period"),
        (lambda: SubspaceSOBA(rank=1, correction="both"), "correction"),
        (lambda: SubspaceSOBA(rank=1, subspaces="both"), "subspaces"),
        (lambda: GalerkinSOBA(rank=1, period=1, subspaces="both"), "subspaces"),
        (lambda: GalerkinSOBA(rank=0, period=1), "rank"),
        (lambda: GalerkinSOBA(rank=1, period=0), "period"),
        (lambda: GalerkinSOBA(rank=1, period=1, warmup=-1), "warmup"),
    ],
)
def test_settings_out_of_range(make, name):
    with pytest.raises(ValueError, match=f"{name} must be"):
        make()


def test_a_probe_cannot_correct_subspaces_of_signs():
    with pytest.raises(ValueError, match="'probe' holds for subspaces 'uniform', got 'signs'"):
        SubspaceSOBA(rank=1, correction="probe", subspaces="signs")
