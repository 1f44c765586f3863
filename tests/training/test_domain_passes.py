"""Passes of the outer loop against plain autograd on the same sequences."""

from types import ModuleType

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from drgr.data import Corpus
from drgr.training.displacement import difference_step, displaced, flat


@pytest.fixture
def run(runs: ModuleType, corpus: Corpus, tmp_path):
    """A trained run in float64, with the router's weights apart."""
    config = runs.small_config(
        training__steps=3,
        robustness__apply_to="nothing",
        outer={"variables": ["mixture", "router"], "update": "gradient", "begin": 50, "windows": 2},
    )
    _, run = runs.run_small(config, corpus, tmp_path)
    run.attachment.model.double()
    return run


def domain_means(run, batch):
    """Mean losses by domain with their graph, one row at a time."""
    model = run.attachment.model
    model.eval()
    means = [torch.zeros((), dtype=torch.float64) for _ in run.corpus.domains]
    for row in range(len(batch.domain)):
        logits = model(input_ids=batch.input_ids[row : row + 1], use_cache=False).logits[0]
        loss = torch.nn.functional.cross_entropy(logits, batch.labels[row])
        means[batch.domain[row]] = means[batch.domain[row]] + loss / 2
    return torch.stack(means)


FACTORS = torch.tensor([0.5, 0.1, 0.3, 0.1], dtype=torch.float64)


def test_gradients_are_those_of_autograd(run):
    passes = run.outer.passes
    batch = passes.draw("validation", 3)
    assert torch.bincount(batch.domain).tolist() == [2, 2, 2, 2]
    inner, outer, losses = passes.gradient(batch, FACTORS)
    means = domain_means(run, batch)
    torch.testing.assert_close(losses, means.detach(), rtol=1e-6, atol=0)
    tensors = [*passes.inner, *passes.outer]
    expected = torch.autograd.grad(FACTORS @ means, tensors, retain_graph=True, allow_unused=True)
    vector = flat(
        [torch.zeros_like(t) if g is None else g for t, g in zip(tensors, expected, strict=True)]
    )
    torch.testing.assert_close(torch.cat([inner, outer]).double(), vector, rtol=1e-4, atol=1e-7)
    assert len(outer) == sum(weight.numel() for weight in passes.outer) > 0
    torch.testing.assert_close(passes.losses(batch), losses)
    by_domain = torch.stack(list(passes.gradients_by_domain(batch)))
    torch.testing.assert_close(FACTORS @ by_domain, inner, rtol=1e-4, atol=1e-6)


def test_directional_derivatives_are_those_of_double_backward(run):
    passes = run.outer.passes
    batch = passes.draw("train", 3)
    direction = torch.cat([weight.detach().flatten() for weight in passes.inner])
    direction = direction * torch.linspace(-1, 1, len(direction)) * 0.1
    found = passes.along(
        batch, direction, FACTORS, routes=passes.routes(batch), with_gradients=True
    )
    with sdpa_kernel(SDPBackend.MATH):  # the fused kernel has no second derivative
        means = domain_means(run, batch)
    tensors = [*passes.inner, *passes.outer]
    slopes = torch.autograd.grad(FACTORS @ means, tensors, create_graph=True)
    size = len(direction)
    along = torch.cat([slope.flatten() for slope in slopes])[:size] @ direction
    second = torch.autograd.grad(along, tensors, retain_graph=True, allow_unused=True)
    vector = flat(
        [torch.zeros_like(t) if g is None else g for t, g in zip(tensors, second, strict=True)]
    )
    for mine, theirs in ((found.inner, vector[:size]), (found.outer, vector[size:])):
        # transformers normalises in float32, whatever the model is in.
        assert (mine - theirs).norm() < 0.01 * theirs.norm()
    expected = torch.stack(
        [
            torch.cat(
                [g.flatten() for g in torch.autograd.grad(mean, passes.inner, retain_graph=True)]
            )
            @ direction
            for mean in means
        ]
    )
    torch.testing.assert_close(found.losses, expected, rtol=2e-3, atol=1e-6)
    forward = passes.along(
        batch, direction, FACTORS, routes=passes.routes(batch), with_gradients=False
    )
    torch.testing.assert_close(forward.losses, found.losses)
    assert forward.inner is None


def test_gauss_newton_products_are_those_of_dense_jacobians(run):
    passes = run.outer.passes
    batch = passes.draw("train", 3)
    direction = torch.cat([weight.detach().flatten() for weight in passes.inner])
    direction = direction * torch.linspace(-1, 1, len(direction)) * 0.1
    found = passes.gauss_newton(batch, direction, FACTORS, routes=passes.routes(batch))
    assert found @ direction > 0
    model = run.attachment.model
    model.eval()
    expected = torch.zeros_like(found)
    sizes = [weight.numel() for weight in passes.inner]
    along = [
        part.view_as(weight)
        for part, weight in zip(direction.split(sizes), passes.inner, strict=True)
    ]
    for row, domain in enumerate(batch.domain.tolist()):
        with sdpa_kernel(SDPBackend.MATH):
            logits = model(input_ids=batch.input_ids[row : row + 1], use_cache=False).logits[0]
        # J z as the derivative of J' u in u: two backward passes, no differences.
        dual = torch.zeros_like(logits, requires_grad=True)
        pulled = torch.autograd.grad(logits, passes.inner, dual, create_graph=True)
        inner_product = sum((p * a).sum() for p, a in zip(pulled, along, strict=True))
        (pushed,) = torch.autograd.grad(inner_product, dual, retain_graph=True)
        probabilities = torch.softmax(logits.detach(), dim=-1)
        curved = torch.stack(
            [
                (torch.diag(p) - torch.outer(p, p)) @ j
                for p, j in zip(probabilities, pushed, strict=True)
            ]
        )
        back = torch.autograd.grad(logits, passes.inner, curved)
        expected += FACTORS[domain] / 64 * torch.cat([part.flatten() for part in back])
    assert (found - expected).norm() < 0.01 * expected.norm()


def test_passes_are_counted_and_leave_nothing_behind(runs, run):
    passes, model = run.outer.passes, run.attachment.model
    before = runs.final_state(run)
    model.train()
    batch = passes.draw("train", 0)
    passes.losses(batch)
    forward = passes.flops
    tokens = 8 * 32
    dense = run.flops.dense_per_token * tokens + run.flops.attention_per_pair * tokens * 32
    assert dense + 2 * tokens * run.flops.per_assignment <= forward
    assert forward <= dense + 8 * tokens * run.flops.per_assignment
    passes.gradient(batch, FACTORS)
    assert passes.flops == pytest.approx(4 * forward)
    list(passes.gradients_by_domain(batch))
    assert passes.flops == pytest.approx(7 * forward, rel=1e-6)
    direction = torch.ones_like(flat(passes.inner))
    passes.along(batch, direction, FACTORS, routes=passes.routes(batch), with_gradients=False)
    assert passes.flops == pytest.approx(10 * forward, rel=1e-6)
    passes.gauss_newton(batch, direction, FACTORS, routes=passes.routes(batch))
    assert passes.flops == pytest.approx(16 * forward, rel=1e-6)
    assert model.training
    runs.assert_same(runs.final_state(run), before)


def test_the_training_sequences_are_others(run):
    first, again = run.outer.passes.draw("train", 4), run.outer.passes.draw("train", 4)
    assert torch.equal(first.input_ids, again.input_ids)
    other = run.outer.passes.draw("train", 5)
    assert not torch.equal(first.input_ids, other.input_ids)


def test_parameters_come_back_bit_for_bit_after_an_error():
    weight = torch.randn(7)
    before = weight.clone()
    seen = []

    def fail():
        with displaced([weight], torch.full((7,), 0.3)):
            seen.append(weight.clone())
            raise RuntimeError("within")

    with pytest.raises(RuntimeError, match="within"):
        fail()
    torch.testing.assert_close(seen[0], before + 0.3)
    assert torch.equal(weight, before)


def test_the_difference_step_scales_with_the_parameters():
    direction = torch.tensor([3.0, 4.0])
    small, large = torch.ones(4), torch.full((4,), 50.0)
    eps = torch.finfo(torch.float32).eps
    assert difference_step([small], direction) == pytest.approx(eps ** (1 / 3) * 2 / 5)
    assert difference_step([large], direction) == pytest.approx(eps ** (1 / 3) * 100 / 5)
    assert difference_step([large.bfloat16()], direction) > 10 * difference_step([large], direction)
    for bad in (torch.zeros(2), torch.tensor([torch.nan, 1.0])):
        with pytest.raises(ValueError, match="direction must be finite and not 0"):
            difference_step([small], bad)
