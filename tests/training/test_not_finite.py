"""A loss that is not finite stops the run: step, domain and last good checkpoint are named."""

import math
from types import ModuleType

import pytest
import torch

from drgr.data import Corpus
from drgr.errors import NonFiniteLossError
from drgr.training import RunDirectory, build_run, train
from drgr.training.checkpoint import latest_checkpoint, load_checkpoint
from drgr.training.finish import finish
from drgr.training.loop_state import LoopState


def sabotaged(runs: ModuleType, run, path, *, after: int, break_it) -> NonFiniteLossError:
    """Trains until the sabotage after step ``after`` is noticed; returns the error."""

    class Saboteur(runs.Watcher):
        def on_step(self, view):
            super().on_step(view)
            if view.step == after:
                with torch.no_grad():
                    break_it(run)

    with pytest.raises(NonFiniteLossError) as caught:
        train(run, RunDirectory(path), observer=Saboteur(), environment={})
    return caught.value


def break_token_of(corpus: Corpus, domain: str):
    """Breaks the embedding of a frequent token that no other domain has."""
    counts = {
        name: torch.bincount(
            torch.from_numpy(corpus.tokens("train", name).astype("int64")),
            minlength=corpus.vocabulary_size,
        )
        for name in corpus.domains
    }
    elsewhere = sum(count for name, count in counts.items() if name != domain)
    token = int(counts[domain].masked_fill(elsewhere > 0, -1).argmax())
    assert counts[domain][token] > 500

    def break_it(run):
        run.attachment.model.get_input_embeddings().weight[token] = math.inf

    return break_it


def test_step_domain_and_checkpoint_are_named(runs: ModuleType, corpus: Corpus, tmp_path):
    config = runs.small_config(
        robustness__apply_to="nothing",
        robustness__losses="train",
        training__batch_size=16,
        training__evaluate_every=50,
    )
    run = build_run(config, corpus)
    parameters = {}

    def break_and_keep(run):
        break_token_of(corpus, "factbook")(run)
        parameters.update({k: v.clone() for k, v in run.attachment.model.state_dict().items()})

    error = sabotaged(runs, run, tmp_path, after=4, break_it=break_and_keep)
    message = str(error)
    assert "the training loss of domain factbook is not finite at step 5" in message
    assert str(tmp_path / "checkpoints" / "step-00000003") in message
    assert "training.learning_rate" in message
    # The step was not taken, and what is on disk is whole.
    runs.assert_same(dict(run.attachment.model.state_dict()), parameters)
    path = latest_checkpoint(tmp_path / "checkpoints")
    assert path is not None
    state = load_checkpoint(path, fingerprint=runs.fingerprint(config, corpus))
    assert all(torch.isfinite(tensor).all() for tensor in state["model"].values())
    assert [record["step"] for record in runs.read_records(tmp_path)] == [3]
    assert not (tmp_path / "evaluation.json").exists()
    # Without the sabotage the run goes on from there, and ends as if nothing had happened.
    runs.run_small(config, corpus, tmp_path, resume=True)
    runs.run_small(config, corpus, tmp_path.with_name("straight"))
    runs.assert_same(runs.results(tmp_path), runs.results(tmp_path.with_name("straight")))


def break_everything(run):
    run.attachment.model.get_input_embeddings().weight.fill_(math.nan)


def test_held_out_losses_of_the_adversary(runs: ModuleType, corpus: Corpus, tmp_path):
    run = build_run(runs.small_config(), corpus)
    error = sabotaged(runs, run, tmp_path, after=2, break_it=break_everything)
    assert "held-out loss of domain speech, factbook, fiction, verse is not finite at step 3" in (
        str(error)
    )
    assert "last good checkpoint: none was written yet" in str(error)
    assert all(math.isfinite(value) for value in run.adversary.weights.adversary.tolist())


def test_a_gradient_alone(runs: ModuleType, corpus: Corpus, tmp_path):
    run = build_run(runs.small_config(), corpus)

    def break_gradient(run):
        head = run.attachment.model.get_output_embeddings().weight
        head.requires_grad_()
        head.register_hook(lambda gradient: gradient * math.inf)

    error = sabotaged(runs, run, tmp_path, after=2, break_it=break_gradient)
    assert "the gradient is not finite at step 3" in str(error)


def test_validation(runs: ModuleType, corpus: Corpus, tmp_path):
    """A step may be finite and still leave a model that is not."""
    config = runs.small_config(training__evaluate_every=2, robustness__every=50)
    run = build_run(config, corpus)
    error = sabotaged(runs, run, tmp_path, after=2, break_it=break_everything)
    assert "validation loss of domain speech, factbook, fiction, verse is not finite at step 2" in (
        str(error)
    )


def test_final_evaluation(runs: ModuleType, corpus: Corpus, tmp_path):
    run = build_run(runs.small_config(), corpus)
    with torch.no_grad():
        break_everything(run)
    directory = RunDirectory(tmp_path)
    with pytest.raises(NonFiniteLossError, match=r"test loss of domain speech.* at step 0"):
        finish(run, LoopState(run, directory), directory)
    assert list(tmp_path.iterdir()) == []


def test_a_learning_rate_far_too_high_stops_with_a_clear_error(
    runs: ModuleType, corpus: Corpus, tmp_path
):
    config = runs.small_config(training__learning_rate=1e36, training__warmup_steps=0)
    with pytest.raises(
        NonFiniteLossError, match=r"is not finite at step \d+; last good checkpoint"
    ):
        runs.run_small(config, corpus, tmp_path)
