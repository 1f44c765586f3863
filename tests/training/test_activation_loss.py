"""The loss of what experts compute inside, in real steps."""

import dataclasses
import math
from types import ModuleType

import numpy as np
import pytest
import torch

from drgr.data import Corpus
from drgr.training import build_run
from drgr.training.step import train_step

ENTRY = {"kind": "expert-specialisation", "coefficient": 0.5}
# Some tokens have one expert: they have no pair.
BUDGET = {"minimum": 1, "maximum": 4, "average": 1.7}


def one_step(run, corpus):
    """Takes a step without clipping; returns its totals, gradient, routing and experts' inputs."""
    seen, inputs = [], []
    observe = run.attachment.observe

    def spy(records):
        seen.append(records)
        observe(records)

    run.attachment.observe = spy
    model = run.attachment.model
    handles = [
        model.get_submodule(f"{name}.experts").register_forward_hook(
            lambda _module, args, _output: inputs.append(args[0].detach().double())
        )
        for name in run.attachment.layer_names
    ]
    totals = train_step(
        run.forward_model,
        run.attachment,
        run.optimizer,
        corpus,
        dataclasses.replace(run.settings, clip_norm=math.inf),
        step=0,
        weights=run.adversary.weights,
    )
    for handle in handles:
        handle.remove()
    gradient = {name: p.grad.clone() for name, p in model.named_parameters()}
    return totals, gradient, seen, inputs


def activation(packed, expert, vector):
    """One expert's inner vector: ``silu(gate x) * up x``."""
    gate, up = packed[expert].chunk(2, dim=0)
    z = gate @ vector
    return z / (1 + torch.exp(-z)) * (up @ vector)


def pairs_of(routing, hidden, packed):
    """The squared cosines of every ordered pair of experts of a token."""
    found = []
    for token, vector in enumerate(hidden):
        chosen = routing.plan.expert_ids[token][routing.plan.keep[token]].tolist()
        rows = [activation(packed, expert, vector) for expert in chosen]
        for i, row in enumerate(rows):
            for j, other in enumerate(rows):
                if i != j:
                    found.append(float(row @ other / row.norm() / other.norm()) ** 2)
    return found


@pytest.mark.parametrize("accumulation", [1, 2])
def test_its_formula(runs: ModuleType, corpus: Corpus, accumulation):
    changes = {"routing__budget": BUDGET, "training__accumulation": accumulation}
    _, plain, _, _ = one_step(build_run(runs.small_config(**changes), corpus), corpus)
    run = build_run(runs.small_config(routing__losses=[ENTRY], **changes), corpus)
    names = run.attachment.layer_names
    weights = [
        run.attachment.model.get_parameter(f"{name}.experts.gate_up_proj").detach().double()
        for name in names
    ]
    totals, gradient, seen, inputs = one_step(run, corpus)
    assert len(seen) == accumulation
    values = []
    for number, records in enumerate(seen):
        for layer, routing in enumerate(records):
            hidden = inputs[number * len(names) + layer]
            values.append(np.mean(pairs_of(routing, hidden, weights[layer])))
    assert totals.routing_losses.tolist() == pytest.approx([np.mean(values)], rel=2e-5)
    assert float(totals.auxiliary) == pytest.approx(0.5 * np.mean(values), rel=2e-5)
    for name in names:
        packed, down = f"{name}.experts.gate_up_proj", f"{name}.experts.down_proj"
        assert (gradient[packed] - plain[packed]).abs().max() > 1e-5 * plain[packed].abs().max()
    # What is inside the last layer depends neither on its own outputs nor on its router.
    assert torch.equal(gradient[down], plain[down])
    assert torch.equal(gradient[f"{names[-1]}.gate.weight"], plain[f"{names[-1]}.gate.weight"])
    assert not torch.equal(gradient[f"{names[0]}.gate.weight"], plain[f"{names[0]}.gate.weight"])
    # Nothing is left behind on the model.
    for name in names:
        assert not hasattr(
            run.attachment.model.get_submodule(f"{name}.experts"), "watch_activations"
        )


def test_recomputation_changes_nothing(runs: ModuleType, corpus: Corpus):
    found = []
    for checkpointing in (False, True):
        config = runs.small_config(
            routing__losses=[ENTRY], training__gradient_checkpointing=checkpointing
        )
        totals, gradient, _, _ = one_step(build_run(config, corpus), corpus)
        found.append((totals, gradient))
    (totals, gradient), (again, recomputed) = found
    assert again.routing_losses.tolist() == pytest.approx(totals.routing_losses.tolist(), rel=1e-6)
    for name, part in gradient.items():
        torch.testing.assert_close(recomputed[name], part, rtol=1e-4, atol=1e-6, msg=name)
