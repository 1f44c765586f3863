"""REINFORCE gates in a run: the gradient of a step against the estimator written out by hand."""

import dataclasses
import math
from types import ModuleType

import pytest
import torch

from drgr.data import Corpus, draw_batch
from drgr.training import build_run
from drgr.training.adversary import as_array
from drgr.training.draw_losses import drawn_losses
from drgr.training.step import train_step

LENGTH, BATCH = 32, 4
REINFORCE = {"kind": "stochastic", "estimator": "reinforce", "decay": 0.9}
SETTINGS = {
    "routing__scores": REINFORCE,
    "routing__selection": {"kind": "open"},
    "routing__controller": {"kind": "none"},
    "training__batch_size": BATCH,
    "training__steps": 6,
}
ALONE_OR_NOT = pytest.mark.parametrize("selection", ["open", "budget"])


def draw(corpus, run, step, rows):
    return draw_batch(
        corpus,
        step=step,
        seed=0,
        weights=as_array(run.adversary.weights.sampling),
        batch_size=BATCH,
        sequence_length=LENGTH,
        rows=rows,
    )


def by_hand(run, corpus, step, baselines, *, alone, accumulation=1):
    """Leaves the gradient of one step; returns the moments of each layer's next baseline.

    From the record come the gates that were drawn and the logits; losses, probabilities and the
    estimator are written out here.
    """
    model, weights = run.attachment.model, run.adversary.weights
    model.train()
    model.zero_grad(set_to_none=True)
    moments = torch.zeros(2, 2, 8, dtype=torch.float64)  # two layers, eight experts
    size = BATCH // accumulation
    for part in range(accumulation):
        batch = draw(corpus, run, step, range(part * size, (part + 1) * size))
        with run.attachment.record() as records:
            logits = model(input_ids=batch.input_ids, use_cache=False).logits
        chances = logits.log_softmax(dim=-1).gather(2, batch.labels.unsqueeze(2)).squeeze(2)
        losses = -chances * weights.objective.float()[batch.domain].unsqueeze(1)
        loss = losses.sum() / (BATCH * LENGTH)
        total = loss
        for routing in records:
            z_loss = routing.logits.logsumexp(dim=1).square().mean()
            loss = loss + 0.3 * z_loss / (len(records) * accumulation)
        auxiliary = loss.detach() - total.detach()
        answered = losses.detach().sum(dim=1) / (BATCH * LENGTH) + auxiliary
        if not alone:
            answered = (total.detach() + auxiliary).expand(size)
        answered = answered.repeat_interleave(LENGTH).unsqueeze(1)
        for layer, routing in enumerate(records):
            gates = routing.scores.detach()
            assert set(gates.unique().tolist()) == {0.0, 1.0}
            bernoulli = torch.distributions.Bernoulli(logits=routing.logits)
            known = bernoulli.log_prob(gates)
            loss = loss + ((answered - baselines[layer]) * known).sum()
            squares = (gates - routing.logits.detach().sigmoid()).double().square()
            moments[layer, 0] += (squares * answered).sum(dim=0)
            moments[layer, 1] += squares.sum(dim=0)
        loss.backward()
    return moments


def one_step(run, corpus, step):
    settings = dataclasses.replace(run.settings, clip_norm=math.inf)
    return train_step(
        run.forward_model,
        run.attachment,
        run.optimizer,
        corpus,
        settings,
        step=step,
        weights=run.adversary.weights,
    )


@ALONE_OR_NOT
@pytest.mark.parametrize("accumulation", [1, 2])
def test_the_gradient_of_a_step_is_that_of_the_estimator(
    runs: ModuleType, corpus: Corpus, selection, accumulation
):
    config = runs.small_config(
        **SETTINGS | {"routing__selection": {"kind": selection}},
        training__accumulation=accumulation,
        routing__losses=[{"kind": "router-z", "coefficient": 0.3}],
    )
    run, twin = build_run(config, corpus), build_run(config, corpus)
    baselines = torch.zeros(2, 8, dtype=torch.float64)
    averages = torch.zeros(2, 2, 8, dtype=torch.float64)
    for step in range(3):
        torch.manual_seed(step)
        moments = by_hand(
            twin, corpus, step, baselines, alone=selection == "open", accumulation=accumulation
        )
        torch.manual_seed(step)
        one_step(run, corpus, step)
        for (name, mine), (_, theirs) in zip(
            run.attachment.model.named_parameters(),
            twin.attachment.model.named_parameters(),
            strict=True,
        ):
            torch.testing.assert_close(
                mine.grad,
                theirs.grad,
                rtol=1e-3,
                atol=1e-4 * float(theirs.grad.abs().max()),
                msg=lambda m, name=name, step=step: f"{name}, step {step}: {m}",
            )
        # Adam's first steps are signs, of rounding too where a gradient is nearly 0.
        twin.attachment.model.load_state_dict(run.attachment.model.state_dict())
        averages = 0.9 * averages + 0.1 * moments
        baselines = averages[:, 0] / averages[:, 1]
    for layer, expected in zip(run.attachment.model.model.layers, baselines, strict=True):
        torch.testing.assert_close(
            layer.mlp.gate.scorer.baseline.double(), expected, rtol=1e-4, atol=1e-7
        )


def test_a_token_answers_for_its_sequence_and_for_what_is_shared():
    weighted = torch.tensor([[0.1, 0.2, 0.3], [1.0, 2.0, 3.0]], requires_grad=True)
    shared = torch.tensor(0.5, requires_grad=True)
    alone = drawn_losses(weighted, shared, alone=True, group=None)
    torch.testing.assert_close(alone, torch.tensor([1.1] * 3 + [6.5] * 3))
    together = drawn_losses(weighted, shared, alone=False, group=None)
    torch.testing.assert_close(together, torch.tensor(7.1))
    assert not alone.requires_grad
    assert not together.requires_grad


def answers(num_processes):
    """What two sequences on each process answer for, by rank."""
    import torch.distributed as dist

    first = dist.get_rank() * 2.0
    weighted = torch.tensor([[first, 1.0], [first + 1, 1.0]])
    shared = torch.tensor(float(dist.get_rank() + 1))
    group = dist.group.WORLD
    return [
        drawn_losses(weighted, shared, alone=alone, group=group).tolist() for alone in (True, False)
    ]


def test_processes_share_what_tokens_share(run_processes):
    (alone, together), (alone_too, together_too) = run_processes(answers, 2, 2)
    # Routing losses are averaged over processes: (1 + 2) / 2.
    assert alone == [1 + 1.5] * 2 + [2 + 1.5] * 2
    assert alone_too == [3 + 1.5] * 2 + [4 + 1.5] * 2
    assert together == together_too == (1 + 2 + 3 + 4) + 1.5


def test_a_run_trains_and_moves_the_baseline(runs: ModuleType, corpus: Corpus, tmp_path):
    config = runs.small_config(**SETTINGS)
    outcome, run = runs.run_small(config, corpus, tmp_path / "run")
    assert outcome.step == 6
    fresh = build_run(config, corpus)
    for layer, before in zip(
        run.attachment.model.model.layers, fresh.attachment.model.model.layers, strict=True
    ):
        gate = layer.mlp.gate
        assert (gate.scorer.baseline > 0).all()
        assert not torch.equal(gate.weight, before.mlp.gate.weight)
        assert gate.weight.isfinite().all()


def test_other_scorers_have_no_surrogate(runs: ModuleType, corpus: Corpus):
    run = build_run(runs.small_config(routing__scores={"kind": "softmax"}), corpus)
    assert not run.attachment.needs_losses
    scorer = run.attachment.model.model.layers[0].mlp.gate.scorer
    message = r"surrogate needs a scorer that learns from the value of the loss, got SoftmaxScores"
    with pytest.raises(ValueError, match=message):
        scorer.surrogate(None, torch.zeros(()))
