"""The synthetic problems against samples and loops, their oracle against SciPy and a grid."""

import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]

pytestmark = pytest.mark.skipif(
    not (ROOT / "benchmarks").exists(), reason="the benchmarks are not part of the wheel"
)
if (ROOT / "benchmarks").exists():
    if str(ROOT) not in sys.path:
        sys.path.insert(0, str(ROOT))
    from benchmarks.synthetic import mixtures, problems, routing
    from benchmarks.synthetic.figure import draw
    from benchmarks.synthetic.page import section
    from benchmarks.synthetic.run import claims, content_of


def small(num_domains, seed=0):
    domains = problems.planted_domains(num_domains, seed)
    return domains, problems.population_risks(domains)


def test_population_risks_are_those_of_samples():
    domains, quadratics = small(4)
    generator = torch.Generator().manual_seed(0)
    predictor = torch.randn(problems.CORE + 1, generator=generator, dtype=torch.float64)
    for domain, risk in enumerate(quadratics.risks(predictor)):
        features, targets = problems.draw(domains, torch.full((100_000,), domain), generator)
        losses = (features @ predictor - targets).square()
        error = losses.std() / math.sqrt(len(losses))
        assert abs(losses.mean() - risk) < 4 * error


def test_floors_are_reached_and_bound_every_risk():
    domains, quadratics = small(5)
    floors = quadratics.floors()
    for domain in range(5):
        alone = torch.nn.functional.one_hot(torch.tensor(domain), 5).double()
        risks = quadratics.risks(quadratics.best_of_mixture(alone))
        assert risks[domain] == pytest.approx(float(floors[domain]), abs=1e-12)
        assert (risks >= floors - 1e-12).all()
    assert (floors > domains.noise.square()).all()


def test_rare_domains_disagree():
    domains, _ = small(8)
    assert domains.signs.tolist() == [1] * 6 + [-1] * 2
    assert domains.natural.sum() == pytest.approx(1)
    assert (domains.natural.diff() < 0).all()
    assert sorted(domains.noise.tolist())[:: len(domains.noise) - 1] == pytest.approx([0.3, 1.5])


@pytest.mark.parametrize("num_domains", [2, 4, 16, 64])
@pytest.mark.parametrize("excess", [False, True])
def test_oracle_against_scipy(num_domains, excess):
    optimize = pytest.importorskip("scipy.optimize")
    _, quadratics = small(num_domains, seed=3)
    references = quadratics.floors() if excess else torch.zeros(num_domains).double()
    found = problems.minimax(quadratics, references)
    matrices, slopes, constants, levels = (part.numpy() for part in (*quadratics, references))

    def slack(point):
        theta = point[:-1]
        curved = np.einsum("i,gij,j->g", theta, matrices, theta)
        return point[-1] - (curved - 2 * slopes @ theta + constants - levels)

    def slack_slope(point):
        down = -2 * (matrices @ point[:-1] - slopes)
        return np.hstack([down, np.ones((num_domains, 1))])

    start = np.zeros(problems.CORE + 2)
    start[-1] = 10
    solved = optimize.minimize(
        lambda point: point[-1],
        start,
        jac=lambda point: np.eye(len(point))[-1],
        constraints={"type": "ineq", "fun": slack, "jac": slack_slope},
        method="SLSQP",
        options={"ftol": 1e-11, "maxiter": 500},
    )
    # Rounding may stop it before its own test does; a feasible point of the same value is enough.
    assert solved.status in (0, 8)
    assert slack(solved.x).min() > -1e-8
    assert found.value == pytest.approx(solved.fun, abs=2e-6)
    np.testing.assert_allclose(found.predictor, solved.x[:-1], atol=2e-3)
    assert found.gap <= 1e-6


def test_oracle_mixture_against_a_grid():
    _, quadratics = small(3, seed=1)
    floors = quadratics.floors()
    found = problems.minimax(quadratics, floors)
    values = {}
    for first in np.linspace(0, 1, 51):
        for second in np.linspace(0, 1 - first, 31):
            mixture = torch.tensor([first, second, 1 - first - second]).double()
            best = quadratics.best_of_mixture(mixture)
            values[tuple(mixture.tolist())] = float(mixture @ (quadratics.risks(best) - floors))
    top = max(values, key=values.get)
    assert values[top] <= found.value + 1e-9
    assert values[top] == pytest.approx(found.value, abs=5e-3)
    np.testing.assert_allclose(found.mixture, top, atol=0.04)


def test_an_oracle_that_did_not_converge_says_so():
    _, quadratics = small(4)
    broken = quadratics.floors().index_fill(0, torch.tensor([1]), math.nan)
    with pytest.raises(ArithmeticError, match="gap"):
        problems.minimax(quadratics, broken)


def test_training_on_the_oracle_mixture_nears_the_oracle():
    domains, quadratics = small(4)
    floors = quadratics.floors()
    oracle = problems.minimax(quadratics, floors)
    method = mixtures.METHODS[f"{mixtures.ORACLE} (excess)"]
    found = mixtures.train(method, domains, floors, oracle.mixture, samples=60_000, seed=0)
    torch.testing.assert_close(found.mixture, oracle.mixture)
    regret = float((quadratics.risks(found.predictor) - floors).max()) - oracle.value
    assert -1e-6 < regret < 0.1


def test_planted_experts_against_a_loop():
    clusters = problems.planted_clusters(5, 0, width=6, expert_width=3)
    cluster = torch.tensor([3, 0, 3, 4])
    tokens, outputs = problems.draw_tokens(clusters, cluster, torch.Generator().manual_seed(1))
    for which, token, output in zip(cluster, tokens, outputs, strict=True):
        gate, up = (clusters.experts.gate_up[which] @ token).split(3)
        expected = clusters.experts.down[which] @ (gate / (1 + torch.exp(-gate)) * up)
        torch.testing.assert_close(output, expected)
    lengths = clusters.centres.norm(dim=1)
    torch.testing.assert_close(lengths, torch.full_like(lengths, math.sqrt(6)))


def test_information_against_scikit_learn():
    metrics = pytest.importorskip("sklearn.metrics")
    generator = torch.Generator().manual_seed(0)
    cluster = torch.arange(8).repeat_interleave(40)
    drawn = torch.randint(8, cluster.shape, generator=generator)
    keeps = torch.rand(cluster.shape, generator=generator) < 0.6
    expert = torch.where(keeps, (cluster + 3) % 8, drawn)
    table = routing.table_of(cluster, expert, 8)
    expected = metrics.normalized_mutual_info_score(cluster, expert)
    assert routing.mutual_information(table) == pytest.approx(expected, abs=1e-9)
    found = routing.recovery(cluster, expert, 8)
    adjusted = metrics.adjusted_mutual_info_score(cluster, expert)
    assert found["information"] == pytest.approx(adjusted, abs=0.01)


def test_recovery_at_its_ends():
    cluster = torch.arange(6).repeat_interleave(50)
    perfect = routing.recovery(cluster, (cluster * 5 + 1) % 6, 6)
    assert perfect == pytest.approx({"information": 1, "purity": 1, "matched": 1})
    collapsed = routing.recovery(cluster, torch.zeros_like(cluster), 6)
    assert collapsed == pytest.approx({"information": 0, "purity": 1 / 6, "matched": 1 / 6})
    drawn = torch.randint(6, cluster.shape, generator=torch.Generator().manual_seed(0))
    assert abs(routing.recovery(cluster, drawn, 6)["information"]) < 0.05


@pytest.fixture(scope="module")
def toy():
    torch.manual_seed(0)
    rows = mixtures.measure(4, 0, samples=2_560)
    rows += routing.measure(4, 0, steps=3, num_tokens=32, rounds=1)
    return content_of(rows, {"samples": 2_560, "steps": 3, "tokens": 32})


def test_the_page_reads_a_result_as_it_is_written(toy):
    result = json.loads(json.dumps(toy))
    lines = section(result)
    assert lines[0] == "## Synthetic problems with known truth"
    assert section(result) == lines
    text = "\n".join(lines)
    for name in (*mixtures.METHODS, *routing.METHODS):
        assert f"| {name} |" in text
    assert "nan" not in text
    result["summary"][0]["regret_excess"]["mean"] = 123.456
    assert "123.456" in "\n".join(section(result))


def test_the_picture_names_every_method(toy, tmp_path):
    draw(toy, tmp_path / "figure.svg")
    text = (tmp_path / "figure.svg").read_text()
    for name in (*mixtures.METHODS, *routing.METHODS, routing.UNTRAINED):
        assert (f">{name.removesuffix(' (excess)')}<" in text) != name.endswith("(raw)")


def test_budgets_hold_and_a_breach_would_show(toy):
    claim = "no batch spends more than its budget"
    assert toy["claims"][claim]
    routed = [row | {"over_budget": 1} for row in toy["runs"] if row["part"] == "routing"]
    mixed = [row for row in toy["runs"] if row["part"] == "mixture"]
    assert not claims(mixed + routed, toy["summary"])[claim]
