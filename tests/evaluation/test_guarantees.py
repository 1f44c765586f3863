"""The bounds of docs/theory.md, section 8: each holds, and each is reached."""

import doctest

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from drgr.ambiguity import ChiSquare, worst_case
from drgr.evaluation import guarantees
from drgr.evaluation.guarantees import penalty_for_links, robust_slope, sparse_risk_bound
from drgr.numerics import block_soft_threshold

DOUBLE = torch.float64


class Policies:
    """Domain losses ``|A_d x - b_d|^2 / 2`` of gates ``x`` in groups of two."""

    def __init__(self, seed, *, num_domains=4, num_links=5):
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape):
            return torch.randn(shape, generator=generator, dtype=DOUBLE)

        self.matrices = normal(num_domains, 6, 2 * num_links) / 3
        self.targets = normal(num_domains, 6)
        self.nominal = normal(num_domains).softmax(dim=0)
        self.start = normal(num_links, 2)

    def losses(self, x):
        return (self.matrices @ x.flatten() - self.targets).square().sum(dim=-1) / 2

    def gradients(self, x):
        rest = self.matrices @ x.flatten() - self.targets
        return torch.einsum("dij,di->dj", self.matrices, rest)

    def worst(self, x, radius):
        return worst_case(
            self.losses(x), divergence=ChiSquare(), radius=radius, nominal=self.nominal
        )

    def objective(self, x, radius, penalty):
        return self.worst(x, radius).value.item() + penalty * x.norm(dim=1).sum().item()

    def trained(self, radius, penalty, num_steps=60):
        """Proximal gradient steps with backtracking; the last two points and the last mapping."""
        x, step_size = self.start, 1.0
        before, value = x, self.objective(x, radius, penalty)
        for _ in range(num_steps):
            slope = (self.worst(x, radius).weights @ self.gradients(x)).view_as(x)
            while True:
                moved = block_soft_threshold(
                    x - step_size * slope, threshold=step_size * penalty, dim=1
                )
                after = self.objective(moved, radius, penalty)
                if after <= value + 1e-12:
                    break
                step_size /= 2
            before, x, value = x, moved, after
            mapping = (before - x).norm().item() / step_size
            step_size *= 1.2
        return before, x, mapping


seeds = st.integers(0, 10_000)


def test_examples_run():
    assert doctest.testmod(guarantees).failed == 0


@settings(max_examples=60, deadline=None)
@given(seed=seeds, radius=st.floats(0, 3))
def test_8_1_the_slope_of_a_worst_case(seed, radius):
    policies = Policies(seed)
    gradients = policies.gradients(policies.start)
    weights = policies.worst(policies.start, radius).weights
    bound = robust_slope(gradients, radius=radius, nominal=policies.nominal)
    assert (weights @ gradients).norm() <= bound * (1 + 1e-9)


def test_8_1_is_reached():
    # Gradients that grow with the losses along one direction.
    losses, radius = torch.tensor([1.0, 2.0, 3.0], dtype=DOUBLE), 0.125
    gradients = losses.unsqueeze(1) * torch.tensor([[0.6, 0.8]], dtype=DOUBLE)
    weights = worst_case(losses, divergence=ChiSquare(), radius=radius).weights
    bound = robust_slope(gradients, radius=radius).item()
    assert (weights @ gradients).norm().item() == pytest.approx(bound, rel=1e-9)
    assert bound < 3


@settings(max_examples=8, deadline=None)
@given(seed=seeds, radius=st.floats(0.01, 1), penalty=st.floats(0.05, 2))
def test_8_1_links_and_8_2_risk_of_a_trained_policy(seed, radius, penalty):
    policies = Policies(seed)
    before, x, mapping = policies.trained(radius, penalty)
    slope = robust_slope(policies.gradients(before), radius=radius, nominal=policies.nominal)
    num_open = int((x.norm(dim=1) > 0).sum())
    slope_with_rest = slope.item() + mapping
    assert num_open <= (slope_with_rest / penalty) ** 2 * (1 + 1e-9)
    if num_open:
        assert penalty <= penalty_for_links(slope=slope_with_rest, num_links=num_open) + 1e-9
    value = policies.worst(x, radius).value.item()
    for other in (policies.start, torch.zeros_like(x), 0.9 * x, 1.1 * x):
        bound = sparse_risk_bound(
            competitor_value=policies.worst(other, radius).value.item(),
            competitor_norm=other.norm(dim=1).sum().item(),
            penalty=penalty,
            suboptimality=1e-2,
        )
        assert value <= bound


def test_8_1_links_and_8_2_are_reached():
    # min |x - v|^2 / 2 + omega sum |x_g| with one domain.
    target, penalty = torch.tensor([2.0, -2.0], dtype=DOUBLE), 0.5
    found = block_soft_threshold(target.view(2, 1), threshold=penalty, dim=1).flatten()
    slope = robust_slope((found - target).view(1, 2), radius=1.0).item()
    assert penalty_for_links(slope=slope, num_links=2) == pytest.approx(penalty)
    # As the penalty closes everything, the bound by the policy 0 is the value.
    closed = block_soft_threshold(target.view(2, 1), threshold=2.0, dim=1)
    assert (closed == 0).all()
    bound = sparse_risk_bound(
        competitor_value=4.0, competitor_norm=closed.abs().sum().item(), penalty=2.0
    )
    assert bound == pytest.approx((closed.flatten() - target).square().sum().item() / 2)


def test_arguments_out_of_range():
    with pytest.raises(ValueError, match="gradients"):
        robust_slope(torch.ones(3), radius=0.1)
    with pytest.raises(ValueError, match="radius"):
        robust_slope(torch.ones(3, 2), radius=-0.1)
    with pytest.raises(ValueError, match="nominal"):
        robust_slope(torch.ones(3, 2), radius=0.1, nominal=torch.ones(2))
    with pytest.raises(ValueError, match="penalty"):
        sparse_risk_bound(competitor_value=1.0, competitor_norm=1.0, penalty=-1.0)
    with pytest.raises(ValueError, match="num_links"):
        penalty_for_links(slope=1.0, num_links=0)
