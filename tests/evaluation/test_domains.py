"""Evaluation against an explicit loop over windows in float64, and its records."""

import copy
import math
from types import ModuleType

import pytest
import torch
from tokenizers import Tokenizer

from drgr.data import Corpus
from drgr.errors import DataError
from drgr.evaluation import evaluate_domains, token_losses, validation_record

LENGTH = 32


@pytest.fixture(scope="module")
def run(runs: ModuleType, corpus: Corpus, tmp_path_factory):
    """A trained run: prices are learned and losses differ."""
    config = runs.small_config(training__steps=6)
    _, run = runs.run_small(config, corpus, tmp_path_factory.mktemp("run"))
    return run


@pytest.fixture(scope="module")
def scores(run, corpus: Corpus):
    return evaluate_domains(
        run.attachment,
        corpus,
        split="test",
        max_windows=5,
        sequence_length=LENGTH,
        batch_size=3,
    )


def loss_of_window(model, tokens) -> float:
    """Summed loss in nats of one window of ``LENGTH + 1`` tokens, in float64."""
    ids = torch.tensor([int(token) for token in tokens])
    with torch.no_grad():
        logits = model(input_ids=ids[:-1].unsqueeze(0), use_cache=False).logits[0].double()
    total = 0.0
    for row, label in zip(logits, ids[1:].tolist(), strict=True):
        shifted = row - row.max()
        total -= float(shifted[label] - shifted.exp().sum().log())
    return total


def test_losses_against_a_loop_over_windows(run, corpus: Corpus, scores):
    model = run.attachment.model.eval()
    for index, domain in enumerate(corpus.domains):
        tokens = corpus.tokens("test", domain)
        count = (len(tokens) - 1) // LENGTH
        starts = [number * count // 5 * LENGTH for number in range(5)]
        expected = sum(loss_of_window(model, tokens[s : s + LENGTH + 1]) for s in starts)
        assert float(scores.loss_sums[index]) == pytest.approx(expected, rel=1e-5)
        assert int(scores.num_tokens[index]) == 5 * LENGTH
        mean = expected / (5 * LENGTH)
        assert float(scores.losses[index]) == pytest.approx(mean, rel=1e-5)
    assert scores.domains == corpus.domains


def test_bits_per_byte_counts_the_bytes_of_the_text(corpus: Corpus, scores):
    """The split decoded to text: ``loss / ln 2 * tokens / bytes``."""
    tokenizer = Tokenizer.from_file(str(corpus.tokenizer_directory / "tokenizer.json"))
    for index, domain in enumerate(corpus.domains):
        tokens = corpus.tokens("test", domain).tolist()
        text = tokenizer.decode(tokens, skip_special_tokens=True)
        ratio = len(tokens) / len(text.encode())
        expected = float(scores.losses[index]) / math.log(2) * ratio
        assert float(scores.bits_per_byte[index]) == pytest.approx(expected, rel=1e-3)
    bits = scores.bits_per_byte.tolist()
    assert bits[scores.worst] == max(bits)


def test_routes_do_not_depend_on_the_batch(run, corpus: Corpus, scores):
    for batch_size in (1, 5):
        other = evaluate_domains(
            run.attachment,
            corpus,
            split="test",
            max_windows=5,
            sequence_length=LENGTH,
            batch_size=batch_size,
        )
        assert torch.equal(other.expert_load, scores.expert_load)
        torch.testing.assert_close(other.loss_sums, scores.loss_sums, rtol=1e-6, atol=0)


def test_compute_is_counted_by_layer_domain_and_expert(corpus: Corpus, scores):
    assert scores.expert_load.shape == (2, len(corpus.domains), 8)
    assert scores.spend == int(scores.expert_load.sum())
    tokens = 5 * LENGTH
    for index in range(len(corpus.domains)):
        mean = float(scores.expert_load[:, index].sum()) / (2 * tokens)
        assert float(scores.experts_per_token[index]) == pytest.approx(mean)
        assert 1 <= mean <= 4
    # 1.7 experts for each token: the limit is rounded down in each batch and layer, five windows
    # being a batch of three and one of two.
    per_domain = 2 * (math.floor(1.7 * 3 * LENGTH) + math.floor(1.7 * 2 * LENGTH))
    assert scores.limit == len(corpus.domains) * per_domain


def test_layers_against_a_loop_over_tokens(run, corpus: Corpus, scores):
    """Entropies by the routers' own scores, similarities and loads with loops, in float64."""
    model, names = run.attachment.model.eval(), run.attachment.layer_names
    entropies = torch.zeros(2, dtype=torch.float64)
    for domain in corpus.domains:
        tokens = corpus.tokens("test", domain)
        count = (len(tokens) - 1) // LENGTH
        for start in [number * count // 5 * LENGTH for number in range(5)]:
            ids = torch.tensor([int(token) for token in tokens[start : start + LENGTH]])
            with run.attachment.record() as records, torch.no_grad():
                model(input_ids=ids.unsqueeze(0), use_cache=False)
            for layer, routing in enumerate(records):
                for p in routing.logits.double().softmax(dim=1):
                    entropies[layer] -= float((p * p.log()).sum()) / math.log(8)
    layers = validation_record(scores, step=6)["layers"]
    assert [layer["name"] for layer in layers] == list(names) == list(scores.layer_names)
    for index, layer in enumerate(layers):
        expected = float(entropies[index]) / (4 * 5 * LENGTH)
        assert layer["routing_entropy"] == pytest.approx(expected, rel=1e-5)
        rows = model.get_submodule(names[index]).gate.weight.detach().double()
        cosines = [
            float(rows[i] @ rows[j] / rows[i].norm() / rows[j].norm())
            for i in range(8)
            for j in range(8)
            if i != j
        ]
        assert layer["router_similarity"] == pytest.approx(sum(cosines) / 56, rel=1e-6)
        load = scores.expert_load[index].sum(dim=0).tolist()
        relative = sorted(count * 8 / sum(load) for count in load)
        assert layer["load"] == load
        assert layer["overload_factor"] == pytest.approx(relative[-1])
        assert layer["mean_violation"] == pytest.approx(sum(abs(r - 1) for r in relative) / 8)
        assert layer["dead_experts"] == load.count(0)
        for rank, value in layer["load_percentiles"].items():
            place = int(rank) / 100 * 7
            below = relative[int(place)]
            between = below + (place - int(place)) * (relative[math.ceil(place)] - below)
            assert value == pytest.approx(between)


@pytest.mark.parametrize("training", [True, False])
def test_nothing_is_changed(runs: ModuleType, run, corpus: Corpus, training):
    run.attachment.model.train(training)
    before, generator = copy.deepcopy(runs.final_state(run)), torch.get_rng_state()
    evaluate_domains(
        run.attachment,
        corpus,
        split="validation",
        max_windows=2,
        sequence_length=LENGTH,
        batch_size=4,
    )
    runs.assert_same(runs.final_state(run), before)
    assert torch.equal(torch.get_rng_state(), generator)
    assert run.attachment.model.training == training
    assert not any(parameter.grad_fn for parameter in run.attachment.model.parameters())


def test_all_windows_are_the_default(run, corpus: Corpus):
    length = 2000
    scores = evaluate_domains(
        run.attachment,
        corpus,
        split="validation",
        max_windows=None,
        sequence_length=length,
        batch_size=4,
    )
    for index, domain in enumerate(corpus.domains):
        windows = (len(corpus.tokens("validation", domain)) - 1) // length
        assert int(scores.num_tokens[index]) == windows * length


def test_unknown_splits_are_refused_and_the_mode_is_restored(run, corpus: Corpus):
    run.attachment.model.train()
    with pytest.raises(DataError, match="unknown split 'tset'; did you mean 'test'"):
        evaluate_domains(
            run.attachment,
            corpus,
            split="tset",
            max_windows=1,
            sequence_length=LENGTH,
            batch_size=1,
        )
    assert run.attachment.model.training


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_token_losses(dtype):
    logits = torch.randn(2, 3, 5, dtype=dtype) * 4
    labels = torch.randint(0, 5, (2, 3))
    losses = token_losses(logits, labels)
    assert losses.shape == (2, 3)
    assert losses.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    for row in range(2):
        for column in range(3):
            powers = [math.exp(value) for value in logits[row, column].tolist()]
            expected = -math.log(powers[labels[row, column]] / sum(powers))
            assert float(losses[row, column]) == pytest.approx(expected, rel=1e-5, abs=1e-6)


def test_validation_record_names_the_worst(scores):
    record = validation_record(scores, step=6)
    assert record["kind"] == "validation"
    assert record["step"] == 6
    bits = record["bits_per_byte"]
    assert record["worst_bits_per_byte"] == max(bits.values()) == bits[record["worst_domain"]]
    assert record["mean_bits_per_byte"] == pytest.approx(sum(bits.values()) / len(bits))
    assert (record["budget"], record["spend"]) == (scores.limit, scores.spend)
