"""Outer steps against their formulas, computed here from gradients by domain."""

from types import ModuleType

import pytest
import torch

from drgr.bilevel import CG
from drgr.data import Corpus
from drgr.errors import ConfigError, NonFiniteLossError
from drgr.training import build_run

OUTER = {
    "variables": ["mixture"],
    "begin": 50,
    "windows": 2,
    "anchor": "uniform",
    "anchor_strength": 0.1,
}


def trained(runs: ModuleType, corpus: Corpus, path, **outer):
    config = runs.small_config(
        training__steps=4, robustness__apply_to="nothing", outer=OUTER | outer
    )
    _, run = runs.run_small(config, corpus, path)
    return run


def step(run, number):
    adversary = run.adversary
    report = run.outer.step(adversary.worst_case, adversary.losses, adversary.weights, step=number)
    if run.outer.settings.moves_mixture:
        adversary.set_mixture(report.mixture)
    return report


def gradients(run, split, number):
    passes = run.outer.passes
    return torch.stack(list(passes.gradients_by_domain(passes.draw(split, number)))).double()


def second_moments(run):
    optimizer = run.optimizer
    beta = optimizer.param_groups[0]["betas"][1]
    roots = [
        (state["exp_avg_sq"] / (1 - beta ** float(state["step"]))).sqrt() + 1e-8
        for state in (optimizer.state[weight] for weight in run.outer.passes.inner)
    ]
    return torch.cat([root.flatten() for root in roots]).double().square()


def floored(squares):
    metric = squares.sqrt()
    return metric.clamp_min(0.01 * metric.mean())


def reach(run):
    return run.optimizer.param_groups[0]["lr"] * 20


def lower(run):
    """Shows the adversary losses of 99 %."""
    tokens = torch.full((4,), 10)
    run.adversary.observe(0.99 * run.adversary.losses / run.adversary.unit * 10, tokens)


def normalised(values):
    return values / values.sum()


def test_doge_is_the_gradient_step_with_the_identity_metric(runs, corpus, tmp_path):
    """``w_e <- w_e exp(rate lr h <grad l_e, sum_d q_d grad l_d>)``, once a fall was compared."""
    run = trained(runs, corpus, tmp_path, update="gradient", metric="identity", anchor_strength=0.0)
    factors = run.adversary.weights.adversary * run.adversary.unit
    start = run.adversary.weights.sampling.clone()
    expected = [
        reach(run) * gradients(run, "train", n) @ (factors @ gradients(run, "validation", n))
        for n in (7, 8)
    ]
    first = step(run, 7)
    assert first.scale is None
    assert torch.equal(first.mixture, start)
    torch.testing.assert_close(first.gain, expected[0], rtol=0.05, atol=1e-3)
    value = run.adversary.worst_case(run.adversary.losses).value
    run.adversary.observe(
        0.99 * run.adversary.losses / run.adversary.unit * 10, torch.full((4,), 10)
    )
    fallen = run.adversary.worst_case(run.adversary.losses).value
    second = step(run, 8)
    scale = float((value - fallen) / (start @ first.gain))
    assert second.scale == pytest.approx(scale, rel=1e-6)
    averaged = (0.5 * expected[0] + expected[1]) / 1.5
    torch.testing.assert_close(second.gain, scale * averaged, rtol=0.05, atol=1e-3)
    torch.testing.assert_close(
        second.mixture, normalised(start * (2.0 * second.gain).exp()), rtol=1e-6, atol=0
    )


def test_adams_metric_bounds_the_response(runs, corpus, tmp_path):
    run = trained(runs, corpus, tmp_path, update="gradient")
    factors = run.adversary.weights.adversary * run.adversary.unit
    slope = factors @ gradients(run, "validation", 7)
    response = reach(run) * slope / floored(second_moments(run) + slope.square())
    assert response.abs().max() <= reach(run)
    report = step(run, 7)
    torch.testing.assert_close(
        report.gain, gradients(run, "train", 7) @ response, rtol=0.05, atol=1e-3
    )


def test_lookahead_predicts_with_the_transfer_matrix(runs, corpus, tmp_path):
    run = trained(runs, corpus, tmp_path)
    train, held_out = gradients(run, "train", 7), gradients(run, "validation", 7)
    metric = floored(second_moments(run) + train.square().mean(dim=0))
    transfer = run.adversary.unit.unsqueeze(1) * (held_out * reach(run) / metric) @ train.T
    report = step(run, 7)
    weights = run.adversary.weights.adversary
    torch.testing.assert_close(report.gain, weights @ transfer, rtol=1e-3, atol=1e-5)
    assert torch.equal(report.mixture, run.adversary.base_sampling)
    assert report.scale is None

    before = run.adversary.losses.clone()
    predicted = transfer @ run.adversary.weights.sampling
    lower(run)
    report = step(run, 7)
    observed = before - run.adversary.losses
    scale = float(observed @ predicted / (predicted @ predicted))
    assert report.scale == pytest.approx(scale, rel=1e-3)
    after = run.adversary.worst_case(run.adversary.losses - scale * transfer @ report.mixture).value
    stayed = run.adversary.worst_case(
        run.adversary.losses - scale * transfer @ run.outer.settings.anchor
    ).value
    assert after <= stayed
    assert report.gap <= 1e-4


@pytest.mark.parametrize("update", ["lookahead", "gradient"])
def test_without_gains_the_adversary_decides(runs, corpus, tmp_path, update):
    """Until a fall was compared, and for good where gains are 0, its weights are the mixture."""
    run = trained(runs, corpus, tmp_path, update=update, anchor="adversary", anchor_strength=1e9)
    weights = run.adversary.weights.adversary
    first = step(run, 7)
    assert first.scale is None
    expected = 0.999 * weights + 0.001 / 4
    torch.testing.assert_close(first.mixture, expected)
    lower(run)
    second = step(run, 8)
    assert second.scale is not None
    torch.testing.assert_close(second.mixture, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("update", ["lookahead", "gradient"])
def test_a_domain_that_the_adversary_drops_is_drawn_a_little(runs, corpus, tmp_path, update):
    """Weights of chi-square reach 0; the mixture comes back from there."""
    config = runs.small_config(
        training__steps=4,
        robustness__apply_to="nothing",
        robustness__divergence="chi-square",
        robustness__penalty=0.01,
        outer=OUTER | {"update": update, "anchor": "adversary"},
    )
    _, run = runs.run_small(config, corpus, tmp_path)
    assert run.adversary.weights.adversary.min() == 0
    for number in (7, 8):
        report = step(run, number)
        lower(run)
        assert report.mixture.min() > 0
        assert report.mixture.sum().item() == pytest.approx(1)


@pytest.mark.parametrize("apply_to", ["nothing", "sampling", "objective"])
def test_the_inner_loss_counts_domains_as_training_does(
    runs, corpus, tmp_path, monkeypatch, apply_to
):
    """Where the adversary weighs the training, the router's ``J z`` is of that objective."""
    config = runs.small_config(
        training__steps=4,
        robustness__apply_to=apply_to,
        outer=OUTER | {"variables": ["router"], "update": "gradient"},
    )
    _, run = runs.run_small(config, corpus, tmp_path)
    passes, seen = run.outer.passes, []
    along = type(passes).along
    monkeypatch.setattr(type(passes), "along", lambda *a, **k: seen.append(a[3]) or along(*a, **k))
    step(run, 7)
    weights = run.adversary.weights
    expected = run.adversary.base_sampling if apply_to == "nothing" else weights.adversary
    torch.testing.assert_close(seen, [expected])


def test_a_gradient_that_is_not_finite_is_named(runs, corpus, tmp_path):
    run = trained(runs, corpus, tmp_path)
    with torch.no_grad():
        run.outer.passes.inner[0].fill_(torch.nan)
    with pytest.raises(NonFiniteLossError, match="a gradient of the outer loop is not finite"):
        step(run, 7)


def test_cg_solves_the_damped_gauss_newton_system(runs, corpus, tmp_path):
    """Enough steps leave a small residual, and a warm start profits from the last solve."""
    options = {"update": "gradient", "horizon": 0.05, "windows": 1}
    run = trained(runs, corpus, tmp_path / "one", solver=cg(1), **options)
    rough = step(run, 7)
    assert (rough.status, rough.num_hvps) == ("max-steps", 2)
    run = trained(runs, corpus, tmp_path / "more", solver=cg(60), **options)
    found = step(run, 7)
    assert found.status == "converged"
    assert found.residual < 0.015 < rough.residual
    assert found.curvature > 0
    run.adversary.set_mixture(run.adversary.base_sampling)
    again = step(run, 7)
    assert again.num_hvps < found.num_hvps


def cg(steps):
    return {"kind": "cg", "max_steps": steps, "rtol": 0.01}


def test_without_a_minimum_the_response_leaves_the_hessian_out(runs, corpus, tmp_path):
    options = {"variables": ["mixture"], "update": "gradient", "horizon": 20.0}
    solver = {"kind": "cg", "max_steps": 6}
    run = trained(runs, corpus, tmp_path / "cg", solver=solver, curvature="hessian", **options)
    report = step(run, 7)
    assert report.status == "negative-curvature"
    assert report.curvature < -1
    assert run.outer.state_dict()["warm"] is None
    plain = trained(runs, corpus, tmp_path / "none", **options)
    torch.testing.assert_close(report.gain, step(plain, 7).gain)


def test_a_series_that_diverges_is_not_followed(runs, corpus, tmp_path):
    options = {"variables": ["mixture"], "update": "gradient"}
    solver = {"kind": "neumann", "num_terms": 3, "step_size": 1.0}
    run = trained(runs, corpus, tmp_path / "long", solver=solver, **options)
    report = step(run, 7)
    assert report.status == "diverged"
    plain = trained(runs, corpus, tmp_path / "none", **options)
    torch.testing.assert_close(report.gain, step(plain, 7).gain)


def test_a_neumann_series_of_no_damping_share_is_refused(runs):
    with pytest.raises(ConfigError, match=r"outer.solver.step_size"):
        runs.small_config(outer=OUTER | {"solver": {"kind": "neumann", "step_size": 0.0}})


def test_the_router_follows_its_hypergradient(runs, corpus, tmp_path):
    """``grad_x F - J z`` by the same derivatives; one Adam step against it from zero moments."""
    run = trained(runs, corpus, tmp_path, variables=["router"], update="gradient", horizon=1e-3)
    passes = run.outer.passes
    factors = run.adversary.weights.adversary * run.adversary.unit
    _, direct, _ = passes.gradient(passes.draw("validation", 7), factors)
    before = torch.cat([weight.detach().flatten() for weight in passes.outer])
    inner = [weight.detach().clone() for weight in passes.inner]
    report = step(run, 7)
    moved = torch.cat([weight.detach().flatten() for weight in passes.outer]) - before
    # So short a horizon leaves the direct part; Adam's first step is the rate times its sign.
    clear = direct.abs() > 1e-2 * direct.abs().max()
    torch.testing.assert_close(moved[clear], -1e-3 * direct[clear].sign(), rtol=1e-2, atol=1e-5)
    assert report.gradient_norm == pytest.approx(direct.norm().item(), rel=0.05)
    assert torch.equal(report.mixture, run.adversary.base_sampling)
    for weight, kept in zip(passes.inner, inner, strict=True):
        assert torch.equal(weight, kept)
    assert all(weight.grad is None for weight in passes.outer)


def test_gates_take_proximal_steps_and_close_links_for_good(runs, corpus, tmp_path):
    """One step equals the formula; a run closes links, and their assignments are saved."""
    options = {"variables": ["link-gates"], "update": "gradient", "horizon": 1e-3}
    config = runs.small_config(
        training__steps=4,
        robustness__apply_to="nothing",
        routing__link_gates=True,
        outer=OUTER | options | {"gates": {"rate": 2.0, "penalty": 0.1}},
    )
    _, run = runs.run_small(config, corpus, tmp_path / "one")
    passes, gates = run.outer.passes, run.attachment.link_gates
    factors = run.adversary.weights.adversary * run.adversary.unit
    _, direct, _ = passes.gradient(passes.draw("validation", 7), factors)
    step(run, 7)
    expected = (1.0 - 2.0 * direct.view_as(gates.values) - 0.2).clamp_min(0)
    torch.testing.assert_close(gates.values.detach(), expected, rtol=1e-3, atol=1e-3)
    assert bool(gates.is_open.all())

    config = runs.small_config(
        robustness__apply_to="nothing",
        routing__link_gates=True,
        outer=OUTER
        | options
        | {"begin": 2, "every": 2, "gates": {"rate": 5.0, "penalty": 0.05, "group": "link"}},
    )
    _, run = runs.run_small(config, corpus, tmp_path / "run")
    records = runs.read_records(tmp_path / "run")
    closed = [record["links_closed"] for record in records if record["kind"] == "outer"]
    gates = run.attachment.link_gates
    assert sum(closed) == int((~gates.is_open).sum()) > 0
    assert bool((gates.values[~gates.is_open] == 0).all())
    last = [record for record in records if record["kind"] == "train"][-1]
    assert all(layer["load"] for layer in last["layers"])


def test_routers_are_not_trained_by_the_inner_level(runs, corpus, tmp_path):
    run = trained(runs, corpus, tmp_path, variables=["router"], update="gradient")
    fresh = build_run(run.config, corpus)
    for now, then in zip(run.outer.passes.outer, fresh.outer.passes.outer, strict=True):
        assert torch.equal(now, then)
    moved = [
        not torch.equal(now, then)
        for now, then in zip(run.outer.passes.inner, fresh.outer.passes.inner, strict=True)
    ]
    assert all(moved)


def test_a_run_draws_by_its_mixture_and_counts_the_flops(runs, corpus, tmp_path):
    config = runs.small_config(
        robustness__apply_to="nothing", outer=OUTER | {"begin": 2, "every": 4}
    )
    outcome, run = runs.run_small(config, corpus, tmp_path)
    records = runs.read_records(tmp_path)
    steps = [record for record in records if record["kind"] == "outer"]
    assert [record["step"] for record in steps] == [3, 7, 11]
    assert steps[-1]["mixture"] == pytest.approx(
        dict(zip(corpus.domains, run.adversary.weights.sampling.tolist(), strict=True))
    )
    assert steps[-1]["mixture"] != steps[0]["mixture"]
    total = sum(record["flops"] for record in steps)
    evaluation = outcome.evaluation
    assert evaluation["outer_flops"] == pytest.approx(total)
    plain, _ = runs.run_small(
        runs.small_config(robustness__apply_to="nothing"), corpus, tmp_path / "plain"
    )
    assert evaluation["flops"] > plain.evaluation["flops"] + 0.95 * total
    shares = {name: entry["average_share"] for name, entry in evaluation["domains"].items()}
    assert sum(shares.values()) == pytest.approx(1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"robustness__apply_to": "sampling"}, "both decide how much each domain counts"),
        ({"robustness__apply_to": "objective"}, "both decide how much each domain counts"),
        ({"outer__every": 3}, "a multiple of robustness.every, got 50 and 0, 3 and 2"),
        ({"robustness__begin": 60}, "at least robustness.begin"),
        ({"outer__solver": {"kind": "cg"}}, "lookahead takes no solver"),
        ({"outer__variables": ["router"]}, "moves the mixture alone"),
        ({"outer__anchor_strength": 0.0}, "must be above 0"),
        (
            {"outer__variables": ["link-gates"], "outer__update": "gradient"},
            "routing.link_gates is false",
        ),
        (
            {
                "outer__anchor": "sampling",
                "data__sampling": {"speech": 1.0, "factbook": 0.0, "fiction": 1.0, "verse": 1.0},
            },
            "every domain to have a share above 0",
        ),
    ],
)
def test_clashing_settings_are_refused(runs, corpus, changes, message):
    config = runs.small_config(
        **({"robustness__apply_to": "nothing", "outer": dict(OUTER)} | changes)
    )
    with pytest.raises(ConfigError, match=message):
        build_run(config, corpus)


def test_the_solver_is_the_engines(runs, corpus):
    config = runs.small_config(
        robustness__apply_to="nothing",
        outer=OUTER | {"update": "gradient", "solver": {"kind": "cg", "max_steps": 3}},
    )
    assert isinstance(build_run(config, corpus).outer.settings.solver, CG)
