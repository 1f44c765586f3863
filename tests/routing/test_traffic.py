"""Gradient traffic: what is measured, its penalty, and a backward pass that changes no more."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from drgr.routing import (
    TrafficMeter,
    congestion,
    exchanged_bytes,
    gradient_traffic,
    tap_traffic,
    traffic_penalty,
    traffic_penalty_gradient,
)

properties = settings(deadline=None, derandomize=True, max_examples=60)
TOKENS, EXPERTS, SOURCES, WIDTH, TOP_K = 11, 5, 3, 4, 2


def explicit_traffic(norms, source, expert_ids, weights):
    """The definition, by loops over Python lists; stays differentiable in the weights."""
    links = [[torch.zeros((), dtype=torch.float64) for _ in range(EXPERTS)] for _ in range(SOURCES)]
    for token, place in enumerate(source.tolist()):
        for slot, expert in enumerate(expert_ids[token].tolist()):
            if expert < EXPERTS:
                links[place][expert] = (
                    links[place][expert] + float(norms[token]) * weights[token, slot]
                )
    return torch.stack([torch.stack(row) for row in links])


def explicit_penalty(traffic, *, coefficient, links=None, link_weights=None):
    """The definition, over a list of the links that count."""
    kept, chosen = [], []
    for row in range(traffic.shape[0]):
        if float(traffic[row].detach().sum()) == 0:
            continue
        for expert in range(traffic.shape[1]):
            if links is None or bool(links[row, expert]):
                kept.append(traffic[row, expert])
                chosen.append(None if link_weights is None else float(link_weights[row, expert]))
    mean = sum(kept) / len(kept)
    terms = [
        (1 / len(kept) if weight is None else weight) * (amount / mean) ** 2
        for amount, weight in zip(kept, chosen, strict=True)
    ]
    return coefficient / 2 * sum(terms)


def plan(seed=0, *, absent=None):
    generator = torch.Generator().manual_seed(seed)
    source = torch.randint(SOURCES, (TOKENS,), generator=generator)
    if absent is not None:
        source[source == absent] = (absent + 1) % SOURCES
    expert_ids = torch.rand(TOKENS, EXPERTS, generator=generator).argsort(dim=1)[:, :TOP_K]
    # One token has a single expert, one has none, as padding has.
    expert_ids[3, 1] = EXPERTS
    expert_ids[7] = EXPERTS
    weights = torch.rand(TOKENS, TOP_K, generator=generator, dtype=torch.float64) + 0.1
    norms = torch.rand(TOKENS, generator=generator, dtype=torch.float64) + 0.1
    return norms, source, expert_ids, weights


@pytest.mark.parametrize("seed", range(4))
def test_traffic_is_the_sum_over_the_tokens_of_a_source(seed):
    norms, source, expert_ids, weights = plan(seed)
    traffic = gradient_traffic(
        norms, source, expert_ids, weights, num_sources=SOURCES, num_experts=EXPERTS
    )
    torch.testing.assert_close(traffic, explicit_traffic(norms, source, expert_ids, weights))


def test_what_is_skipped_may_hold_anything():
    norms, source, expert_ids, weights = plan()
    broken = weights.clone()
    broken[3, 1] = math.nan
    broken[7] = math.inf
    sizes = {"num_sources": SOURCES, "num_experts": EXPERTS}
    expected = gradient_traffic(norms, source, expert_ids, weights, **sizes)
    assert torch.equal(gradient_traffic(norms, source, expert_ids, broken, **sizes), expected)


@pytest.mark.parametrize(
    ("norms", "source", "weights", "message"),
    [
        (3, 4, (4, 2), r"norms must have shape \(4,\), got \(3,\)"),
        (4, 5, (4, 2), r"source must have shape \(4,\), got \(5,\)"),
        (4, 4, (4, 3), r"weights must have shape \(4, 2\), got \(4, 3\)"),
    ],
)
def test_shapes_that_do_not_fit(norms, source, weights, message):
    with pytest.raises(ValueError, match=message):
        gradient_traffic(
            torch.ones(norms),
            torch.zeros(source, dtype=torch.int64),
            torch.zeros(4, 2, dtype=torch.int64),
            torch.ones(weights),
            num_sources=1,
            num_experts=2,
        )


class TestCongestion:
    def test_even_traffic_is_one_and_one_link_is_their_number(self):
        assert float(congestion(torch.full((3, 4), 7.0))) == 1
        lone = torch.zeros(3, 4)
        lone[1, 2] = 5
        # The other sources have no traffic and do not count.
        assert float(congestion(lone)) == 4
        lone[[0, 2], 0] = torch.finfo(torch.float32).tiny
        assert float(congestion(lone)) == pytest.approx(12)

    def test_each_layer_by_itself(self):
        traffic = torch.rand(4, 3, 5)
        expected = [layer.max() / layer.mean() for layer in traffic.double()]
        torch.testing.assert_close(congestion(traffic), torch.stack(expected))

    def test_no_traffic_is_even(self):
        assert float(congestion(torch.zeros(3, 4))) == 1

    def test_links_that_do_not_exist_do_not_count(self):
        traffic = torch.tensor([[3.0, 1.0, 0.0]])
        links = torch.tensor([[True, True, False]])
        assert float(congestion(traffic)) == pytest.approx(3 / (4 / 3))
        assert float(congestion(traffic, links)) == 1.5

    @pytest.mark.parametrize("value", [math.nan, math.inf])
    def test_what_is_not_a_number_shows(self, value):
        traffic = torch.ones(2, 3)
        traffic[0, 1] = value
        assert math.isnan(congestion(traffic))
        assert math.isnan(traffic_penalty(traffic))


class TestPenalty:
    @properties
    @given(seed=st.integers(0, 999), absent=st.none() | st.integers(0, 2), weighted=st.booleans())
    def test_value_and_gradient_are_those_of_the_definition(self, seed, absent, weighted):
        generator = torch.Generator().manual_seed(seed)
        traffic = torch.rand(SOURCES, EXPERTS, generator=generator, dtype=torch.float64)
        links = torch.rand(SOURCES, EXPERTS, generator=generator) < 0.8
        links[:, 0] = True
        traffic = torch.where(links, traffic, 0.0)
        if absent is not None:
            traffic[absent] = 0
        options = {"coefficient": 0.7, "links": links}
        if weighted:
            options["link_weights"] = torch.rand(SOURCES, EXPERTS, generator=generator)
        traffic.requires_grad_()
        expected = explicit_penalty(traffic, **options)
        (slope,) = torch.autograd.grad(expected, traffic)
        torch.testing.assert_close(traffic_penalty(traffic, **options), expected)
        ours = traffic_penalty_gradient(traffic, **options)
        counts = links & (traffic.sum(dim=1, keepdim=True) > 0)
        torch.testing.assert_close(ours[counts], slope[counts])
        assert not ours[~counts].any()
        # Euler: a function that does not change with scale.
        assert float((ours * traffic).sum().detach()) == pytest.approx(0, abs=1e-12)
        (automatic,) = torch.autograd.grad(traffic_penalty(traffic, **options), traffic)
        torch.testing.assert_close(automatic[counts], slope[counts])

    @pytest.mark.parametrize("factor", [1e-120, 1e-3, 1e120])
    def test_scale_changes_nothing(self, factor):
        traffic = torch.rand(2, SOURCES, EXPERTS, dtype=torch.float64)
        torch.testing.assert_close(traffic_penalty(factor * traffic), traffic_penalty(traffic))
        torch.testing.assert_close(
            factor * traffic_penalty_gradient(factor * traffic), traffic_penalty_gradient(traffic)
        )

    def test_even_traffic_costs_half_the_coefficient_and_has_no_slope(self):
        traffic = torch.full((SOURCES, EXPERTS), 0.25)
        assert float(traffic_penalty(traffic, coefficient=0.5)) == pytest.approx(0.25)
        assert float(traffic_penalty_gradient(traffic).abs().max()) < 1e-12

    def test_no_traffic_costs_nothing(self):
        traffic = torch.zeros(2, SOURCES, EXPERTS)
        assert traffic_penalty(traffic).tolist() == [0, 0]
        assert not traffic_penalty_gradient(traffic).any()
        assert not traffic_penalty_gradient(traffic).isnan().any()

    @pytest.mark.parametrize("function", [traffic_penalty, traffic_penalty_gradient])
    @pytest.mark.parametrize("coefficient", [-1.0, math.nan, math.inf])
    def test_a_coefficient_that_is_none(self, function, coefficient):
        with pytest.raises(ValueError, match="coefficient must be a finite number of at least 0"):
            function(torch.ones(2, 2), coefficient=coefficient)
        with pytest.raises(ValueError, match="coefficient must be a finite number of at least 0"):
            TrafficMeter(traffic=torch.ones(2, 2), coefficient=coefficient)


def meter_of(coefficient, **options):
    traffic = torch.zeros(SOURCES, EXPERTS, dtype=torch.float64)
    return TrafficMeter(traffic=traffic, coefficient=coefficient, **options)


def combined(weights, expert_ids, outputs):
    """``y_t = sum_k pi_tk f_{e(t,k)}``, with a zero expert for what is skipped."""
    padded = torch.cat([outputs, torch.zeros_like(outputs[:1])])
    return (weights.unsqueeze(2) * padded[expert_ids]).sum(dim=1)


def backward(coefficient, *, scale=1.0, dtype=torch.float64, passes=1, **options):
    """Runs a small layer; returns gradients of weights and outputs, dL/dy, and the meter."""
    _, source, expert_ids, weights = plan()
    meter = meter_of(coefficient, **options)
    generator = torch.Generator().manual_seed(5)
    outputs = torch.randn(EXPERTS, WIDTH, generator=generator, dtype=torch.float64).to(dtype)
    target = torch.randn(TOKENS, WIDTH, generator=generator, dtype=torch.float64).to(dtype)
    weights, outputs = weights.to(dtype).requires_grad_(), outputs.requires_grad_()
    kept = {}
    for _ in range(passes):
        y = combined(weights, expert_ids, outputs)
        tapped = tap_traffic(y, weights, source=source, expert_ids=expert_ids, meter=meter)
        assert torch.equal(tapped, y)
        assert tapped.dtype == dtype
        tapped.retain_grad()
        (scale * (tapped - target).square().sum()).backward()
        kept["arriving"] = tapped.grad.clone()
    return weights, outputs, kept["arriving"], meter


class TestTap:
    @pytest.mark.parametrize("weighted", [False, True])
    def test_the_gradient_is_that_of_the_explicit_penalty_at_constant_norms(self, weighted):
        options = {"links": torch.ones(SOURCES, EXPERTS, dtype=torch.bool)}
        options["links"][0, 4] = False
        if weighted:
            options["link_weights"] = torch.rand(SOURCES, EXPERTS)
        weights, outputs, arriving, meter = backward(0.3, **options)
        _, source, expert_ids, _ = plan()
        free = weights.detach().clone().requires_grad_()
        norms = arriving.square().sum(dim=1).sqrt()
        traffic = explicit_traffic(norms, source, expert_ids, free)
        torch.testing.assert_close(meter.traffic, traffic.detach())
        (added,) = torch.autograd.grad(explicit_penalty(traffic, coefficient=0.3, **options), free)
        plain_weights, plain_outputs, _, _ = backward(0.0)
        torch.testing.assert_close(weights.grad, plain_weights.grad + added)
        assert float(added.abs().max()) > 1e-3
        assert torch.equal(outputs.grad, plain_outputs.grad)

    def test_small_steps_along_the_added_gradient_lower_the_penalty(self):
        weights, _, arriving, _ = backward(1.0)
        plain, _, _, _ = backward(0.0)
        added = weights.grad - plain.grad
        _, source, expert_ids, _ = plan()
        norms = arriving.norm(dim=1)
        sizes = {"num_sources": SOURCES, "num_experts": EXPERTS}

        def penalty(step):
            moved = weights.detach() - step * added
            return float(
                traffic_penalty(gradient_traffic(norms, source, expert_ids, moved, **sizes))
            )

        slope = float(added.square().sum())
        assert (penalty(1e-6) - penalty(-1e-6)) / 2e-6 == pytest.approx(-slope, rel=1e-6)

    def test_a_coefficient_of_zero_changes_no_bit(self):
        weights, outputs, _, meter = backward(0.0, dtype=torch.float32)
        _, _, expert_ids, _ = plan()
        bare = weights.detach().clone().requires_grad_()
        free = outputs.detach().clone().requires_grad_()
        generator = torch.Generator().manual_seed(5)
        torch.randn(EXPERTS, WIDTH, generator=generator, dtype=torch.float64)
        target = torch.randn(TOKENS, WIDTH, generator=generator, dtype=torch.float64).float()
        (combined(bare, expert_ids, free) - target).square().sum().backward()
        assert torch.equal(weights.grad, bare.grad)
        assert torch.equal(outputs.grad, free.grad)
        assert float(meter.traffic.sum()) > 0

    def test_the_added_gradient_does_not_scale_with_the_loss_and_traffic_does(self):
        one, _, _, small = backward(0.3)
        two, _, _, large = backward(0.3, scale=16.0)
        plain, _, _, _ = backward(0.0)
        torch.testing.assert_close(two.grad - 16 * plain.grad, one.grad - plain.grad)
        torch.testing.assert_close(large.traffic, 16 * small.traffic)

    def test_passes_add_up(self):
        weights, _, _, meter = backward(0.3, passes=3)
        once, _, _, single = backward(0.3)
        torch.testing.assert_close(meter.traffic, 3 * single.traffic)
        torch.testing.assert_close(weights.grad, 3 * once.grad)

    def test_skipped_candidates_get_nothing(self):
        weights, _, _, _ = backward(0.3)
        assert not weights.grad[7].any()
        assert float(weights.grad[3, 1]) == 0

    def test_a_gradient_of_zero_is_no_traffic(self):
        weights, _, _, meter = backward(0.3, scale=0.0)
        assert not meter.traffic.any()
        assert not weights.grad.any()

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
    def test_low_precision_is_measured_in_float32(self, dtype):
        weights, _, arriving, meter = backward(0.3, dtype=dtype)
        _, source, expert_ids, _ = plan()
        norms = arriving.double().norm(dim=1)
        expected = explicit_traffic(norms, source, expert_ids, weights.detach().double())
        torch.testing.assert_close(meter.traffic, expected, rtol=1e-6, atol=0)
        assert weights.grad.dtype == dtype

    def test_weights_without_gradient_are_measured_all_the_same(self):
        _, source, expert_ids, weights = plan()
        outputs = torch.randn(EXPERTS, WIDTH, dtype=torch.float64, requires_grad=True)
        meter = meter_of(0.3)
        y = combined(weights, expert_ids, outputs)
        tap_traffic(y, weights, source=source, expert_ids=expert_ids, meter=meter).sum().backward()
        assert float(meter.traffic.sum()) == pytest.approx(
            float(weights[expert_ids < EXPERTS].sum() * WIDTH**0.5)
        )

    def test_the_output_may_be_modified_in_place(self):
        _, source, expert_ids, weights = plan()
        weights.requires_grad_()
        meter = meter_of(0.0)
        y = combined(weights, expert_ids, torch.ones(EXPERTS, WIDTH, dtype=torch.float64))
        tapped = tap_traffic(y, weights, source=source, expert_ids=expert_ids, meter=meter)
        tapped += 1
        tapped.sum().backward()
        assert float(weights.grad.sum()) == pytest.approx(WIDTH * int((expert_ids < EXPERTS).sum()))

    def test_second_derivatives(self):
        _, source, expert_ids, weights = plan()
        weights.requires_grad_()
        outputs = torch.randn(EXPERTS, WIDTH, dtype=torch.float64)

        def gradient(coefficient):
            y = combined(weights, expert_ids, outputs)
            meter = meter_of(coefficient)
            tapped = tap_traffic(y, weights, source=source, expert_ids=expert_ids, meter=meter)
            return torch.autograd.grad(tapped.pow(3).sum(), weights, create_graph=True)[0]

        bare = combined(weights, expert_ids, outputs).pow(3).sum()
        (expected,) = torch.autograd.grad(bare, weights, create_graph=True)
        (expected,) = torch.autograd.grad(expected.square().sum(), weights)
        (twice,) = torch.autograd.grad(gradient(0.0).square().sum(), weights)
        torch.testing.assert_close(twice, expected)
        with pytest.raises(RuntimeError, match=r"no second derivatives, got coefficient 0\.1"):
            gradient(0.1)


class TestBytes:
    def test_two_exchanges_each_way(self):
        # 10 assignments, 8 values of 2 bytes, there and back.
        assert exchanged_bytes(10, width=8, bytes_per_value=2) == (320, 320)

    def test_checkpointing_repeats_the_forward_exchange(self):
        given = exchanged_bytes(10, width=8, bytes_per_value=2, gradient_checkpointing=True)
        assert given == (320, 640)

    @pytest.mark.parametrize("name", ["assignments", "width", "bytes_per_value"])
    def test_negative_counts(self, name):
        counts = {"assignments": 1.0, "width": 1, "bytes_per_value": 1} | {name: -1}
        with pytest.raises(ValueError, match=f"{name} must be a finite number of at least 0"):
            exchanged_bytes(counts.pop("assignments"), **counts)
