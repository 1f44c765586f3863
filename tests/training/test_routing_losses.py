"""Losses of routing in real steps: their values, gradients, splits over processes, resumption."""

import dataclasses
import importlib.util
import math
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from drgr.data import Corpus
from drgr.errors import ConfigError, UnknownRouterError
from drgr.integrations.transformers import Attachment
from drgr.training import build_run
from drgr.training.step import train_step

FIXED = {"minimum": 2, "maximum": 2, "average": 2}
LENGTH, EXPERTS, CHUNK, SHARPNESS, TEMPERATURE = 32, 8, 5, 3.0, 0.5
LOSSES: dict[str, dict[str, Any]] = {
    "global-balance": {},
    "micro-balance": {},
    "sequence-balance": {},
    "top1-balance": {"temperature": TEMPERATURE},
    "router-z": {},
    "tsallis": {"order": 2.0},
    "specialisation-balance": {"entropy_coefficient": 0.3},
    "routing-information": {},
    "activation-locality": {"sharpness": SHARPNESS},
    "chunk-sparsity": {"chunk_length": CHUNK},
    "expert-router-coupling": {"tolerance": 0.8},
    "expert-specialisation": {},
    "layer-coupling": {},
    "pool-balance": {},
}
# Means over tokens, pairs, chunks or parameters: the mean over equal micro-batches is that over the
# step. The others are not linear in what a micro-batch holds.
LINEAR = [
    "sequence-balance",
    "router-z",
    "tsallis",
    "activation-locality",
    "chunk-sparsity",
    "expert-router-coupling",
    "expert-specialisation",
    "layer-coupling",
]
FORMULAS = set(LOSSES) - {"expert-specialisation"}  # in test_activation_loss.py
# By definition another loss for another number of processes.
SHARED = [kind for kind in LOSSES if kind != "micro-balance"]

Array = NDArray[np.float64]


def entries(kinds, coefficient=0.5):
    return [{"kind": kind, "coefficient": coefficient, **LOSSES[kind]} for kind in kinds]


def one_step(run, corpus, *, step=0):
    """Takes a step without clipping; returns its totals, its gradient and what routing did."""
    seen: list[list[Any]] = []
    observe = run.attachment.observe

    def spy(records):
        seen.append(records)
        observe(records)

    run.attachment.observe = spy
    settings = dataclasses.replace(run.settings, clip_norm=math.inf)
    totals = train_step(
        run.forward_model,
        run.attachment,
        run.optimizer,
        corpus,
        settings,
        step=step,
        weights=run.adversary.weights,
    )
    named = run.attachment.model.named_parameters()
    return totals, {name: parameter.grad.clone() for name, parameter in named}, seen


def shares_of(routing) -> Array:
    scores = array(routing.scores)
    return scores / scores.sum(axis=1, keepdims=True)


def array(values: Tensor) -> Array:
    return values.detach().double().numpy()


def counted(routing, rows=slice(None)) -> Array:
    """Assignments by expert, one by one."""
    load = np.zeros(EXPERTS)
    ids, keep = routing.plan.expert_ids[rows].tolist(), routing.plan.keep[rows].tolist()
    for experts, runs in zip(ids, keep, strict=True):
        for expert, is_run in zip(experts, runs, strict=True):
            load[expert] += is_run
    return load


def balance(load: Array, shares: Array) -> float:
    return EXPERTS * sum(load[e] / load.sum() * shares[:, e].mean() for e in range(EXPERTS))


def entropy(p: Array) -> float:
    return -sum(float(x) * math.log(x) for x in p if x > 0)


def by_sequence(routing) -> float:
    total, count = 0.0, len(routing.scores) // LENGTH
    for number in range(count):
        rows = slice(number * LENGTH, (number + 1) * LENGTH)
        total += balance(counted(routing, rows), shares_of(routing)[rows])
    return total / count


def top1(routing) -> float:
    powers = np.exp(array(routing.logits) / TEMPERATURE)
    p = powers / powers.sum(axis=1, keepdims=True)
    return EXPERTS * float((p.mean(axis=0) ** 2).sum()) / float(p.max(axis=1).mean())


def locality(routing) -> float:
    active = 1 / (1 + np.exp(-SHARPNESS * array(routing.logits)))
    terms = []
    for token in range(1, len(active)):
        if token % LENGTH:
            before, now = active[token - 1], active[token]
            terms.append(-(now * np.log(before) + (1 - now) * np.log(1 - before)).mean())
    return float(np.mean(terms))


def chunks(routing) -> float:
    p, needed = shares_of(routing), []
    for start in range(0, len(p), LENGTH):
        for first in range(start, start + LENGTH, CHUNK):
            tokens = p[first : min(first + CHUNK, start + LENGTH)]
            needed.append(float(np.mean([1 - np.prod(1 - tokens[:, e]) for e in range(EXPERTS)])))
    return float(np.mean(needed))


def coupling(router: Array, gates: Array, drawn: Array, tolerance: float) -> float:
    proxies = router.copy()
    for i in range(EXPERTS):
        nearest = min(np.linalg.norm(router[i] - router[j]) for j in range(EXPERTS) if j != i)
        proxies[i] *= 1 + nearest / (2 * np.linalg.norm(router[i])) * drawn[i]
    answers = [[np.linalg.norm(gates[j] @ proxies[i]) for j in range(EXPERTS)] for i in range(8)]
    total = 0.0
    for i in range(EXPERTS):
        for j in range(EXPERTS):
            if i != j:
                total += max(answers[i][j] - tolerance * answers[i][i], 0)
                total += max(answers[j][i] - tolerance * answers[i][i], 0)
    return total / EXPERTS**2


def mass(routing) -> Array:
    p = shares_of(routing)
    ids, keep = routing.plan.expert_ids, routing.plan.keep
    return np.array(
        [
            sum(p[t, e] for e, runs in zip(ids[t], keep[t], strict=True) if runs)
            for t in range(len(p))
        ]
    )


ONE_LAYER = {
    "sequence-balance": by_sequence,
    "top1-balance": top1,
    "router-z": lambda r: float((np.log(np.exp(array(r.logits)).sum(axis=1)) ** 2).mean()),
    "tsallis": lambda r: float((1 - (shares_of(r) ** 2).sum(axis=1)).mean()) / (1 - 1 / EXPERTS),
    "routing-information": lambda r: (
        float(np.mean([entropy(p) for p in shares_of(r)])) - entropy(shares_of(r).mean(axis=0))
    ),
    "activation-locality": locality,
    "chunk-sparsity": chunks,
    "micro-balance": lambda r: balance(counted(r), shares_of(r)),
}


def expected(kind: str, records, so_far: list[Array], weights) -> float:
    """One loss of one micro-batch, averaged over layers."""
    layers = range(len(records))
    if kind in ONE_LAYER:
        return float(np.mean([ONE_LAYER[kind](routing) for routing in records]))
    if kind == "layer-coupling":
        return -float(np.mean(mass(records[0]) * mass(records[1])))
    if kind == "pool-balance":
        pooled = np.mean([load / load.sum() for load in so_far], axis=0)
        return float(np.mean([balance(pooled, shares_of(routing)) for routing in records]))
    if kind == "expert-router-coupling":
        generator = np.random.default_rng((0, 0))  # seed and step
        draws = [generator.uniform(-1, 1, router.shape) for router, _ in weights]
        return float(np.mean([coupling(*weights[i], draws[i], 0.8) for i in layers]))
    values = [balance(so_far[i], shares_of(records[i])) for i in layers]
    if kind == "specialisation-balance":
        entropies = [np.mean([entropy(p) for p in shares_of(routing)]) for routing in records]
        values = [value + 0.3 * float(h) for value, h in zip(values, entropies, strict=True)]
    return float(np.mean(values))


def gate_rows(model, name: str) -> Array:
    """The first half of the packed projection, as transformers splits it."""
    packed = array(model.get_parameter(f"{name}.experts.gate_up_proj"))
    return packed[:, : packed.shape[1] // 2]


@pytest.fixture(scope="module")
def plain(runs: ModuleType, corpus: Corpus):
    """The gradient without a loss of routing."""
    config = runs.small_config(routing__budget=FIXED, training__accumulation=2)
    return one_step(build_run(config, corpus), corpus)[1]


@pytest.mark.parametrize("kind", sorted(FORMULAS))
def test_each_loss_is_its_formula(runs: ModuleType, corpus: Corpus, plain, kind):
    config = runs.small_config(
        routing__budget=FIXED, routing__losses=entries([kind]), training__accumulation=2
    )
    run = build_run(config, corpus)
    model, names = run.attachment.model, run.attachment.layer_names
    weights = [
        (array(model.get_parameter(f"{name}.gate.weight")), gate_rows(model, name))
        for name in names
    ]
    totals, gradient, seen = one_step(run, corpus)
    so_far, values = [np.zeros(EXPERTS) for _ in names], []
    for records in seen:
        so_far = [load + counted(r) for load, r in zip(so_far, records, strict=True)]
        values.append(expected(kind, records, so_far, weights))
    assert len(values) == 2
    assert run.settings.losses.names == (kind,)
    assert totals.routing_losses.tolist() == pytest.approx([np.mean(values)], rel=2e-5)
    assert float(totals.auxiliary) == pytest.approx(0.5 * np.mean(values), rel=2e-5)
    changed = {
        name: float((gradient[name] - plain[name]).abs().max() / plain[name].abs().max())
        for name in gradient
    }
    for name in names:
        assert changed[f"{name}.gate.weight"] > 1e-5
        # What couples router and experts moves both, and no more; the rest moves what routers see.
        if kind == "expert-router-coupling":
            packed = f"{name}.experts.gate_up_proj"
            moved = (gradient[packed] - plain[packed]).abs()
            half = moved.shape[1] // 2
            assert moved[:, :half].max() > 1e-5 * plain[packed].abs().max()
            assert not moved[:, half:].any()
            assert not (
                gradient[f"{name}.experts.down_proj"] - plain[f"{name}.experts.down_proj"]
            ).any()
    assert changed["lm_head.weight"] == 0


def test_coefficient_zero_watches_and_changes_no_bit(runs: ModuleType, corpus: Corpus, plain):
    config = runs.small_config(
        routing__budget=FIXED,
        routing__losses=entries(LOSSES, coefficient=0),
        training__accumulation=2,
    )
    totals, gradient, _ = one_step(build_run(config, corpus), corpus)
    assert (totals.routing_losses != 0).all()
    assert float(totals.auxiliary) == 0
    runs.assert_same(gradient, plain)


def test_the_short_form_is_the_global_balance(runs: ModuleType, corpus: Corpus):
    found = []
    for change in (
        {"routing__auxiliary_coefficient": 0.5},
        {"routing__losses": entries(["global-balance"])},
    ):
        run = build_run(runs.small_config(**change), corpus)
        totals, gradient, _ = one_step(run, corpus)
        found.append((run.settings.losses.names, totals.to_dict(), gradient))
    assert found[0][0] == ("global-balance",)
    runs.assert_same(found[0], found[1])


def test_noise_is_drawn_anew_in_each_step(runs: ModuleType, corpus: Corpus):
    values = {}
    for noise in (True, False):
        entry = {"kind": "expert-router-coupling", "coefficient": 0.0, "noise": noise}
        run = build_run(runs.small_config(routing__losses=[entry]), corpus)
        for group in run.optimizer.param_groups:
            group["lr"] = 0.0
        values[noise] = [float(one_step(run, corpus, step=s)[0].routing_losses) for s in (0, 1, 0)]
    assert values[True][0] == values[True][2] != values[True][1]
    assert values[False][0] == values[False][1] == values[False][2] not in values[True]


def steps_of(cache: str, accumulation: int) -> dict[str, Any]:
    """Losses and gradients of one step of this process group, by the list of losses."""
    small_runs = load_small_runs()
    corpus = small_runs.prepare(Path(cache))
    found = {}
    for name, kinds in (("linear", LINEAR), ("shared", SHARED), ("micro", ["micro-balance"])):
        config = small_runs.small_config(
            routing__budget=FIXED,
            routing__losses=entries(kinds),
            training__accumulation=accumulation,
        )
        run = build_run(config, corpus)
        totals, gradient, _ = one_step(run, corpus)
        values = dict(zip(run.settings.losses.names, totals.routing_losses.tolist(), strict=True))
        found[name] = (values, float(totals.auxiliary), gradient)
    return found


def load_small_runs() -> ModuleType:
    path = Path(__file__).parents[1] / "small_runs.py"
    spec = importlib.util.spec_from_file_location("small_runs_of_losses", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def compare(mine, theirs) -> None:
    values, auxiliary, gradient = mine
    assert values == pytest.approx(theirs[0], rel=1e-5)
    assert auxiliary == pytest.approx(theirs[1], rel=1e-5)
    for name, part in gradient.items():
        scale = float(theirs[2][name].abs().max())
        torch.testing.assert_close(part, theirs[2][name], rtol=1e-3, atol=2e-5 * scale, msg=name)


def test_processes_are_micro_batches_and_one_process(run_processes, corpus: Corpus, cache: Path):
    first, second = run_processes(steps_of, 2, str(cache), 1, timeout=120)
    for name in first:
        compare(second[name], first[name])
    whole, halves = steps_of(str(cache), 1), steps_of(str(cache), 2)
    compare(first["shared"], whole["shared"])
    for name in ("linear", "micro"):
        compare(first[name], halves[name])
    # What is excluded above does depend on the split, or the comparison could not fail.
    assert first["micro"][0] != pytest.approx(whole["micro"][0], rel=1e-3)
    with pytest.raises(AssertionError):
        compare(first["shared"], halves["shared"])


def test_the_adaptive_coefficient_follows_its_loss(runs: ModuleType, corpus: Corpus, tmp_path):
    """Against the rule on the logged losses: warm-up 4, windows of 2, moving linearly."""
    adaptive = {"warmup": 4, "window": 2, "smallest_rise": 0.5, "largest": 1.2}
    entry = {"kind": "chunk-sparsity", "coefficient": 0.2, "chunk_length": 8, "adaptive": adaptive}
    config = runs.small_config(
        routing__losses=[entry, {"kind": "router-z", "coefficient": 1e-3}],
        training__log_every=1,
        training__evaluate_every=50,
        training__steps=8,
    )
    runs.run_small(config, corpus, tmp_path)
    logged = [record["routing_losses"] for record in runs.read_records(tmp_path)]
    assert [set(losses) for losses in logged] == [{"chunk-sparsity", "router-z"}] * 8
    losses = [entry["chunk-sparsity"]["value"] for entry in logged]
    coefficients = [0.2, *(entry["chunk-sparsity"]["coefficient"] for entry in logged)]
    assert coefficients[:5] == [0.2] * 5
    current = 0.2
    for step in (4, 6, 8):
        ratio = sum(losses[step - 2 : step]) / sum(losses[step - 4 : step - 2])
        ratio = min(max(ratio, 1.5) if ratio > 1 else ratio, 1.2 * 0.2 / current)
        if step < 8:
            middle = current * (1 + ratio) / 2
            assert coefficients[step + 1] == pytest.approx(middle, rel=1e-12)
            current *= ratio
            assert coefficients[step + 2] == pytest.approx(current, rel=1e-12)
    assert current != 0.2
    for step, record in enumerate(runs.read_records(tmp_path)):
        parts = record["routing_losses"]
        total = coefficients[step] * losses[step] + 1e-3 * parts["router-z"]["value"]
        assert record["auxiliary_loss"] == pytest.approx(total, rel=1e-5)
        assert parts["router-z"]["coefficient"] == 1e-3


class TestMissingNeeds:
    def test_one_layer_has_no_next(self, runs: ModuleType, corpus: Corpus):
        config = runs.small_config(routing__losses=entries(["layer-coupling"]), model__num_layers=1)
        with pytest.raises(
            ConfigError, match="layer-coupling needs at least two MoE layers, got 1"
        ):
            build_run(config, corpus)

    def test_experts_without_a_gate(self, runs: ModuleType, corpus: Corpus, monkeypatch):
        def refuse(_attachment):
            raise UnknownRouterError("model.layers.0.mlp has experts without a gate projection")

        monkeypatch.setattr(Attachment, "coupled_weights", refuse)
        config = runs.small_config(routing__losses=entries(["expert-router-coupling"]))
        with pytest.raises(
            ConfigError, match=r"routing\.losses: expert-router-coupling: model\.layers"
        ):
            build_run(config, corpus)
