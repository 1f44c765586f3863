"""Online k-means: centroids against running means by hand, revival, centring, processes."""

import numpy as np
import pytest
import torch

from drgr.budgets import TokenBudget, select_exactly
from drgr.collectives import rank
from drgr.routing import LayerRouting, RoutingPlan, expert_load
from drgr.routing.scores import KMeansScores


def observe(scorer, hidden, weight, *, count=1, valid=None):
    """Routes tokens to their nearest centroids and shows them to the scorer."""
    found = scorer(hidden, weight)
    budget = TokenBudget(minimum=count, maximum=count, average=count)
    selection = select_exactly(found.selectable, budget, valid=valid)
    ids, keep = selection.expert_ids, selection.keep
    plan = RoutingPlan(
        expert_ids=ids,
        combine_weights=scorer.weights(found.scores, ids, keep),
        keep=keep,
        expert_load=expert_load(ids, keep, weight.shape[0]),
    )
    routing = LayerRouting(
        name="layer",
        scores=found.scores,
        values=found.selectable,
        plan=plan,
        selection=selection,
        valid=valid,
        logits=found.logits,
        hidden=hidden.detach(),
    )
    scorer.observe(routing)
    return routing


def numpy_cosines(hidden, rows):
    return np.array(
        [[x @ r / max(np.linalg.norm(x) * np.linalg.norm(r), 1e-300) for r in rows] for x in hidden]
    )


class KMeansByHand:
    """The same method in numpy, token by token."""

    def __init__(self, weight, *, decay, centred, dead_after):
        self.rows = weight.double().numpy().copy()
        self.is_mean = [False] * len(self.rows)
        self.mean = np.zeros(self.rows.shape[1])
        self.has_mean = False
        self.idle = [0] * len(self.rows)
        self.num_revived = 0
        self.decay, self.centred, self.dead_after = decay, centred, dead_after

    def directions(self):
        shift = self.mean if self.centred else 0 * self.mean
        rows = [
            row - shift if is_mean else row
            for row, is_mean in zip(self.rows, self.is_mean, strict=True)
        ]
        return shift, rows

    def step(self, batches, count):
        shift, rows = self.directions()
        members = {e: [] for e in range(len(rows))}
        everything = []
        for batch in batches:
            cosines = numpy_cosines(batch - shift, rows)
            for token, fits in zip(batch, cosines, strict=True):
                everything.append(token)
                for e in np.argsort(-fits)[:count]:
                    members[e].append((fits[e], token))
        for e, tokens in members.items():
            self.idle[e] = 0 if tokens else self.idle[e] + 1
            if tokens:
                found = np.mean([token for _, token in tokens], axis=0)
                kept = self.decay if self.is_mean[e] else 0
                self.rows[e] = kept * self.rows[e] + (1 - kept) * found
                self.is_mean[e] = True
        kept = self.decay if self.has_mean else 0
        self.mean = kept * self.mean + (1 - kept) * np.mean(everything, axis=0)
        self.has_mean = True
        dead = [e for e in range(len(rows)) if self.idle[e] >= self.dead_after]
        donors = sorted((e for e in members if members[e]), key=lambda e: -len(members[e]))
        for e, donor in zip(dead, donors, strict=False):
            self.rows[e] = min(members[donor], key=lambda pair: pair[0])[1]
            self.is_mean[e], self.idle[e] = True, 0
            self.num_revived += 1


@pytest.mark.parametrize("centred", [False, True])
@pytest.mark.parametrize("dead_after", [1, 3])
def test_against_numpy_over_steps(centred, dead_after):
    generator = torch.Generator().manual_seed(3)
    weight = torch.randn(6, 4, generator=generator)
    clusters = 3 * torch.randn(3, 4, generator=generator) + 2  # fewer than there are experts
    options = {"decay": 0.8, "centred": centred, "dead_after": dead_after}
    scorer = KMeansScores(6, 4, temperature=0.3, **options)
    by_hand = KMeansByHand(weight, **options)
    for _ in range(6):
        noise = torch.randn(2, 9, 4, generator=generator)
        batches = list(0.3 * noise + clusters[torch.arange(9) % 3])
        shift, rows = by_hand.directions()
        expected = numpy_cosines(batches[0].double().numpy() - shift, rows)
        np.testing.assert_allclose(scorer(batches[0], weight).logits, expected, atol=2e-6)
        for batch in batches:
            observe(scorer, batch, weight)
        scorer.update()
        by_hand.step([batch.double().numpy() for batch in batches], 1)
        is_mean = torch.tensor(by_hand.is_mean)
        assert torch.equal(scorer.placed[:-1], is_mean)
        np.testing.assert_allclose(scorer.centroids[is_mean], by_hand.rows[is_mean], atol=2e-6)
        np.testing.assert_allclose(scorer.mean, by_hand.mean, atol=2e-6)
        assert scorer.idle.tolist() == by_hand.idle
    assert by_hand.num_revived > 0


def test_scores_are_a_softmax_of_cosines_that_are_selected_by():
    hidden, weight = torch.randn(7, 5), torch.randn(4, 5)
    found = KMeansScores(4, 5, temperature=0.5)(hidden, weight)
    cosines = numpy_cosines(hidden.numpy(), weight.numpy())
    np.testing.assert_allclose(found.selectable, cosines, atol=1e-6)
    exponentials = np.exp(cosines / 0.5)
    expected = exponentials / exponentials.sum(axis=1, keepdims=True)
    np.testing.assert_allclose(found.scores, expected, rtol=1e-5)


def test_gradients_reach_tokens_and_only_rows_without_a_centroid():
    scorer = KMeansScores(3, 2)
    weight = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, -1.0]], requires_grad=True)
    observe(scorer, torch.tensor([[1.0, 0.1], [0.1, 1.0]]), weight)
    scorer.update()
    hidden = torch.randn(4, 2, requires_grad=True)
    scorer(hidden, weight).scores[:, 0].sum().backward()
    assert hidden.grad.abs().sum(dim=1).gt(0).all()
    assert not weight.grad[:2].any()
    assert weight.grad[2].any()


def test_a_common_part_hides_differences_unless_it_is_subtracted():
    generator = torch.Generator().manual_seed(0)
    label = torch.arange(400) % 2
    hidden = 20 + 0.1 * torch.randn(400, 8, generator=generator)
    hidden[:, 0] += label  # two clusters
    weight = torch.zeros(2, 8)
    weight[0, 0], weight[1, 1] = 1.0, 1.0
    gaps = []
    for centred in (False, True):
        scorer = KMeansScores(2, 8, centred=centred, decay=0.5)
        for _ in range(10):
            observe(scorer, hidden, weight)
            scorer.update()
        logits = scorer(hidden, weight).logits
        gaps.append(float((logits[:, 0] - logits[:, 1]).abs().mean()))
        purity = float((logits.argmax(dim=1) == label).double().mean())
    assert gaps[0] < 0.01
    assert gaps[1] > 1.5
    assert max(purity, 1 - purity) > 0.99


def test_a_dead_expert_takes_a_token_of_the_hottest():
    weight = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, -1.0]])
    scorer = KMeansScores(3, 2, dead_after=2)
    tokens = torch.tensor([[1.0, 0.0], [1.0, 0.1], [1.0, -0.5], [0.0, 1.0]])
    for alive in (False, True):
        observe(scorer, tokens, weight)
        scorer.update()
        assert bool(scorer.placed[2]) is alive
    assert torch.equal(scorer.centroids[2], tokens[2])
    assert int(scorer.idle[2]) == 0


def test_padding_reaches_nothing():
    weight = torch.randn(4, 3)
    hidden = torch.randn(10, 3)
    valid = torch.arange(10) % 3 != 0
    hidden[~valid] = torch.nan
    masked, plain = KMeansScores(4, 3, dead_after=1), KMeansScores(4, 3, dead_after=1)
    for _ in range(2):
        observe(masked, hidden, weight, valid=valid)
        observe(plain, hidden[valid], weight)
        masked.update()
        plain.update()
    torch.testing.assert_close(masked.state_dict(), plain.state_dict())


def test_nothing_observed_changes_nothing_and_state_round_trips():
    weight = torch.randn(4, 3)
    scorer, other = KMeansScores(4, 3), KMeansScores(4, 3)
    for _ in range(2):
        observe(scorer, torch.randn(5, 3), weight)
        scorer.update()
    before = {name: value.clone() for name, value in scorer.state_dict().items()}
    scorer.update()
    torch.testing.assert_close(scorer.state_dict(), before)
    assert set(before) == {"centroids", "mean", "placed", "idle"}
    other.load_state_dict(before)
    hidden = torch.randn(6, 3)
    for one in (scorer, other):
        observe(one, hidden, weight)
        one.update()
    torch.testing.assert_close(other.state_dict(), scorer.state_dict(), rtol=0, atol=0)


def shares_of_steps(num_processes, position):
    """State after steps of which this process had its share, the second none in one of them."""
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(6, 4, generator=generator)
    clusters = 3 * torch.randn(3, 4, generator=generator)
    scorer = KMeansScores(6, 4, decay=0.7, centred=True, dead_after=2)
    num_revived = 0
    for step in range(5):
        hidden = torch.randn(16, 4, generator=generator) + clusters[torch.arange(16) % 3]
        place = 16 if step == 2 else 6
        parts = [hidden] if num_processes == 1 else [hidden[:place], hidden[place:]]
        if len(parts[position]) > 0:
            observe_alone(scorer, parts[position], weight)
        idle = scorer.idle.clone()
        placed = scorer.placed.clone()
        scorer.update()
        num_revived += int(((idle == 1) & (scorer.idle == 0) & ~placed[:-1]).sum())
    assert num_revived > 0
    return {name: value.tolist() for name, value in scorer.state_dict().items()}


def observe_alone(scorer, hidden, weight):
    """As :func:`observe`, without the collectives of an exact selection."""
    found = scorer(hidden, weight)
    ids = found.selectable.topk(1, dim=1).indices
    keep = torch.ones_like(ids, dtype=torch.bool)
    plan = RoutingPlan(
        expert_ids=ids, combine_weights=ids * 0.0, keep=keep, expert_load=torch.zeros(6)
    )
    scorer.observe(
        LayerRouting(
            name="layer",
            scores=found.scores,
            values=found.selectable,
            plan=plan,
            selection=None,
            valid=None,
            logits=found.logits,
            hidden=hidden,
        )
    )


def state_of_share():
    return shares_of_steps(2, rank())


def test_several_processes_equal_one(run_processes):
    one = shares_of_steps(1, 0)
    first, second = run_processes(state_of_share, 2)
    assert first == second
    assert one["idle"] == first["idle"]
    assert one["placed"] == first["placed"]
    np.testing.assert_allclose(first["centroids"], one["centroids"], atol=1e-6)
    np.testing.assert_allclose(first["mean"], one["mean"], atol=1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"decay": 1.0}, r"decay must lie in \[0, 1\), got 1.0"),
        ({"temperature": 0.0}, "temperature must be a finite number above 0, got 0.0"),
        ({"dead_after": 0}, "dead_after must be at least 1, got 0"),
    ],
)
def test_refusals(options, message):
    with pytest.raises(ValueError, match=message):
        KMeansScores(4, 3, **options)
