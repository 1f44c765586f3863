"""The congestion coefficient against equilibria computed in numpy, and its interval's coverage."""

import math

import numpy as np
import pytest
import torch

from drgr.routing import congestion_coefficient


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def equilibrium(quality, gamma):
    """The fixed point of ``x = softmax(q - gamma x)`` by damped iteration."""
    x = np.full(len(quality), 1 / len(quality))
    for _ in range(4000):
        appeal = np.exp(quality - gamma * x)
        x += (appeal / appeal.sum() - x) / (1 + gamma)
    return x


@pytest.mark.parametrize("gamma", [0.0, 3.0, 30.0])
def test_it_is_recovered_exactly_from_shares_without_noise(gamma):
    quality = np.random.default_rng(1).normal(size=16)
    shares = torch.from_numpy(equilibrium(quality, gamma)).expand(3, -1)
    qualities = torch.from_numpy(quality).expand(3, -1)
    found = congestion_coefficient(shares, qualities, generator=seeded(), num_resamples=20)
    for value in (found.coefficient, found.lower, found.upper):
        assert value == pytest.approx(gamma, abs=1e-8)
    assert found.num_experts == 16
    assert found.num_undefined == 0


def slope_by_numpy(loads, qualities):
    counts, quality = loads.sum(axis=0), qualities.mean(axis=0)
    used = counts > 0
    share = counts[used] / counts.sum()
    return np.polyfit(share, quality[used] - np.log(share), 1)[0]


def test_the_slope_leaves_out_experts_without_load():
    loads = torch.randint(1, 40, (5, 7))
    loads[:, 2] = 0
    qualities = torch.randn(5, 7, dtype=torch.float64)
    found = congestion_coefficient(loads, qualities, generator=seeded())
    expected = slope_by_numpy(loads.numpy(), qualities.numpy())
    assert found.coefficient == pytest.approx(expected, 1e-9)
    assert found.num_experts == 6


def test_the_interval_is_that_of_resampled_batches():
    loads = torch.randint(1, 40, (12, 6))
    qualities = torch.randn(12, 6, dtype=torch.float64)
    found = congestion_coefficient(
        loads, qualities, generator=seeded(), num_resamples=4000, confidence=0.8
    )
    generator = np.random.default_rng(5)
    slopes = []
    for _ in range(4000):
        drawn = generator.integers(0, 12, 12)
        slopes.append(slope_by_numpy(loads.numpy()[drawn], qualities.numpy()[drawn]))
    low, high = np.percentile(slopes, [10, 90])
    spread = high - low
    assert found.lower == pytest.approx(low, abs=0.1 * spread)
    assert found.upper == pytest.approx(high, abs=0.1 * spread)


def test_the_interval_covers_the_coefficient_of_noisy_counts():
    quality = np.random.default_rng(2).normal(size=8)
    share = equilibrium(quality, 5.0)
    generator = np.random.default_rng(3)
    covered = 0
    for repeat in range(60):
        loads = torch.from_numpy(generator.multinomial(400, share, size=30))
        qualities = torch.from_numpy(quality + 0.1 * generator.normal(size=(30, 8)))
        found = congestion_coefficient(
            loads, qualities, generator=seeded(repeat), num_resamples=200, confidence=0.9
        )
        covered += found.lower <= 5.0 <= found.upper
    # 54 of 60 are expected; 45 or fewer would happen with probability below 0.0005.
    assert 46 <= covered <= 60


def test_the_same_seed_gives_the_same_interval():
    loads, qualities = torch.randint(1, 9, (4, 5)), torch.rand(4, 5)
    first, second = (
        congestion_coefficient(loads, qualities, generator=seeded(7)) for _ in range(2)
    )
    assert first == second


def test_what_is_undefined_is_nan_and_counted():
    even = congestion_coefficient(torch.full((3, 4), 2), torch.rand(3, 4), generator=seeded())
    assert math.isnan(even.coefficient)
    assert math.isnan(even.lower)
    assert even.num_undefined == 1000
    lonely = torch.tensor([[5, 0, 0]])
    assert math.isnan(
        congestion_coefficient(lonely, torch.rand(1, 3), generator=seeded()).coefficient
    )
    empty = congestion_coefficient(torch.zeros(2, 3), torch.rand(2, 3), generator=seeded())
    assert math.isnan(empty.coefficient)
    assert empty.num_experts == 0
    # Both batches together are even: some resamples have a slope where the whole has none.
    mixed = congestion_coefficient(
        torch.tensor([[1, 3], [3, 1]]), torch.rand(2, 2), generator=seeded()
    )
    assert math.isnan(mixed.coefficient)
    assert 0 < mixed.num_undefined < 1000
    assert math.isfinite(mixed.lower)


def test_wrong_input_is_refused():
    loads, qualities = torch.ones(2, 3), torch.rand(2, 3)
    wrong = [
        ((loads[:0], qualities[:0]), {}, "at least one batch, got 0"),
        ((-loads, qualities), {}, "must not be negative, got -1"),
        ((loads, qualities * math.nan), {}, "qualities must be finite"),
        ((loads, qualities[:1]), {}, "qualities must have shape"),
        ((loads, qualities), {"num_resamples": 0}, "num_resamples must be at least 1, got 0"),
        ((loads, qualities), {"confidence": 1.0}, "confidence must lie in"),
    ]
    for arguments, options, message in wrong:
        with pytest.raises(ValueError, match=message):
            congestion_coefficient(*arguments, generator=seeded(), **options)
