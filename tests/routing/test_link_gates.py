"""Link gates: the proximal step against a general solver, closing for good, and exact budgets."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize

from drgr.budgets import TokenBudget, select_at_price, select_exactly
from drgr.routing import LayerGates, LinkGates, proximal_gates

properties = settings(deadline=None, derandomize=True, max_examples=60)
LAYERS, SOURCES, EXPERTS = 2, 3, 4
SHAPE = (LAYERS, SOURCES, EXPERTS)
DIMS = {"link": (), "source": (2,), "expert": (1,)}


def gates_of(**sizes):
    return LinkGates(
        **({"num_layers": LAYERS, "num_sources": SOURCES, "num_experts": EXPERTS} | sizes)
    )


def mask(*links):
    chosen = torch.zeros(SHAPE, dtype=torch.bool)
    for link in links:
        chosen[link] = True
    return chosen


def random_open(generator):
    """Open links with at least one in every row."""
    is_open = torch.rand(SHAPE, generator=generator) < 0.6
    first = torch.randint(EXPERTS, (LAYERS, SOURCES, 1), generator=generator)
    return is_open.scatter(2, first, True)


class TestProximalStep:
    @pytest.mark.parametrize("group", ["link", "source", "expert"])
    @pytest.mark.parametrize("seed", range(4))
    def test_is_the_minimiser(self, group, seed):
        """Against a bounded quasi-Newton method on a smoothed objective of every block."""
        generator = torch.Generator().manual_seed(seed)
        point = torch.randn(SHAPE, generator=generator, dtype=torch.float64) + 0.6
        ones = torch.ones(SHAPE, dtype=torch.float64)
        step = proximal_gates(ones, ones.bool(), point, threshold=0.4, group=group)
        axes = DIMS[group]
        target = point.numpy()

        def objective(flat):
            gates = flat.reshape(SHAPE)
            norms = np.sqrt(np.square(gates).sum(axis=axes) + 1e-16) if axes else np.abs(gates)
            return 0.5 * np.square(gates - target).sum() + 0.4 * norms.sum()

        found = minimize(
            objective,
            np.full(target.size, 0.5),
            bounds=[(0, None)] * target.size,
            options={"maxiter": 2000, "maxfun": 10**6, "ftol": 1e-15, "gtol": 1e-9},
        )
        ours = torch.where(step.kept, 0.0, step.values)
        np.testing.assert_allclose(ours.numpy(), found.x.reshape(SHAPE), atol=2e-3)
        assert objective(ours.numpy().ravel()) <= found.fun + 1e-7

    @properties
    @given(
        seed=st.integers(0, 9999),
        threshold=st.sampled_from([0.0, 0.3, 5.0]),
        group=st.sampled_from(["link", "source", "expert"]),
    )
    def test_closed_stays_closed_and_every_source_keeps_a_link(self, seed, threshold, group):
        generator = torch.Generator().manual_seed(seed)
        is_open = random_open(generator)
        values = torch.where(is_open, torch.rand(SHAPE, generator=generator) + 0.01, 0.0)
        point = 2 * torch.randn(SHAPE, generator=generator)
        step = proximal_gates(values, is_open, point, threshold=threshold, group=group)
        assert not (step.is_open & ~is_open).any()
        assert torch.equal(step.is_open, step.values > 0)
        assert step.is_open.any(dim=2).all()
        assert torch.equal(step.closed, is_open & ~step.is_open)
        assert (step.kept.sum(dim=2) <= 1).all()
        assert not (step.kept & ~step.is_open).any()
        only = step.kept.any(dim=2)
        assert (step.is_open.sum(dim=2)[only] == 1).all()

    def test_the_largest_link_of_a_source_stays_and_is_named(self):
        values = torch.full(SHAPE, 0.7)
        point = torch.full(SHAPE, 0.2)
        point[0, 1, 2] = 0.25
        point[1, 2] = -1.0
        point[1, 2, 3] = -0.5
        step = proximal_gates(values, torch.ones_like(values).bool(), point, threshold=0.3)
        assert step.kept[0, 1].tolist() == [False, False, True, False]
        assert step.values[0, 1].tolist() == [0, 0, 0.25, 0]
        # Where the point itself is below 0, the link stays where it was.
        assert step.kept[1, 2].tolist() == [False, False, False, True]
        assert step.values[1, 2].tolist() == pytest.approx([0, 0, 0, 0.7])
        assert int(step.kept.sum()) == LAYERS * SOURCES

    def test_thresholds_of_single_groups(self):
        ones = torch.ones(SHAPE)
        threshold = torch.zeros(LAYERS, SOURCES, 1)
        threshold[0, 1] = 1.0
        step = proximal_gates(ones, ones.bool(), ones, threshold=threshold, group="source")
        assert step.values[0, 1].tolist() == [0.5] * EXPERTS  # a row of norm 2
        assert torch.equal(step.values[1], ones[1])

    def test_points_of_another_shape_or_without_value(self):
        ones = torch.ones(SHAPE)
        with pytest.raises(ValueError, match=r"point must have shape \(2, 3, 4\), got \(3, 4\)"):
            proximal_gates(ones, ones.bool(), ones[0], threshold=0.1)
        with pytest.raises(ValueError, match="point must be finite"):
            proximal_gates(ones, ones.bool(), math.nan * ones, threshold=0.1)
        with pytest.raises(ValueError, match="threshold"):
            proximal_gates(ones, ones.bool(), ones, threshold=-0.1)


class TestState:
    def test_all_links_begin_open_at_one(self):
        gates = gates_of()
        assert torch.equal(gates.values.detach(), torch.ones(SHAPE))
        assert gates.values.is_leaf
        assert gates.values.requires_grad
        assert gates.is_open.all()

    def test_a_step_is_taken_in_place(self):
        gates = gates_of()
        values = gates.values
        point = gates.values.detach() - 0.5
        point[0, 1, 2] = 0.1
        step = gates.propose(point, threshold=0.2)
        assert gates.is_open.all()
        gates.take(step)
        assert gates.values is values
        assert gates.is_open.sum() == gates.is_open.numel() - 1
        assert float(gates.values[0, 1, 2].detach()) == 0
        assert float(gates.values[0, 0, 0].detach()) == pytest.approx(0.3)

    def test_a_closed_link_opens_by_reopen_only(self):
        gates = gates_of()
        link = mask((1, 2, 3))
        gates.close(link)
        stale = gates_of().propose(torch.ones(SHAPE), threshold=0.0)
        with pytest.raises(ValueError, match="must not open links that are closed"):
            gates.take(stale)
        gates.take(gates.propose(torch.full(SHAPE, 9.0), threshold=0.0))
        assert float(gates.values[1, 2, 3].detach()) == 0
        assert torch.equal(gates.is_open, ~link)
        gates.reopen(mask((1, 2, 3), (0, 0, 0)), value=0.5)
        assert gates.is_open.all()
        assert float(gates.values[1, 2, 3].detach()) == 0.5
        assert float(gates.values[0, 0, 0].detach()) == 9
        with pytest.raises(ValueError, match="value must be a finite number above 0"):
            gates.reopen(link, value=0.0)

    def test_the_last_link_of_a_source_is_refused(self):
        gates = gates_of()
        gates.close(mask((0, 1, 0), (0, 1, 1), (0, 1, 2)))
        before = gates.is_open
        with pytest.raises(ValueError, match="got none for source 1 in layer 0"):
            gates.close(mask((0, 1, 3), (1, 1, 1)))
        assert torch.equal(gates.is_open, before)

    def test_a_gate_of_zero_is_closed(self):
        gates = gates_of()
        zero = torch.ones(SHAPE)
        zero[0, 0, 1] = 0
        with gates.replaced(zero):
            assert not gates.layer(0).is_open[0, 1]
            assert gates.values is zero
        assert gates.is_open.all()

    def test_round_trip(self):
        gates, other = gates_of(), gates_of()
        gates.close(mask((0, 1, 2), (1, 0, 0)))
        gates.take(gates.propose(torch.rand(SHAPE) + 1, threshold=0.1))
        for layer in range(LAYERS):
            other.load_state_dict(layer, gates.state_dict(layer))
        assert torch.equal(other.values, gates.values)
        assert torch.equal(other.is_open, gates.is_open)
        with pytest.raises(ValueError, match=r"link gates values must have shape \(2, 4\)"):
            gates_of(num_sources=2).load_state_dict(0, gates.state_dict(0))

    def test_nothing_to_gate(self):
        with pytest.raises(ValueError, match=r"at least one layer.* got \(2, 0, 4\)"):
            gates_of(num_sources=0)


class TestLayer:
    def test_usable_links_are_those_of_the_source_or_of_any(self):
        is_open = torch.tensor([[True, False, False], [False, True, False]])
        layer = LayerGates(values=is_open.float(), is_open=is_open)
        assert layer.usable(torch.tensor([1, 0, 1])).tolist() == [
            [False, True, False],
            [True, False, False],
            [False, True, False],
        ]
        assert layer.usable(None).tolist() == [[True, True, False]]

    def test_weights_are_scaled_by_the_gates_of_their_links(self):
        values = torch.tensor([[0.5, 2.0], [1.0, 3.0]], requires_grad=True)
        layer = LayerGates(values=values, is_open=torch.ones(2, 2).bool())
        weights = torch.tensor([[0.2, 0.1], [0.4, 0.3]], dtype=torch.bfloat16)
        expert_ids = torch.tensor([[1, 0], [0, 1]])
        scaled = layer.scale(weights, expert_ids, torch.tensor([0, 1]))
        assert scaled.dtype == torch.bfloat16
        assert scaled.tolist() == (weights * torch.tensor([[2, 0.5], [1, 3.0]]).bfloat16()).tolist()
        scaled.float().sum().backward()
        expected = [[float(weights[0, 1]), float(weights[0, 0])], weights[1].float().tolist()]
        torch.testing.assert_close(values.grad, torch.tensor(expected))
        assert layer.scale(weights, expert_ids, None) is weights


@st.composite
def closed_problems(draw):
    """Values, a budget and which links are open to each token's source."""
    num_experts, num_tokens = draw(st.integers(1, 6)), draw(st.integers(1, 20))
    maximum = draw(st.integers(1, num_experts))
    minimum = draw(st.integers(0, maximum))
    average = draw(st.integers(max(1, 10 * minimum), 10 * maximum)) / 10
    generator = torch.Generator().manual_seed(draw(st.integers(0, 9999)))
    is_open = torch.rand(3, num_experts, generator=generator) < draw(st.sampled_from([0.2, 0.6]))
    is_open[torch.arange(3), torch.randint(num_experts, (3,), generator=generator)] = True
    source = torch.randint(3, (num_tokens,), generator=generator)
    values = torch.randn(num_tokens, num_experts, generator=generator)
    values = values.masked_fill(~is_open[source], -torch.inf)
    return values, TokenBudget(minimum=minimum, maximum=maximum, average=average), is_open[source]


class TestBudgetWithClosedLinks:
    @properties
    @given(problem=closed_problems())
    def test_the_batch_spends_all_that_open_links_can_carry(self, problem):
        values, budget, usable = problem
        selection = select_exactly(values, budget)
        capacity = usable.sum(dim=1).clamp(max=budget.maximum)
        assert int(selection.limit) == budget.total(len(values))
        assert int(selection.spend) == min(budget.total(len(values)), int(capacity.sum()))
        per_token = selection.keep.sum(dim=1)
        assert (per_token <= capacity).all()
        # What a token lacks of the minimum are links, not budget.
        assert (per_token >= capacity.clamp(max=budget.minimum)).all()
        assert usable.gather(1, selection.expert_ids)[selection.keep].all()

    @properties
    @given(problem=closed_problems(), price=st.none() | st.floats(-2, 2, width=32))
    def test_the_frozen_price_never_uses_a_closed_link(self, problem, price):
        values, budget, usable = problem
        frozen = None if price is None else torch.tensor(price)
        selection = select_at_price(values, budget, price=frozen)
        assert usable.gather(1, selection.expert_ids)[selection.keep].all()
        capacity = usable.sum(dim=1).clamp(max=budget.maximum)
        per_token = selection.keep.sum(dim=1)
        assert (per_token <= capacity).all()
        assert (per_token >= capacity.clamp(max=budget.minimum)).all()
        assert int(selection.spend) == int(per_token.sum())
