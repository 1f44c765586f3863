"""Order statistics of columns against Python's own sort, in one process and spread over several."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from drgr.collectives import rank, world_size
from drgr.numerics import kth_largest

properties = settings(deadline=None, derandomize=True, max_examples=150)

# Includes both zeros, infinities, subnormal numbers and the largest ones.
any_float = st.floats(width=32, allow_nan=False)
few_floats = st.sampled_from([-2.0, -0.0, 0.0, 1.0, float("inf"), float("-inf")])
matrices = st.integers(1, 4).flatmap(
    lambda columns: st.lists(
        st.lists(any_float | few_floats, min_size=columns, max_size=columns),
        min_size=1,
        max_size=20,
    )
)


def sorted_in_python(rows, k):
    columns = zip(*rows, strict=True)
    return torch.tensor(
        [sorted(column, reverse=True)[min(k, len(rows)) - 1] for column in columns],
        dtype=torch.float32,
    )


@properties
@given(rows=matrices, k=st.integers(1, 25))
def test_equals_a_sort_of_each_column(rows, k):
    found = kth_largest(torch.tensor(rows, dtype=torch.float32), torch.tensor(k))
    assert torch.equal(found, sorted_in_python(rows, k))


def test_has_no_gradient():
    values = torch.randn(5, 2, requires_grad=True)
    assert not kth_largest(values, torch.tensor(2)).requires_grad


def test_other_dtypes_are_refused():
    with pytest.raises(TypeError, match=r"values must be float32, got torch\.float64"):
        kth_largest(torch.zeros(3, 2, dtype=torch.float64), torch.tensor(1))


def test_no_rows_are_refused():
    with pytest.raises(ValueError, match="values must have at least one row, got 0"):
        kth_largest(torch.zeros(0, 2), torch.tensor(1))


def hard_cases():
    """Batches of every kind that a radix selection could get wrong, with ranks to ask for."""
    generator = np.random.default_rng(5)
    bits = generator.integers(0, 2**32, size=(300, 3), dtype=np.uint32)
    any_bits = bits.view(np.float32)
    any_bits = np.where(np.isfinite(any_bits), any_bits, np.float32(0))
    close = np.float32(1) + np.arange(300, dtype=np.float32)[:, None] * np.float32(2**-23)
    special = np.array([0.0, -0.0, np.inf, -np.inf, 1e-45, -1e-45, 3.4e38, -3.4e38], np.float32)
    cases = [
        generator.standard_normal((300, 5), dtype=np.float32),
        generator.standard_normal((300, 2), dtype=np.float32).round(1),
        np.zeros((7, 2), np.float32),
        np.repeat(special[:, None], 2, axis=1),
        any_bits,
        close,
        -close,
        np.array([[3.0, -1.0]], np.float32),
    ]
    return [(torch.from_numpy(case.copy()), k) for case in cases for k in (1, 2, 5, 250, 10**9)]


def part_of_rank(values, index, size):
    """Uneven parts of the rows; rank 1 has none."""
    if index == 1:
        return values[:0]
    others = [other for other in range(size) if other != 1]
    cut = values.shape[0] // 4
    bounds = [0, *([cut] if len(others) > 1 else []), values.shape[0]]
    place = others.index(index)
    return values[bounds[place] : bounds[place + 1]]


def select_own_part():
    results = []
    for values, k in hard_cases():
        part = part_of_rank(values, rank(), world_size())
        results.append(kth_largest(part, torch.tensor(k)))
    try:
        kth_largest(torch.zeros(0, 2), torch.tensor(1))
    except ValueError as error:
        return results, str(error)
    return results, None


@pytest.mark.parametrize("size", [2, 3])
def test_the_split_of_the_rows_changes_nothing(run_processes, size):
    for results, message in run_processes(select_own_part, size):
        assert message is not None
        assert "at least one row" in message
        for (values, k), found in zip(hard_cases(), results, strict=True):
            assert torch.equal(found, sorted_in_python(values.tolist(), k))
            assert torch.equal(found, kth_largest(values, torch.tensor(k)))
