"""Which experts stay: planted sets, budgets of the model and of layers."""

import itertools
import re

import pytest
import torch

from drgr.budgets.static import SearchSettings, prune_experts
from drgr.numerics import Status

SHORT = SearchSettings(num_steps=25, num_samples=2, learning_rate=0.3)
FAST = SearchSettings(num_steps=80, learning_rate=0.2)


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def planted(num_experts=12, seed=0):
    """Outputs of experts and of a sum of four of them; the largest outputs are decoys."""
    generator = rng(seed)
    outputs = torch.randn(num_experts, 200, generator=generator).double()
    outputs[4:8] *= 1.5
    target = outputs[:4].sum(dim=0)

    def loss(gates):
        mixed = (gates.view(num_experts, 1) * outputs).sum(dim=0)
        return (mixed - target).square().mean()

    return loss


@pytest.mark.parametrize("exactly", [False, True])
def test_the_planted_set_is_found(exactly):
    found = prune_experts(
        planted(), torch.ones(1, 12), 4, generator=rng(1), exactly=exactly, settings=FAST
    )
    assert found.kept[0].nonzero().flatten().tolist() == [0, 1, 2, 3]
    assert found.certificate.loss == 0
    assert found.certificate.status is Status.CONVERGED
    assert found.probabilities[0, :4].min() > 0.9
    assert found.probabilities[0, 4:].max() < 0.1


def test_bytes_of_experts_of_several_sizes():
    """The best set inside a budget of bytes, against every set."""
    generator = rng(2)
    costs = torch.randint(1, 5, (2, 5), generator=generator)
    matrix = torch.randn(30, 10, generator=generator).double()
    full = matrix.sum(dim=1)

    def loss(gates):
        return (matrix @ gates.flatten() - full).square().mean()

    found = prune_experts(loss, costs, 14, generator=rng(), settings=FAST)
    best = min(
        loss(torch.tensor(kept).double()).item()
        for kept in itertools.product([0, 1], repeat=10)
        if (torch.tensor(kept) * costs.flatten()).sum() <= 14
    )
    assert (found.kept * costs).sum() == found.certificate.spend.item() <= 14
    assert found.certificate.loss <= 1.02 * best
    assert found.certificate.lower_bound <= best + 1e-9


def test_budgets_of_layers_hold_in_each():
    worth = torch.rand(3, 6, generator=rng(3)).double()
    limits = torch.tensor([1, 4, 2])
    found = prune_experts(
        lambda gates: -(worth * gates).sum(),
        torch.ones(3, 6),
        limits,
        generator=rng(),
        exactly=True,
        settings=FAST,
    )
    assert found.kept.sum(dim=1).equal(limits)
    for row, kept, limit in zip(worth, found.kept, limits.tolist(), strict=True):
        assert set(kept.nonzero().flatten().tolist()) == set(row.topk(limit).indices.tolist())
    assert found.certificate.spend.tolist() == limits.tolist()


def test_free_experts_stay_out_of_the_budget():
    costs = torch.tensor([[0, 1, 1]])
    found = prune_experts(
        lambda gates: -gates.sum() - gates[0, 2], costs, 1, generator=rng(), settings=SHORT
    )
    assert found.kept.tolist() == [[True, False, True]]


def test_importance_is_where_the_search_begins():
    importance = torch.tensor([[0.0, 10.0, 5.0, 1.0]])
    costs = torch.ones(1, 4)
    for scale in (1.0, 1e6):
        found = prune_experts(
            lambda gates: 0 * gates.sum(),
            costs,
            2,
            generator=rng(),
            exactly=True,
            importance=scale * importance,
            settings=SHORT,
        )
        assert found.kept.tolist() == [[False, True, True, False]]
    level = prune_experts(
        planted(),
        torch.ones(1, 12),
        4,
        generator=rng(),
        importance=torch.ones(1, 12),
        settings=FAST,
    )
    assert level.kept[0].nonzero().flatten().tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("costs", "limits", "options", "message"),
    [
        (torch.ones(3), 1, {}, "costs must have shape (L, E) with L, E >= 1, got (3,)"),
        (torch.tensor([[1, -1]]), 1, {}, "costs must be at least 0, got -1 at index (0, 1)"),
        (torch.ones(2, 3), torch.ones(3), {}, "a number or have shape (L,) = (2,), got (3,)"),
        (
            torch.ones(1, 2),
            1,
            {"importance": torch.ones(2)},
            "importance must be finite with the shape of costs, (1, 2), got shape (2,) with 0",
        ),
        (
            torch.ones(1, 2),
            1,
            {"importance": torch.tensor([[1.0, torch.nan]])},
            "got shape (1, 2) with 1 entries that are not finite",
        ),
    ],
)
def test_refusals(costs, limits, options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        prune_experts(lambda gates: gates.sum(), costs, limits, generator=rng(), **options)
