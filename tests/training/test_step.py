"""One optimizer step: its gradient, its budget, and what does not change it."""

import dataclasses
import math
from types import ModuleType

import pytest
import torch
from torch import Tensor

from drgr.data import Corpus, draw_batch
from drgr.training import build_run
from drgr.training.adversary import DomainWeights
from drgr.training.step import train_step

FIXED = {"routing__budget": {"minimum": 2, "maximum": 2, "average": 2}}


def weights_of(run, adversary: Tensor, apply_to: str) -> DomainWeights:
    """The weights of an adversary, as the run's own class makes them."""
    run.adversary._apply_to = apply_to
    return run.adversary._weights(adversary, gap=0.0)


def gradient_of_step(run, corpus, weights, *, step=0) -> tuple[dict[str, Tensor], object]:
    """The gradient that one step leaves, unclipped."""
    settings = dataclasses.replace(run.settings, clip_norm=math.inf)
    totals = train_step(
        run.forward_model,
        run.attachment,
        run.optimizer,
        corpus,
        settings,
        step=step,
        weights=weights,
    )
    named = run.attachment.model.named_parameters()
    return {name: parameter.grad.clone() for name, parameter in named}, totals


@pytest.mark.parametrize("apply_to", ["objective", "sampling", "nothing"])
def test_the_gradient_is_that_of_the_weighted_domain_losses(
    runs: ModuleType, corpus: Corpus, apply_to
):
    """Against ``sum_d q_d l_d`` with ``l_d`` the mean loss of a domain's rows, computed one by one.

    With 16 rows every share is a whole number of rows, so that the batch holds the domains in their
    exact proportions: the identity holds for the step, not only in expectation.
    """
    adversary = torch.tensor([0.125, 0.25, 0.5, 0.125], dtype=torch.float64)
    base = torch.tensor([0.5, 0.25, 0.125, 0.125], dtype=torch.float64)
    config = runs.small_config(training__batch_size=16, **FIXED)
    run = build_run(config, corpus)
    weights = weights_of(run, adversary, apply_to)
    gradient, totals = gradient_of_step(run, corpus, weights)

    reference = build_run(config, corpus)
    expected_weights = base if apply_to == "nothing" else adversary
    batch = draw_batch(
        corpus,
        step=0,
        seed=0,
        weights=(adversary if apply_to == "sampling" else base).numpy(),
        batch_size=16,
        sequence_length=32,
    )
    objective = torch.zeros(())
    for domain in range(4):
        rows = torch.nonzero(batch.domain == domain).flatten()
        losses = []
        for row in rows.tolist():
            logits = reference.forward_model(
                input_ids=batch.input_ids[row : row + 1], use_cache=False
            ).logits[0]
            log_probabilities = logits - logits.logsumexp(dim=-1, keepdim=True)
            losses.append(-log_probabilities.gather(1, batch.labels[row].unsqueeze(1)).mean())
        objective = objective + expected_weights[domain].float() * torch.stack(losses).mean()
    objective.backward()
    assert float(totals.objective) == pytest.approx(float(objective.detach()), rel=1e-5)
    for name, parameter in reference.attachment.model.named_parameters():
        torch.testing.assert_close(gradient[name], parameter.grad, rtol=2e-4, atol=1e-6, msg=name)


def test_a_domain_that_is_never_drawn_has_no_objective_weight(runs: ModuleType, corpus: Corpus):
    config = runs.small_config(
        data__sampling={"speech": 1, "factbook": 1, "fiction": 0, "verse": 0},
        robustness__apply_to="objective",
    )
    run = build_run(config, corpus)
    assert run.adversary.weights.objective.tolist() == [0.5, 0.5, 0.0, 0.0]
    gradient, totals = gradient_of_step(run, corpus, run.adversary.weights)
    assert math.isfinite(float(totals.objective))
    assert totals.num_tokens.tolist() == [64, 64, 0, 0]
    assert all(torch.isfinite(grad).all() for grad in gradient.values())


@pytest.mark.parametrize("accumulation", [2, 4])
def test_accumulation_changes_nothing_with_a_fixed_number_of_experts(
    runs: ModuleType, corpus: Corpus, tmp_path, accumulation
):
    """With a batch budget each micro-batch meets its own, so only fixed top-k is comparable."""
    records = {}
    for parts in (1, accumulation):
        config = runs.small_config(
            training__accumulation=parts, training__log_every=1, training__steps=6, **FIXED
        )
        path = tmp_path / str(parts)
        runs.run_small(config, corpus, path)
        records[parts] = runs.read_records(path)
    for one, many in zip(records[1], records[accumulation], strict=True):
        if one["kind"] == "train":
            assert many["loss"] == pytest.approx(one["loss"], rel=1e-4)
            assert many["gradient_norm"] == pytest.approx(one["gradient_norm"], rel=1e-3)
            assert many["spend"] == one["spend"] == many["budget"]
            assert many["domain_tokens"] == one["domain_tokens"]
            # Nothing is left to choose, so nothing has a price.
            assert [layer["price"] for layer in many["layers"]] == [None, None]


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("average", [1, 1.3, 1.7, 3.999, 4])
def test_every_step_spends_its_budget_and_not_one_assignment_more(
    runs: ModuleType, corpus: Corpus, accumulation, average
):
    config = runs.small_config(
        routing__budget={"minimum": 1, "maximum": 4, "average": average},
        training__accumulation=accumulation,
    )
    run = build_run(config, corpus)
    tokens = 4 * 32 // accumulation
    allowed = accumulation * math.floor(round(average * 1000) * tokens / 1000)
    for step in range(3):
        _, totals = gradient_of_step(run, corpus, run.adversary.weights, step=step)
        assert totals.spend.tolist() == totals.limit.tolist() == [allowed, allowed]
        assert totals.expert_load.sum(dim=1).tolist() == [allowed, allowed]
        assert float(totals.assignments.sum()) == 2 * allowed
        assert float(totals.over) == 0


def test_a_budget_in_flops_is_the_budget_in_experts(runs: ModuleType, corpus: Corpus, tmp_path):
    config = runs.small_config(training__steps=4)
    _, experts = runs.run_small(config, corpus, tmp_path / "experts")
    # Three matrices of 32 x 32 an expert, two FLOPs a multiply-add.
    cost = 2 * 3 * 32 * 32
    budget = {"unit": "flops", "minimum": cost, "maximum": 4 * cost, "average": 1.7 * cost}
    config = runs.small_config(training__steps=4, routing__budget=budget)
    _, flops = runs.run_small(config, corpus, tmp_path / "flops")
    assert flops.bounds == experts.bounds
    runs.assert_same(runs.final_state(flops), runs.final_state(experts))
    runs.assert_same(runs.results(tmp_path / "flops"), runs.results(tmp_path / "experts"))


def test_gradient_checkpointing_gives_the_same_trajectory(
    runs: ModuleType, corpus: Corpus, tmp_path
):
    records = {}
    for name, checkpointing in (("plain", False), ("checkpointed", True)):
        config = runs.small_config(
            training__gradient_checkpointing=checkpointing,
            training__log_every=1,
            training__steps=5,
            routing__auxiliary_coefficient=0.01,
        )
        _, run = runs.run_small(config, corpus, tmp_path / name)
        records[name] = runs.read_records(tmp_path / name)
        assert run.attachment.model.is_activation_checkpointing == checkpointing
    for plain, checkpointed in zip(records["plain"], records["checkpointed"], strict=True):
        assert checkpointed["kind"] == plain["kind"]
        if plain["kind"] == "train":
            assert checkpointed["loss"] == pytest.approx(plain["loss"], rel=1e-5)
            assert checkpointed["gradient_norm"] == pytest.approx(plain["gradient_norm"], rel=1e-4)
            assert [layer["load"] for layer in checkpointed["layers"]] == [
                layer["load"] for layer in plain["layers"]
            ]
            # Recomputation is not free, and is counted: at most one more forward in three.
            assert plain["flops"] < checkpointed["flops"] < plain["flops"] * 4 / 3


def test_bfloat16_autocast_runs_and_stays_finite(runs: ModuleType, corpus: Corpus, tmp_path):
    config = runs.small_config(training__precision="bfloat16", training__log_every=1)
    _, run = runs.run_small(config, corpus, tmp_path)
    assert run.settings.autocast == torch.bfloat16
    assert {p.dtype for p in run.attachment.model.parameters()} == {torch.float32}
    losses = [r["loss"] for r in runs.read_records(tmp_path) if r["kind"] == "train"]
    assert all(math.isfinite(loss) for loss in losses)
    assert losses[-1] < losses[0] - 0.1
    for record in runs.read_records(tmp_path):
        if record["kind"] == "train":
            assert record["spend"] == record["budget"]


def test_measuring_traffic_changes_no_bit(runs: ModuleType, corpus: Corpus, tmp_path):
    states = {}
    for measure in (True, False):
        config = runs.small_config(
            training__steps=4,
            training__accumulation=2,
            routing__traffic={"measure": measure},
        )
        _, run = runs.run_small(config, corpus, tmp_path / str(measure))
        states[measure] = runs.final_state(run)
    records = runs.read_records(tmp_path / "False")
    trained = [record for record in records if record["kind"] == "train"]
    assert all(record["traffic"] is None for record in trained)
    assert all(layer["congestion"] is None for record in trained for layer in record["layers"])
    runs.assert_same(states[False]["model"], states[True]["model"])


@pytest.mark.parametrize("accumulation", [1, 2])
def test_traffic_is_that_of_the_whole_step(runs: ModuleType, corpus: Corpus, accumulation):
    """Against the gradients that arrive at the experts, with the same experts for every token."""
    every = {"minimum": 8, "maximum": 8, "average": 8}
    config = runs.small_config(training__accumulation=accumulation, routing__budget=every)
    run = build_run(config, corpus)
    model, arriving = run.attachment.model, []

    def watch(_module, args, output):
        mass = args[2].detach().sum(dim=1)
        output.register_hook(
            lambda g: arriving.append(float((g.double().norm(dim=1) * mass).sum()))
        )

    for name in run.attachment.layer_names:
        model.get_submodule(f"{name}.experts").register_forward_hook(watch)
    _, totals = gradient_of_step(run, corpus, run.adversary.weights)
    assert len(arriving) == 2 * accumulation
    assert float(totals.traffic.sum()) == pytest.approx(sum(arriving), rel=1e-5)
    # Rows without tokens in this step.
    absent = totals.num_tokens == 0
    assert not totals.traffic[:, absent].any()
    assert (totals.traffic[:, ~absent] > 0).all()


def test_the_penalty_lowers_congestion(runs: ModuleType, corpus: Corpus, tmp_path):
    last = {}
    for coefficient in (0.0, 1.0):
        config = runs.small_config(
            training__steps=30,
            training__log_every=10,
            training__evaluate_every=50,
            routing__controller={"kind": "none"},
            routing__traffic={"coefficient": coefficient},
        )
        runs.run_small(config, corpus, tmp_path / str(coefficient))
        records = runs.read_records(tmp_path / str(coefficient))
        trained = [record for record in records if record["kind"] == "train"]
        last[coefficient] = sum(layer["congestion"] for layer in trained[-1]["layers"])
    assert last[1.0] < 0.9 * last[0.0]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of the compiler, about its own parts
def test_compiled_model_gives_the_same_trajectory(
    runs: ModuleType, corpus: Corpus, tmp_path, monkeypatch
):
    """Traced and differentiated ahead of time, but not turned into C++: that takes minutes."""
    compile_module = torch.nn.Module.compile
    compiled_models = []

    def compile_without_code(model):
        compiled_models.append(model)
        compile_module(model, backend="aot_eager")

    monkeypatch.setattr(torch.nn.Module, "compile", compile_without_code)
    records = {}
    for name, compiled in (("plain", False), ("compiled", True)):
        config = runs.small_config(
            training__compile=compiled,
            training__log_every=1,
            training__steps=2,
            training__test_windows=2,
            model__num_layers=1,
        )
        runs.run_small(config, corpus, tmp_path / name)
        records[name] = runs.read_records(tmp_path / name)
    assert len(compiled_models) == 1
    for plain, compiled in zip(records["plain"], records["compiled"], strict=True):
        assert compiled["loss"] == pytest.approx(plain["loss"], rel=1e-4)
        assert compiled["spend"] == plain["spend"]
