"""Experts as groups, against sums over tokens written out."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from drgr.ambiguity import KL
from drgr.errors import ConfigError
from drgr.routing import RoutingPlan, expert_load
from drgr.training import build_run
from drgr.training.adversary import DomainAdversary
from drgr.training.expert_groups import (
    ExpertAdversaries,
    expert_credit,
    expert_sums,
    expert_token_weights,
)


class Routing:
    """What of a layer's routing is read."""

    def __init__(self, plan, valid=None):
        self.plan, self.valid = plan, valid


def layer(expert_ids, weights, keep, valid=None, num_experts=3):
    expert_ids, keep = torch.tensor(expert_ids), torch.tensor(keep)
    plan = RoutingPlan(
        expert_ids=expert_ids,
        combine_weights=torch.tensor(weights),
        keep=keep,
        expert_load=expert_load(expert_ids, keep, num_experts),
    )
    return Routing(plan, None if valid is None else torch.tensor(valid))


FIRST = layer(
    [[0, 1], [1, 2], [2, 0]],
    [[0.6, 0.2], [0.5, 0.5], [0.9, 0.0]],
    [[True, True], [True, True], [True, False]],
)


def test_credit_is_the_share_in_a_tokens_weights():
    assert expert_credit(FIRST, 3).tolist() == [
        [pytest.approx(0.75), pytest.approx(0.25), 0.0],
        [0.0, 0.5, 0.5],
        [0.0, 0.0, 1.0],
    ]


def test_padding_has_no_credit():
    padded = layer([[0], [1]], [[0.5], [0.5]], [[True], [True]], valid=[True, False])
    assert expert_credit(padded, 3).tolist() == [[1, 0, 0], [0, 0, 0]]


def test_sums_by_hand():
    sums, credit = expert_sums([FIRST], torch.tensor([[1.0, 2.0, 4.0]]), 3)
    assert sums.tolist() == [[pytest.approx(0.75), pytest.approx(1.25), pytest.approx(5.0)]]
    assert credit.tolist() == [[pytest.approx(0.75), pytest.approx(0.75), pytest.approx(1.5)]]


def test_the_objective_is_the_weighted_mean_of_expert_losses():
    losses = torch.tensor([1.0, 2.0, 4.0], dtype=torch.float64)
    weights = torch.tensor([[0.2, 0.3, 0.5]], dtype=torch.float64)
    factors = expert_token_weights([FIRST], weights)
    means = [0.75 / 0.75, 1.25 / 0.75, 5.0 / 1.5]
    by_hand = sum(q * loss for q, loss in zip([0.2, 0.3, 0.5], means, strict=True))
    assert (factors * losses).mean().item() == pytest.approx(by_hand)


def test_weights_of_absent_experts_go_to_the_others():
    only = layer([[0], [1]], [[1.0], [1.0]], [[True], [True]])
    factors = expert_token_weights([only], torch.tensor([[0.2, 0.6, 0.2]], dtype=torch.float64))
    assert factors.tolist() == pytest.approx([2 * 0.25, 2 * 0.75])


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 1000), tokens=st.integers(1, 20), num_layers=st.integers(1, 3))
def test_load_shares_give_the_mean_loss(seed, tokens, num_layers):
    """With ``q`` the share of each expert the objective is the mean; any ``q`` averages to 1."""
    generator = torch.Generator().manual_seed(seed)
    layers, shares, others = [], [], []
    for _ in range(num_layers):
        expert_ids = torch.rand(tokens, 5, generator=generator).topk(2, dim=1).indices
        weights = torch.rand(tokens, 2, generator=generator) + 0.1
        keep = torch.tensor([[True, True]]).expand(tokens, 2)
        plan = RoutingPlan(
            expert_ids=expert_ids,
            combine_weights=weights,
            keep=keep,
            expert_load=expert_load(expert_ids, keep, 5),
        )
        layers.append(Routing(plan))
        shares.append(expert_credit(layers[-1], 5).mean(dim=0))
        others.append(torch.rand(5, generator=generator, dtype=torch.float64) + 0.01)
    factors = expert_token_weights(layers, torch.stack(shares))
    torch.testing.assert_close(factors, torch.ones_like(factors))
    mean = expert_token_weights(layers, torch.stack(others)).mean()
    assert mean.item() == pytest.approx(1)


def test_weights_follow_the_losses_of_each_layer_and_are_restored():
    def adversary():
        uniform = torch.full((3,), 1 / 3, dtype=torch.float64)
        return DomainAdversary(
            divergence=KL(),
            penalty=0.5,
            radius=None,
            sampling=uniform,
            nominal=None,
            apply_to="nothing",
            unit=torch.ones_like(uniform),
            smoothing=0.0,
            reference=None,
        )

    experts = ExpertAdversaries([adversary(), adversary()])
    sums = torch.tensor([[2.0, 2.0, 6.0], [1.0, 1.0, 1.0]], dtype=torch.float64)
    credit = torch.tensor([[2.0, 1.0, 4.0], [1.0, 1.0, 1.0]], dtype=torch.float64)
    for _ in range(2):
        experts.observe(sums, credit)
        experts.refresh()
    # exp(loss / 0.5) twice, from uniform.
    raised = torch.exp(4 * torch.tensor([1.0, 2.0, 1.5], dtype=torch.float64))
    torch.testing.assert_close(experts.weights[0], raised / raised.sum())
    torch.testing.assert_close(experts.weights[1], torch.full((3,), 1 / 3, dtype=torch.float64))
    other = ExpertAdversaries([adversary(), adversary()])
    other.load_state_dict(experts.state_dict())
    assert torch.equal(other.weights, experts.weights)


def test_settings_that_experts_cannot_have_are_refused(runs, corpus):
    with pytest.raises(ConfigError, match="groups experts needs apply_to objective"):
        build_run(runs.small_config(robustness={"groups": "experts"}), corpus)
    with pytest.raises(ConfigError, match="clip_excess needs a reference"):
        build_run(runs.small_config(robustness={"clip_excess": True}), corpus)
