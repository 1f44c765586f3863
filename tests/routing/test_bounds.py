"""The bounds of docs/theory.md, section 7: each holds, and each is reached."""

import doctest

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from drgr.numerics import block_soft_threshold
from drgr.routing import bounds
from drgr.routing.bounds import (
    closing_cost,
    loss_change,
    loss_rise,
    most_bytes,
    most_open_links,
    output_change,
    truncation_error,
)

DOUBLE = torch.float64


class Layer:
    """Experts of one layer on some tokens of some sources."""

    def __init__(self, seed, *, num_tokens=12, num_experts=5, width=3, num_sources=3):
        self.generator = torch.Generator().manual_seed(seed)
        self.gates = self.normal(num_tokens, num_experts).softmax(dim=-1)
        self.outputs = self.normal(num_tokens, num_experts, width)
        self.sources = torch.arange(num_tokens) % num_sources
        self.closed = torch.rand(num_sources, num_experts, generator=self.generator) < 0.4
        self.norms = self.outputs.norm(dim=-1)

    def normal(self, *shape):
        return torch.randn(shape, generator=self.generator, dtype=DOUBLE)

    def combined(self, gates):
        return (gates.unsqueeze(-1) * self.outputs).sum(dim=1)

    @property
    def kept(self):
        return ~self.closed[self.sources]

    def traffic(self, slopes):
        mass = slopes.norm(dim=-1, keepdim=True) * self.gates
        zero = torch.zeros_like(self.closed, dtype=DOUBLE)
        return zero.index_add(0, self.sources, mass)


seeds = st.integers(0, 10_000)


def test_examples_run():
    assert doctest.testmod(bounds).failed == 0


@settings(max_examples=50, deadline=None)
@given(seed=seeds, top=st.integers(1, 5))
@pytest.mark.parametrize("renormalised", [False, True])
def test_7_1_dropped_experts(seed, top, renormalised):
    layer = Layer(seed)
    kept = torch.zeros_like(layer.gates, dtype=torch.bool)
    kept.scatter_(1, layer.gates.topk(top).indices, value=True)
    sparse = layer.gates * kept
    if renormalised:
        sparse = sparse / sparse.sum(dim=-1, keepdim=True)
    error = (layer.combined(layer.gates) - layer.combined(sparse)).norm(dim=-1)
    bound = truncation_error(layer.gates, kept, layer.norms, renormalised=renormalised)
    assert (error <= bound + 1e-12).all()
    mass = (layer.gates * ~kept).sum(dim=-1)
    crude = (2 if renormalised else 1) * mass * layer.norms.amax(dim=-1)
    assert (bound <= crude + 1e-12).all()


@settings(max_examples=50, deadline=None)
@given(seed=seeds, scale=st.floats(0.1, 10))
def test_7_1_and_7_3_another_selection(seed, scale):
    """Closed links whose places other experts take, as top-k selection fills them."""
    layer = Layer(seed)
    target = layer.normal(12, 3)
    before, after = (
        torch.zeros_like(gates).scatter(1, gates.topk(2).indices, gates.topk(2).values)
        for gates in (layer.gates, layer.gates.masked_fill(~layer.kept, 0.0))
    )
    old, new = layer.combined(before), layer.combined(after)
    bound = output_change(before, after, layer.norms)
    assert ((old - new).norm(dim=-1) <= bound + 1e-12).all()
    slopes = (scale * (old - target)).norm(dim=-1)

    def loss(outputs):
        return scale / 2 * (outputs - target).square().sum()

    assert loss(new) <= loss(old) + loss_rise(slopes, bound, smoothness=scale) + 1e-9


def test_7_1_and_7_3_another_selection_are_reached():
    # An expert that answers -2 is replaced by one that answers 1; the loss is y^2 / 2 at y = 1.
    before = torch.tensor([[0.0, 0.5, 0.0]], dtype=DOUBLE)
    after = torch.tensor([[0.0, 0.0, 0.5]], dtype=DOUBLE)
    change = output_change(before, after, torch.tensor([[0.0, 2.0, 1.0]], dtype=DOUBLE))
    assert change.item() == pytest.approx(0.5 * 1 - 0.5 * -2)
    rise = loss_rise(torch.ones(1, dtype=DOUBLE), change, smoothness=1.0)
    assert rise.item() == pytest.approx((1 + 1.5) ** 2 / 2 - 1 / 2)


@pytest.mark.parametrize("renormalised", [False, True])
def test_7_1_is_reached_by_opposite_experts(renormalised):
    gates = torch.tensor([[0.7, 0.3]], dtype=DOUBLE)
    outputs = torch.tensor([[2.0], [-2.0]], dtype=DOUBLE)
    kept = torch.tensor([[True, False]])
    left = torch.tensor([[1.0 if renormalised else 0.7, 0.0]], dtype=DOUBLE)
    error = ((gates - left) @ outputs).abs().item()
    bound = truncation_error(gates, kept, torch.full((1, 2), 2.0), renormalised=renormalised)
    assert bound.item() == pytest.approx(error, rel=1e-12)


def test_7_1_nothing_kept_has_no_bound_when_renormalised():
    gates, norms = torch.tensor([[0.5, 0.5], [1.0, 0.0]]), torch.ones(2, 2)
    kept = torch.tensor([[False, False], [True, False]])
    assert truncation_error(gates, kept, norms, renormalised=True).tolist() == [torch.inf, 0.0]


@settings(max_examples=30, deadline=None)
@given(seed=seeds)
def test_7_2_errors_of_layers_add_up(seed):
    """Three layers of fixed masks on top of each other, and a loss that is a norm."""
    layer = Layer(seed, num_tokens=1)
    mixing = [layer.normal(3, 3) for _ in range(3)]
    kept = [torch.rand(5, generator=layer.generator) < 0.7 for _ in range(3)]
    experts = [layer.normal(5, 3, 3) for _ in range(3)]
    gates = [layer.normal(5).softmax(dim=0) for _ in range(3)]

    def stacked(is_cut):
        point, errors = torch.ones(3, dtype=DOUBLE), []
        for j in range(3):
            outputs = torch.tanh(experts[j] @ point)
            errors.append(
                truncation_error(
                    gates[j].unsqueeze(0), kept[j].unsqueeze(0), outputs.norm(dim=-1).unsqueeze(0)
                )
            )
            used = gates[j] * kept[j] if is_cut else gates[j]
            point = mixing[j] @ (used @ outputs)
        return point.norm(), torch.cat(errors)

    def norm(matrix):
        return torch.linalg.matrix_norm(matrix, 2)

    steps = [norm(mixing[j]) * (gates[j] * kept[j] * norm(experts[j])).sum() for j in range(3)]
    lipschitz = torch.stack(
        [norm(mixing[0]) * steps[1] * steps[2], norm(mixing[1]) * steps[2], norm(mixing[2])]
    )
    full, errors = stacked(False)
    cut, _ = stacked(True)
    assert (full - cut).abs() <= loss_change(errors, lipschitz) + 1e-12


def test_7_2_is_reached():
    # Two layers y -> 2 y and y -> 3 y that both lose half of the gate, and the loss -y.
    full, half = 2.0 * 3.0, 1.0 * 1.5
    bound = loss_change(torch.tensor([1.0, 2.0 * 1.5]), torch.tensor([1.5, 1.0]))
    assert bound.item() == pytest.approx(full - half)


@settings(max_examples=50, deadline=None)
@given(seed=seeds, scale=st.floats(0.1, 10))
def test_7_3_closing_links_costs_their_traffic(seed, scale):
    layer = Layer(seed)
    target = layer.normal(12, 3)

    def loss(outputs):
        return scale / 2 * (outputs - target).square().sum()

    before = layer.combined(layer.gates)
    traffic = layer.traffic(scale * (before - target))
    errors = truncation_error(layer.gates, layer.kept, layer.norms)
    bound = closing_cost(
        traffic,
        layer.closed,
        largest_norm=layer.norms.max().item(),
        squared_errors=errors.square().sum().item(),
        smoothness=scale,
    )
    after = layer.combined(layer.gates * layer.kept)
    assert loss(after) <= loss(before) + bound + 1e-9


def test_7_3_is_reached():
    # One token, the loss y, and an expert that answers -2 behind a gate of 0.25.
    traffic = torch.tensor([[0.75, 0.25]], dtype=DOUBLE)
    bound = closing_cost(traffic, torch.tensor([[False, True]]), largest_norm=2.0)
    assert bound.item() == pytest.approx(0 - 0.25 * -2.0)


def test_7_4_a_closed_link_carries_no_gradient():
    layer = Layer(0)
    gates = layer.gates.masked_fill(~layer.kept, 0.0).requires_grad_()
    outputs = layer.outputs.clone().requires_grad_()
    (gates.unsqueeze(-1) * outputs).sum(dim=1).square().sum().backward()
    assert (outputs.grad[~layer.kept] == 0).all()
    assert (outputs.grad[layer.kept].norm(dim=-1) > 0).all()


@settings(max_examples=50, deadline=None)
@given(seed=seeds, top=st.integers(1, 4))
def test_7_5_bytes_of_a_plan(seed, top):
    layer = Layer(seed)
    gates = layer.gates.masked_fill(~layer.kept, 0.0)
    chosen = torch.zeros_like(layer.kept).scatter(1, gates.topk(top).indices, value=True)
    moved = 4 * int((chosen & (gates > 0)).sum()) * 16 * 4
    tokens = torch.bincount(layer.sources)
    bound = most_bytes(
        tokens, (~layer.closed).sum(dim=1), max_experts=top, width=16, bytes_per_value=4
    )
    # Every token of a source takes min(K, open links) experts, so the bound is what moves.
    assert moved == bound


@settings(max_examples=50, deadline=None)
@given(seed=seeds, step_size=st.floats(0.01, 10), penalty=st.floats(0.05, 5))
def test_7_6_open_links_after_a_proximal_step(seed, step_size, penalty):
    layer = Layer(seed)
    links, slope = layer.normal(8, 2), layer.normal(8, 2)
    moved = block_soft_threshold(links - step_size * slope, threshold=step_size * penalty, dim=1)
    mapping = (links - moved).norm().item() / step_size
    num_open = int((moved.norm(dim=1) > 0).sum())
    bound = most_open_links(slope=slope.norm().item(), mapping=mapping, penalty=penalty)
    assert num_open <= bound * (1 + 1e-9)


def test_7_6_is_reached():
    # A stationary point of |x - v|^2 / 2 + omega sum_g |x_g| with four groups, one of them closed.
    target = torch.tensor([[3.0], [2.0], [-2.0], [0.0]], dtype=DOUBLE)
    found = block_soft_threshold(target, threshold=0.5, dim=1)
    bound = most_open_links(slope=(found - target).norm().item(), mapping=0.0, penalty=0.5)
    assert bound == pytest.approx(int((found != 0).sum()))
    # A step with slope 0: every open group moves by the penalty.
    links = torch.ones((4, 1), dtype=DOUBLE)
    moved = block_soft_threshold(links, threshold=0.5, dim=1)
    bound = most_open_links(slope=0.0, mapping=(links - moved).norm().item(), penalty=0.5)
    assert bound == pytest.approx(4)


def test_arguments_out_of_range():
    gates, kept = torch.ones(2, 3), torch.ones(2, 3, dtype=torch.bool)
    with pytest.raises(ValueError, match="norms"):
        truncation_error(gates, kept, torch.ones(2))
    with pytest.raises(ValueError, match="gates"):
        truncation_error(-gates, kept, gates)
    with pytest.raises(ValueError, match="lipschitz"):
        loss_change(torch.ones(2), torch.ones(3))
    with pytest.raises(ValueError, match="after"):
        output_change(gates, gates[:1], gates)
    with pytest.raises(ValueError, match="slopes"):
        loss_rise(-torch.ones(2), torch.ones(2))
    with pytest.raises(ValueError, match="closed"):
        closing_cost(gates, kept[:1], largest_norm=1.0)
    with pytest.raises(ValueError, match="width"):
        most_bytes(torch.tensor([1]), torch.tensor([1]), max_experts=1, width=0, bytes_per_value=2)
    with pytest.raises(ValueError, match="penalty"):
        most_open_links(slope=1.0, mapping=0.0, penalty=0.0)
