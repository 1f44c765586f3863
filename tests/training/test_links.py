"""Link gates in a run: what closed links save, and that they stay closed over a resume."""

import json
from types import ModuleType

import pytest
import torch

from drgr.data import Corpus
from drgr.training import RunDirectory, build_run, train
from drgr.training.held_out import held_out_sums
from drgr.training.step import train_step

FIXED = {"minimum": 2, "maximum": 2, "average": 2}
SETTINGS = {
    "routing__link_gates": True,
    "routing__budget": FIXED,
    "training__steps": 6,
    "training__evaluate_every": 4,
}


def closed_links(run) -> torch.Tensor:
    """Leaves the second domain one link a layer, and the first one the upper half."""
    links = torch.zeros_like(run.attachment.open_links)
    links[:, 1, 1:] = True
    links[:, 0, :4] = True
    return links


def trained(runs: ModuleType, corpus: Corpus, path, *, close=True, resume=False, kill_after=None):
    run = build_run(runs.small_config(**SETTINGS), corpus)
    if close:
        run.attachment.link_gates.close(closed_links(run))
    train(
        run,
        RunDirectory(path),
        observer=runs.Watcher(kill_after=kill_after),
        environment={"command": "test"},
        resume=resume,
    )
    return run


@pytest.fixture(scope="module")
def straight(runs: ModuleType, corpus: Corpus, tmp_path_factory):
    path = tmp_path_factory.mktemp("straight")
    return trained(runs, corpus, path), path


def test_closed_links_carry_nothing_in_training_and_evaluation(runs: ModuleType, straight):
    run, path = straight
    is_open = run.attachment.open_links
    evaluation = json.loads((path / "evaluation.json").read_text())
    records = runs.read_records(path)
    for number, layer in enumerate(evaluation["layers"]):
        for source, name in enumerate(run.corpus.domains):
            for key in ("domain_load", "domain_traffic"):
                amounts = torch.tensor(layer[key][name])
                assert not amounts[~is_open[number, source]].any(), (key, name)
                assert amounts.any()
    names = run.corpus.domains
    experts = {name: evaluation["domains"][name]["experts_per_token"] for name in names}
    assert experts == {names[0]: 2, names[1]: 1, names[2]: 2, names[3]: 2}
    for record in records:
        assert record["experts_per_token"][names[1]] in (None, 1)
    for record in (record for record in records if record["kind"] == "train"):
        assert [layer["open_links"] for layer in record["layers"]] == [4 * 8 - 7 - 4] * 2
        assert record["spend"] < record["budget"]


def test_closed_links_save_flops_and_bytes(runs: ModuleType, corpus: Corpus, tmp_path, straight):
    run, path = straight
    trained(runs, corpus, tmp_path, close=False)
    gated = [r for r in runs.read_records(path) if r["kind"] == "train"]
    plain = [r for r in runs.read_records(tmp_path) if r["kind"] == "train"]
    saved = sum(r["budget"] - r["spend"] for r in gated)
    assert saved > 0
    assert all(r["budget"] == r["spend"] for r in plain)
    # Training costs three forward passes; held-out passes save beside it.
    assert plain[-1]["flops"] - gated[-1]["flops"] >= 3 * saved * run.flops.per_assignment
    sent = [sum(r["exchanged_bytes"]["forward"] * 3 for r in rows) for rows in (plain, gated)]
    assert sent[0] - sent[1] == pytest.approx(saved * 2 * 32 * 4)


def test_a_resumed_run_keeps_its_links(runs: ModuleType, corpus: Corpus, tmp_path, straight):
    whole, path = straight
    with pytest.raises(runs.Killed):
        trained(runs, corpus, tmp_path, kill_after=4)
    resumed = trained(runs, corpus, tmp_path, close=False, resume=True)
    assert torch.equal(resumed.attachment.open_links, whole.attachment.open_links)
    runs.assert_same(runs.final_state(resumed), runs.final_state(whole))
    runs.assert_same(runs.results(tmp_path), runs.results(path))


def test_held_out_passes_use_the_gates_of_their_domain(runs: ModuleType, corpus: Corpus, straight):
    run, _ = straight
    _, num_tokens, flops = held_out_sums(
        run.attachment, corpus, run.settings, run.flops, step=0, windows=1
    )
    tokens = int(num_tokens.sum())
    dense = tokens * (run.flops.dense_per_token + run.flops.attention_per_pair * 32)
    # Two layers; two experts for three domains, one for the second.
    assert flops - dense == pytest.approx(2 * 32 * (3 * 2 + 1) * run.flops.per_assignment)


def test_training_leaves_no_gradient_of_old_steps_on_the_gates(runs: ModuleType, corpus: Corpus):
    run = build_run(runs.small_config(**SETTINGS, routing__controller={"kind": "none"}), corpus)
    found = []
    for _ in range(2):
        train_step(
            run.forward_model,
            run.attachment,
            torch.optim.SGD(run.attachment.model.parameters(), lr=0.0),
            corpus,
            run.settings,
            step=0,
            weights=run.adversary.weights,
        )
        found.append(run.attachment.link_gates.values.grad.clone())
    assert torch.equal(found[1], found[0])
    assert found[0].abs().max() > 0


def test_without_link_gates_nothing_is_gated(runs: ModuleType, corpus: Corpus):
    run = build_run(runs.small_config(), corpus)
    assert run.attachment.link_gates is None
    assert run.attachment.open_links is None
