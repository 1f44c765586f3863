"""One pass over a split, against explicit loops over windows, tokens and layers."""

import copy
import importlib.util
import math
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch

from drgr.budgets import TokenBudget
from drgr.data import Corpus
from drgr.errors import DataError, NonFiniteLossError, UnknownRouterError
from drgr.evaluation import AttachedModel, PlainModel, evaluate_domains, evaluate_tokens
from drgr.integrations.transformers import attach
from drgr.models import tiny_olmoe, tiny_qwen3_moe
from drgr.routing.diagnostics import routing_entropy

LENGTH, WINDOWS = 24, 3
PASS = {"split": "test", "max_windows": WINDOWS, "sequence_length": LENGTH, "batch_size": 2}


def build(corpus: Corpus, *, make=tiny_olmoe):
    return make(
        vocabulary_size=corpus.vocabulary_size,
        hidden_size=16,
        expert_size=16,
        num_layers=2,
        num_heads=2,
        num_experts=4,
        seed=1,
    )


def attached(corpus: Corpus):
    attachment = attach(build(corpus), budget=TokenBudget(minimum=1, maximum=3, average=1.5))
    for number, policy in enumerate(attachment.policies):  # prices as after some training
        policy.selector.load_state_dict(
            {
                key: torch.full_like(value, 0.22 + 0.05 * number)
                if value.is_floating_point()
                else value
                for key, value in policy.selector.state_dict().items()
            }
        )
    return attachment


def windows_of(corpus: Corpus, domain: str):
    tokens = corpus.tokens("test", domain)
    count = (len(tokens) - 1) // LENGTH
    for number in range(WINDOWS):
        start = number * count // WINDOWS * LENGTH
        yield torch.tensor([int(token) for token in tokens[start : start + LENGTH + 1]])


def losses_of_window(model, window):
    with torch.no_grad():
        logits = model(input_ids=window[:-1].unsqueeze(0), use_cache=False).logits[0].double()
    logs = logits - logits.exp().sum(dim=1, keepdim=True).log()
    return [-float(row[label]) for row, label in zip(logs, window[1:].tolist(), strict=True)]


@pytest.fixture(scope="module")
def measured(corpus: Corpus):
    model = build(corpus)
    return model, evaluate_tokens(PlainModel(model), corpus, **PASS)


def test_losses_against_a_loop_over_windows(corpus: Corpus, measured):
    model, scores = measured
    model.eval()
    for index, domain in enumerate(corpus.domains):
        rows = [losses_of_window(model, window) for window in windows_of(corpus, domain)]
        flat = [loss for row in rows for loss in row]
        assert scores.token_losses[index].tolist() == pytest.approx(flat, rel=1e-5)
        means = [sum(row) / LENGTH for row in rows]
        assert scores.window_losses[index].tolist() == pytest.approx(means, rel=1e-6)
        assert float(scores.domains.losses[index]) == pytest.approx(sum(flat) / len(flat), rel=1e-6)
    assert scores.kept_per_window == LENGTH


def test_deciles_against_counting(corpus: Corpus, measured):
    model, scores = measured
    model.eval()
    counts = Counter()
    for domain in corpus.domains:
        counts.update(corpus.tokens("train", domain).tolist())
    total, before, decile = sum(counts.values()), 0, {}
    for token in sorted(range(corpus.vocabulary_size), key=lambda token: (counts[token], token)):
        middle = (before + counts[token] / 2) / total
        decile[token] = min(9, math.floor(10 * middle + 1e-12))
        before += counts[token]
    for index, domain in enumerate(corpus.domains):
        sums, numbers = [0.0] * 10, [0] * 10
        for window in windows_of(corpus, domain):
            labels = window[1:].tolist()
            for label, loss in zip(labels, losses_of_window(model, window), strict=True):
                sums[decile[label]] += loss
                numbers[decile[label]] += 1
        assert scores.decile_tokens[index].tolist() == numbers
        assert scores.decile_loss_sums[index].tolist() == pytest.approx(sums, rel=1e-5)


@pytest.mark.parametrize("make", [tiny_olmoe, tiny_qwen3_moe])
def test_routes_of_a_plain_model_are_its_own(corpus: Corpus, make):
    """Against the router logits that transformers returns, and its own number of experts."""
    model = build(corpus, make=make).eval()
    scores = evaluate_tokens(PlainModel(model), corpus, **PASS)
    top_k = model.config.num_experts_per_tok
    for index, domain in enumerate(corpus.domains):
        load, entropies = torch.zeros(2, 4, dtype=torch.int64), [[], []]
        for window in windows_of(corpus, domain):
            with torch.no_grad():
                output = model(
                    input_ids=window[:-1].unsqueeze(0), use_cache=False, output_router_logits=True
                )
            for layer, logits in enumerate(output.router_logits):
                chosen = logits.topk(top_k, dim=1).indices.flatten().tolist()
                load[layer] += torch.tensor([chosen.count(expert) for expert in range(4)])
                entropies[layer].append(float(routing_entropy(logits.double().softmax(dim=1))))
        assert torch.equal(scores.domains.expert_load[:, index], load)
        means = [sum(values) / len(values) for values in entropies]
        assert scores.entropy[:, index].tolist() == pytest.approx(means, rel=1e-5)
        assert scores.expert_counts[index].tolist() == [0] * top_k + [2 * WINDOWS * LENGTH]
    assert not scores.has_budget
    assert scores.domains.limit == scores.domains.spend


def test_an_attached_model_gives_what_evaluate_domains_gives(corpus: Corpus):
    attachment = attached(corpus)
    expected = evaluate_domains(attachment, corpus, **PASS)
    scores = evaluate_tokens(AttachedModel(attachment), corpus, **PASS)
    assert torch.equal(scores.domains.loss_sums, expected.loss_sums)
    assert torch.equal(scores.domains.expert_load, expected.expert_load)
    assert scores.domains.limit == expected.limit
    assert scores.has_budget
    # Some tokens have one expert and some have more.
    spread = scores.expert_counts.sum(dim=0)
    assert len(spread) == 4
    assert spread[0] == 0 and spread[1] > 0 and spread[2:].sum() > 0  # noqa: PT018
    counted = (scores.expert_counts * torch.arange(4)).sum(dim=1)
    assert torch.equal(counted, expected.expert_load.sum(dim=(0, 2)))


def test_layers_over_their_budget_are_counted(corpus: Corpus):
    attachment = attached(corpus)
    model = attachment.model.eval()
    over = 0
    for index, domain in enumerate(corpus.domains):
        windows = list(windows_of(corpus, domain))
        for rows in (windows[:2], windows[2:]):
            ids = torch.stack([row[:-1] for row in rows])
            with torch.no_grad(), attachment.from_source(index), attachment.record() as records:
                model(input_ids=ids, use_cache=False)
            limit = math.floor(1.5 * ids.numel())
            over += sum(int(routing.plan.keep.sum()) > limit for routing in records)
    scores = evaluate_tokens(AttachedModel(attachment), corpus, **PASS)
    assert scores.layers_over == over
    assert 0 < over < 2 * 2 * len(corpus.domains)


@pytest.mark.parametrize("limit", [1, 40, 100])
def test_losses_beyond_the_limit_are_sampled(corpus: Corpus, measured, limit):
    model, scores = measured
    windows = WINDOWS * len(corpus.domains)
    kept = max(1, limit // windows)
    sampled = {
        batch_size: evaluate_tokens(
            PlainModel(model), corpus, **(PASS | {"batch_size": batch_size}), token_limit=limit
        )
        for batch_size in (1, 3)
    }
    for index in range(len(corpus.domains)):
        whole = scores.token_losses[index].view(WINDOWS, LENGTH).tolist()
        losses = sampled[1].token_losses[index]
        torch.testing.assert_close(losses, sampled[3].token_losses[index], rtol=1e-5, atol=1e-5)
        assert len(losses) == WINDOWS * kept
        for row, own in zip(losses.view(WINDOWS, kept).tolist(), whole, strict=True):
            places = [min(range(LENGTH), key=lambda i: abs(own[i] - loss)) for loss in row]
            assert [own[place] for place in places] == pytest.approx(row, rel=1e-4)
            assert len(set(places)) == kept
    # Sums and errors are of all tokens whatever is kept.
    torch.testing.assert_close(sampled[3].domains.loss_sums, scores.domains.loss_sums)
    assert (sampled[1].kept_per_window, sampled[1].sequence_length) == (kept, LENGTH)


def test_every_position_has_the_same_chance():
    from drgr.evaluation.token_pass import _kept_positions

    positions = _kept_positions(20000, 7, 20000 * 3)
    counts = torch.bincount(positions.flatten(), minlength=7)
    assert positions.shape == (20000, 3)
    assert (counts.double() / 20000 - 3 / 7).abs().max() < 0.02


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("kind", ["plain", "attached"])
def test_nothing_is_changed(corpus: Corpus, kind, training):
    attachment = attached(corpus) if kind == "attached" else None
    model = build(corpus) if attachment is None else attachment.model
    model.train(training)
    subject = PlainModel(model) if attachment is None else AttachedModel(attachment)

    def state():
        hooks = [len(part._forward_hooks) for part in model.modules()]
        routing = {} if attachment is None else attachment.state_dict()
        modes = [part.training for part in model.modules()]
        config = copy.deepcopy(vars(model.config))
        return copy.deepcopy(model.state_dict()), hooks, copy.deepcopy(routing), modes, config

    before, generator = state(), torch.get_rng_state()
    evaluate_tokens(subject, corpus, **PASS)
    after = state()
    for key, tensor in before[0].items():
        assert torch.equal(after[0][key], tensor)
    assert after[1] == before[1]
    assert str(after[2]) == str(before[2])
    assert after[3:] == before[3:]
    assert torch.equal(torch.get_rng_state(), generator)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_losses_that_are_not_finite_name_the_domain(corpus: Corpus):
    model = build(corpus)
    with torch.no_grad():
        model.lm_head.weight[0, 0] = math.nan
    with pytest.raises(NonFiniteLossError, match=f"the test loss of domain {corpus.domains[0]}"):
        evaluate_tokens(PlainModel(model), corpus, **PASS)


def test_bad_splits_and_short_domains(corpus: Corpus, measured):
    model, _ = measured
    with pytest.raises(DataError, match="unknown split 'tset'; did you mean 'test'"):
        evaluate_tokens(PlainModel(model), corpus, **(PASS | {"split": "tset"}))
    with pytest.raises(DataError, match="shorten it or add text"):
        evaluate_tokens(PlainModel(model), corpus, **(PASS | {"sequence_length": 10**6}))


def test_models_without_experts_are_refused():
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
    )
    with pytest.raises(UnknownRouterError, match="LlamaForCausalLM has no MoE layer"):
        PlainModel(LlamaForCausalLM(config))


def load_small_runs():
    path = Path(__file__).parents[1] / "small_runs.py"
    spec = importlib.util.spec_from_file_location("small_runs_of_evaluation", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def evaluate_everything(cache: str):
    """The passes of a plain and an attached model in the processes of the default group."""
    corpus = load_small_runs().prepare(Path(cache))
    subjects = [PlainModel(build(corpus)), AttachedModel(attached(corpus))]
    passes = [evaluate_tokens(subject, corpus, **PASS) for subject in subjects]
    # More processes than batches: one has nothing to do.
    few = PASS | {"max_windows": 1}
    return [*passes, evaluate_tokens(subjects[0], corpus, **few)]


@pytest.mark.slow
def test_processes_share_the_work(corpus: Corpus, cache: Path, run_processes):
    alone = evaluate_everything(str(cache))
    for together in run_processes(evaluate_everything, 2, str(cache), timeout=120):
        for mine, theirs in zip(together, alone, strict=True):
            torch.testing.assert_close(mine.domains.loss_sums, theirs.domains.loss_sums)
            torch.testing.assert_close(mine.decile_loss_sums, theirs.decile_loss_sums)
            torch.testing.assert_close(mine.entropy, theirs.entropy)
            for name in ("num_tokens", "expert_load"):
                assert torch.equal(getattr(mine.domains, name), getattr(theirs.domains, name))
            for name in ("expert_counts", "decile_tokens"):
                assert torch.equal(getattr(mine, name), getattr(theirs, name))
            for name in ("window_losses", "token_losses"):
                for part, other in zip(getattr(mine, name), getattr(theirs, name), strict=True):
                    assert torch.equal(part, other)
            assert mine.domains.limit == theirs.domains.limit
            assert mine.layers_over == theirs.layers_over
