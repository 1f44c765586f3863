"""Held-out sums for the adversary, against a loop over the same windows."""

from functools import partial
from types import ModuleType

import numpy as np
import pytest
import torch

from drgr.data import Corpus, draw_batch
from drgr.training import build_run, held_out
from drgr.training.held_out import held_out_sums


def test_sums_counts_and_cost(runs: ModuleType, corpus: Corpus, tmp_path):
    config = runs.small_config(training__steps=3)
    _, run = runs.run_small(config, corpus, tmp_path)
    model = run.attachment.model
    before = runs.final_state(run)
    model.train()
    loss_sums, num_tokens, flops = held_out_sums(
        run.attachment, corpus, run.settings, run.flops, step=7, windows=3
    )
    assert model.training
    assert num_tokens.tolist() == [96, 96, 96, 96]

    model.eval()
    batch = draw_batch(
        corpus,
        split="validation",
        step=7,
        seed=0,
        weights=np.ones(4),
        batch_size=12,
        sequence_length=32,
    )
    expected = torch.zeros(4, dtype=torch.float64)
    for row in range(12):
        with torch.no_grad():
            logits = model(input_ids=batch.input_ids[row : row + 1], use_cache=False).logits[0]
        log_probabilities = torch.log_softmax(logits.double(), dim=-1)
        expected[batch.domain[row]] -= log_probabilities.gather(
            1, batch.labels[row].unsqueeze(1)
        ).sum()
    torch.testing.assert_close(loss_sums, expected, rtol=1e-5, atol=0)
    # Dense products of every token, plus one to four experts in each of two layers.
    dense = run.flops.dense_per_token * 384 + run.flops.attention_per_pair * 384 * 32
    assert dense + 384 * 2 * run.flops.per_assignment <= flops
    assert flops <= dense + 384 * 8 * run.flops.per_assignment
    assert (flops - dense) % run.flops.per_assignment == pytest.approx(0, abs=1)
    runs.assert_same(runs.final_state(run), before)


def test_steps_draw_different_windows(runs: ModuleType, corpus: Corpus):
    run = build_run(runs.small_config(), corpus)
    sums = [
        held_out_sums(run.attachment, corpus, run.settings, run.flops, step=step, windows=1)[0]
        for step in (0, 1, 0)
    ]
    assert torch.equal(sums[0], sums[2])
    assert not torch.equal(sums[0], sums[1])


@pytest.mark.parametrize("processes", [3, 7])
def test_processes_share_the_rows(runs: ModuleType, corpus: Corpus, monkeypatch, processes):
    """Their parts add up to the whole, also where some of seven have none of the four rows."""
    run = build_run(runs.small_config(training__batch_size=42), corpus)
    measure = partial(
        held_out_sums, run.attachment, corpus, run.settings, run.flops, step=1, windows=1
    )
    whole_losses, whole_tokens, _ = measure()
    monkeypatch.setattr(held_out, "world_size", lambda _: processes)
    parts = []
    for number in range(processes):
        monkeypatch.setattr(held_out, "rank", lambda _, number=number: number)
        parts.append(measure())
    torch.testing.assert_close(sum(part[0] for part in parts), whole_losses, rtol=1e-6, atol=0)
    assert torch.equal(sum(part[1] for part in parts), whole_tokens)
    assert [int(part[1].sum()) for part in parts].count(0) == max(0, processes - 4)
