"""Parsing of the data with groups, and each method's formula against another computation."""

import struct
from pathlib import Path

import numpy as np
import pytest
import torch

from drgr.ambiguity import KL, worst_case

ROOT = Path(__file__).resolve().parents[2]

pytestmark = pytest.mark.skipif(
    not (ROOT / "benchmarks").exists(), reason="the benchmarks are not part of the wheel"
)

GROUPS = torch.tensor([0, 0, 0, 0, 0, 1, 1, 2])


@pytest.fixture
def data(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))
    from benchmarks.real_groups import data

    return data


@pytest.fixture
def model(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))
    from benchmarks.real_groups import model

    return model


@pytest.fixture
def methods(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))
    from benchmarks.real_groups import methods

    return methods


@pytest.fixture
def page(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))
    from benchmarks.real_groups import page

    return page


@pytest.fixture
def generated(data, tmp_path):
    return data.load(data.SOURCES["generated"], tmp_path)


def test_columns_are_standardised_on_the_training_rows(data):
    features = np.array([[0, 5, 0], [2, 5, 0], [4, 5, 0], [6, 5, 1], [100, 9, 1]], np.float32)
    train = np.array([0, 1, 2, 3])
    found = data.standardised(features, train)
    np.testing.assert_allclose(found[:, 0], (features[:, 0] - 3) / np.sqrt(5), rtol=1e-6)
    assert (found[:, 1] == 0).all()
    np.testing.assert_allclose(found[:, 2], (features[:, 2] - 0.25) / np.sqrt(3 / 16), rtol=1e-6)


def test_a_rare_value_is_at_most_ten_deviations_away(data):
    features = np.zeros((10_000, 1), np.float32)
    features[0] = 1
    found = data.standardised(features, np.arange(10_000))
    assert found[0, 0] == pytest.approx((1 - 1e-4) / 0.1)


def test_each_group_is_split_in_the_same_shares(data):
    groups = np.repeat([0, 1, 2], [100, 50, 10])
    parts = data.split(groups, np.random.default_rng(3))
    assert sorted(np.concatenate(parts)) == list(range(160))
    counts = [np.bincount(groups[part]).tolist() for part in parts]
    assert counts == [[60, 30, 6], [20, 10, 2], [20, 10, 2]]


def test_attributes_of_faces(data):
    lines = [
        "filename,Bald,Blond_Hair,Male,Young",
        "1.jpg,-1,1,-1,1",
        "2.jpg,1,-1,1,-1",
        "3.jpg,-1,1,1,1",
    ]
    raw = data.celeba_rows(*data.parse_table(lines, skipped=1))
    assert raw.features.tolist() == [[-1, 1], [1, -1], [-1, 1]]
    assert raw.labels.tolist() == [1, 0, 1]
    names = [raw.group_names[group] for group in raw.groups]
    assert names == ["female, blond", "male, not blond", "male, blond"]


def test_the_census_shows_neither_race_nor_sex(data):
    lines = [
        "age,race_Black,race_White,sex_Female,sex_Male,salary_<=50K,salary_>50K",
        "30,1,0,1,0,0,1",
        "40,0,1,0,1,1,0",
    ]
    raw = data.adult_rows(*data.parse_table(lines, skipped=0))
    assert raw.features.tolist() == [[30], [40]]
    assert raw.labels.tolist() == [1, 0]
    names = [raw.group_names[group] for group in raw.groups]
    assert names == ["other race, female, above 50K", "white, male, at most 50K"]
    assert len(raw.group_names) == 8


def test_idx_files(data):
    content = struct.pack(">HBBIII", 0, 8, 3, 2, 1, 3) + bytes(range(6))
    assert data.idx(content).tolist() == [[[0, 1, 2]], [[3, 4, 5]]]
    with pytest.raises(ValueError, match="must begin with 0, 0, 8"):
        data.idx(b"\x1f\x8b\x08\x00" + content)


def test_colours_and_labels_of_digits(data):
    rng = np.random.default_rng(1)
    images = rng.integers(1, 256, (4000, 28, 28), dtype=np.uint8)
    digits = rng.integers(0, 10, 4000, dtype=np.uint8)
    raw = data.coloured(images, digits, rng)
    red, green = raw.features[:, :196] > 0, raw.features[:, 196:] > 0
    is_red = red.all(axis=1)
    assert (is_red == ~green.any(axis=1)).all()
    assert (red.any(axis=1) == is_red).all()
    for row in (0, 1):
        shown = raw.features[row].reshape(2, 14, 14).sum(axis=0)
        corner = images[row, :2, :2].astype(float).mean() / 255
        assert shown[0, 0] == pytest.approx(corner, rel=1e-6)
    assert ((digits >= 5) == raw.labels).mean() == pytest.approx(0.9, abs=0.02)
    assert (is_red == raw.labels).mean() == pytest.approx(0.95, abs=0.015)
    names = np.array(raw.group_names)[raw.groups]
    expected = [
        f"{'high' if label else 'low'}, {'red' if colour else 'green'}"
        for label, colour in zip(raw.labels, is_red, strict=True)
    ]
    assert names.tolist() == expected


@pytest.mark.parametrize("power", [0.5, 1.0])
def test_inverse_frequency(methods, power):
    found = methods.inverse_frequency(GROUPS, 3, power=power)
    sizes = [5, 2, 1]
    raw = [sizes[group] ** -power for group in GROUPS.tolist()]
    np.testing.assert_allclose(found, [8 * value / sum(raw) for value in raw], rtol=1e-6)


def test_balanced_draws_give_every_group_the_same_mass(methods):
    drawn = methods.balanced(GROUPS, 3)
    mass = [drawn[group == GROUPS].sum().item() for group in range(3)]
    assert mass == pytest.approx([1 / 3] * 3)
    assert len(set(drawn[:5].tolist())) == 1


def test_up_weighting_is_the_mean_over_groups_at_power_one(methods):
    losses = torch.arange(1.0, 9.0)
    rule = methods.Fixed(torch.ones(8), methods.inverse_frequency(GROUPS, 3, power=1.0))
    found = rule.objective(losses, torch.arange(8))
    assert found.item() == pytest.approx((np.mean([1, 2, 3, 4, 5]) + 6.5 + 8) / 3)


def test_group_dro_is_an_exponentiated_gradient(methods):
    rule = methods.GroupDro(GROUPS, 3, rate=0.7, drawn=torch.ones(8))
    assert rule.shares(0).tolist() == [1.0] * 8
    weights = np.full(3, 1 / 3)
    rng = np.random.default_rng(0)
    for rows in ([0, 1, 5, 7], [0, 6, 5], [7, 7, 2]):
        losses = torch.tensor(rng.random(len(rows)), requires_grad=True)
        values, members = losses.detach().numpy(), GROUPS[rows].numpy()
        means = np.array(
            [values[members == g].mean() if (members == g).any() else 0.0 for g in range(3)]
        )
        penalised = worst_case(
            torch.tensor(means), divergence=KL(), penalty=1 / 0.7, nominal=torch.tensor(weights)
        )
        weights = weights * np.exp(0.7 * means)
        weights /= weights.sum()
        objective = rule.objective(losses, torch.tensor(rows))
        objective.backward()
        np.testing.assert_allclose(rule.weights, weights, rtol=1e-5)
        np.testing.assert_allclose(penalised.weights, weights, rtol=1e-6)
        assert objective.item() == pytest.approx(float(weights @ means), rel=1e-5)
        shares = [weights[g] / (members == g).sum() for g in members]
        np.testing.assert_allclose(losses.grad, shares, rtol=1e-5)


def test_the_tail_of_a_batch(methods):
    rule = methods.Tail(8, level=0.25)
    losses = torch.tensor([3.0, 1.0, 9.0, 2.0, 7.0, 1.0, 0.0, 5.0])
    assert rule.objective(losses, torch.arange(8)).item() == pytest.approx(8.0)


@pytest.mark.parametrize("apply_to", ["objective", "sampling"])
def test_drgr_weighs_groups_by_kl_weights_from_its_beginning_on(methods, apply_to):
    rule = methods.Drgr(GROUPS, 3, penalty=0.5, begin=2, apply_to=apply_to)
    sizes = np.array([5, 2, 1])
    sums, counts = np.zeros(3), np.zeros(3)
    rng = np.random.default_rng(0)
    rows = torch.tensor([0, 1, 5, 6, 7])
    members = GROUPS[rows].numpy()

    def shares(step):
        """What a group's samples are drawn times what they count."""
        drawn = rule.shares(step).double().numpy()
        if apply_to == "sampling":
            mass = np.array([drawn[group == GROUPS.numpy()].sum() for group in range(3)])
            return mass / mass.sum()
        np.testing.assert_allclose(drawn, drawn[0])
        factors = rule.adversary.weights.objective.numpy()
        return sizes / 8 * factors

    def factors(weights):
        return np.ones(5) if apply_to == "sampling" else (weights / (sizes / 8))[members]

    for step in range(2):
        np.testing.assert_allclose(shares(step), [1 / 3] * 3, rtol=1e-6)
        values = rng.random(5)
        found = rule.objective(torch.tensor(values), rows)
        assert found.item() == pytest.approx((factors(np.full(3, 1 / 3)) * values).mean(), rel=1e-6)
        sums = 0.9 * sums + [values[:2].sum(), values[2:4].sum(), values[4]]
        counts = 0.9 * counts + [2, 2, 1]
    expected = np.exp(sums / counts / 0.5)
    expected /= expected.sum()
    np.testing.assert_allclose(shares(2), expected, rtol=1e-5)
    values = rng.random(5)
    found = rule.objective(torch.tensor(values), rows)
    assert found.item() == pytest.approx((factors(expected) * values).mean(), rel=1e-5)
    rule.objective(torch.tensor([50.0]), torch.tensor([0]))
    np.testing.assert_allclose(shares(3), expected, rtol=1e-5)
    assert shares(12)[0] > expected[0]


def test_jtt_draws_the_errors_of_its_first_model_more_often(methods, model, generated, monkeypatch):
    stages = []

    def recorded(samples, rule, training, **options):
        result = model.fit(samples, rule, training, **options)
        # The second stage trains a fresh model, so the weights of the first are kept here.
        stages.append((rule, training.steps, result))
        return result

    monkeypatch.setattr(methods, "fit", recorded)
    training = model.Training(12, 64, seed=0)
    result = methods.train_jtt(generated.train, 4, training, {"factor": 7.0})
    (first_rule, first_steps, first), (second_rule, second_steps, second) = stages
    assert (first_rule.drawn == 1).all()
    with torch.no_grad():
        logits, _ = first.model.train()(generated.train.features)
    predicted = (logits[:, 1] > logits[:, 0]).long()
    wrong = (predicted != generated.train.labels).tolist()
    assert 0 < sum(wrong) < len(wrong)
    assert second_rule.drawn.tolist() == [7.0 if error else 1.0 for error in wrong]
    assert second is result
    assert second.model is not first.model
    forward_as_steps = -(-len(wrong) // (3 * 64))
    assert first_steps + second_steps + forward_as_steps == 12
    assert result.ledger.steps == first_steps + second_steps
    reference = methods.train_erm(generated.train, 4, training, {"weight_decay": 0.01})
    assert result.ledger.flops <= reference.ledger.flops


def test_jtt_needs_steps_for_both_stages(methods, model):
    with pytest.raises(ValueError, match="steps must exceed 6"):
        methods.jtt_stages(model.Training(6, 64, seed=0), 800)


def test_every_method_has_as_many_trials(methods):
    assert {len(method.trials) for method in methods.METHODS} == {5}
    assert len({method.name for method in methods.METHODS}) == 9


def test_a_batch_over_its_budget_is_counted(model, generated):
    features = generated.train.features[:10]
    _, routing = model.fresh_model(generated.train, 0).train()(features)
    ledger = model.Ledger()
    ledger.enter(routing, 1.0)
    assert (ledger.assignments, ledger.assignments_over_budget) == (20, 0)
    routing.plan.keep[:] = True
    ledger.enter(routing, 1.0)
    over = routing.plan.keep.numel() - 20
    assert (ledger.batches_over_budget, ledger.assignments_over_budget) == (1, over)
    assert over > 0


def test_accuracy_of_groups(model, generated):
    classifier = model.fresh_model(generated.test, 3)
    scores = model.evaluate(classifier, generated.test, 4)
    with torch.no_grad():
        logits, _ = classifier.eval()(generated.test.features)
    right = logits.numpy().argmax(axis=1) == generated.test.labels.numpy()
    groups = generated.test.groups.numpy()
    assert scores.groups == pytest.approx([right[groups == g].mean() for g in range(4)])
    assert scores.worst == min(scores.groups)
    assert scores.average == pytest.approx(right.mean())


@pytest.mark.parametrize(
    ("mean", "low", "high", "expected"),
    [
        (0.021, 0.01, 0.032, "2.1 points above that of ERM (paired, 95 % interval +1.0 to +3.2"),
        (-0.05, -0.12, 0.02, "5.0 points below that of ERM (paired, 95 % interval -12.0 to +2.0"),
    ],
)
def test_comparisons_are_told_from_the_result(page, mean, low, high, expected):
    pair = {"mean": mean, "student_low": low, "student_high": high, "seeds": 5, "other": "ERM"}
    line = page.compared(pair)
    assert expected in line
    assert line.endswith("they differ." if low > 0 else "not told apart.")


def test_all_data_sets_together(page):
    figures = {"DRGR": (0.6, 0.7), "ERM": (0.2, 0.75), "JTT": (0.65, 0.3)}
    summary = [
        {"method": method, "data": data, "worst_group_accuracy": {"mean": value}}
        for method, values in figures.items()
        for data, value in zip(("faces", "census"), values, strict=True)
    ]
    assert page.overall({"summary": summary})[-3:] == [
        "| DRGR | 65.0 | 5.0 |",
        "| ERM | 47.5 | 45.0 |",
        "| JTT | 47.5 | 45.0 |",
    ]
