"""Sums and gathers: the identity in one process, exact in several, also with empty parts.

The processes of these tests also check the runner itself: its failures must reach the parent.
"""

import time

import pytest
import torch
import torch.distributed as dist

from drgr.collectives import gather_rows, rank, sum_over_processes, world_size

ROWS_OF_RANK = {2: (3, 0), 3: (0, 4, 2)}


def rows_of_rank(size, index):
    """Rows that tell where they come from: rank * 100 + row, three columns."""
    count = ROWS_OF_RANK[size][index]
    return torch.arange(count * 3).reshape(count, 3) + 100 * index


def collect_everything():
    size, index = world_size(), rank()
    rows = rows_of_rank(size, index)
    counts = torch.tensor([index + 1, 10 * index], dtype=torch.int64)
    losses = torch.full((2,), 0.5 + index, requires_grad=True)
    summed = sum_over_processes(counts)
    gathered, start = gather_rows(rows)
    strided, _ = gather_rows(rows.t().contiguous().t().float())
    flat, flat_start = gather_rows(rows[:, 0].bfloat16())
    nothing, nothing_start = gather_rows(rows[:0])
    subgroup = dist.new_group([size - 2, size - 1])
    is_member = index >= size - 2
    return {
        "size": size,
        "rank": index,
        "counts": counts,
        "summed": summed,
        "losses": sum_over_processes(losses),
        "rows": (gathered, start),
        "strided": strided,
        "flat": (flat, flat_start),
        "nothing": (nothing, nothing_start),
        "subgroup": summarise(rows, counts, subgroup) if is_member else None,
    }


def summarise(rows, counts, group):
    gathered, start = gather_rows(rows, group)
    return world_size(group), rank(group), sum_over_processes(counts, group), gathered, start


@pytest.mark.parametrize("size", [2, 3])
def test_every_process_holds_the_sum_and_all_rows_in_rank_order(run_processes, size):
    expected = torch.cat([rows_of_rank(size, index) for index in range(size)])
    starts = [sum(ROWS_OF_RANK[size][:index]) for index in range(size)]
    counts = [torch.tensor([index + 1, 10 * index]) for index in range(size)]
    for index, result in enumerate(run_processes(collect_everything, size)):
        assert (result["size"], result["rank"]) == (size, index)
        assert torch.equal(result["counts"], counts[index])
        assert torch.equal(result["summed"], sum(counts))
        assert torch.equal(result["losses"], torch.full((2,), 0.5 * size + sum(range(size))))
        assert not result["losses"].requires_grad
        assert torch.equal(result["rows"][0], expected)
        assert result["rows"][1] == starts[index]
        assert torch.equal(result["strided"], expected.float())
        assert torch.equal(result["flat"][0], expected[:, 0].bfloat16())
        assert result["flat"][1] == starts[index]
        assert result["nothing"][0].shape == (0, 3)
        assert result["nothing"][1] == 0
        if index < size - 2:
            continue
        members, place, summed, gathered, start = result["subgroup"]
        assert (members, place) == (2, index - (size - 2))
        assert torch.equal(summed, counts[-2] + counts[-1])
        parts = [rows_of_rank(size, member) for member in (size - 2, size - 1)]
        assert torch.equal(gathered, torch.cat(parts))
        assert start == (len(parts[0]) if place == 1 else 0)


def test_one_process_is_the_identity_without_gradient():
    values = torch.randn(3, 2, requires_grad=True)
    assert world_size() == 1
    assert rank() == 0
    summed = sum_over_processes(values)
    gathered, start = gather_rows(values)
    assert torch.equal(summed, values)
    assert torch.equal(gathered, values)
    assert start == 0
    assert not summed.requires_grad
    assert not gathered.requires_grad


def fail_on_rank_one():
    if rank() == 1:
        raise RuntimeError("this process was told to fail")
    dist.barrier()


def test_the_runner_shows_the_failure_of_a_child(run_processes):
    with pytest.raises(AssertionError, match="RuntimeError: this process was told to fail"):
        run_processes(fail_on_rank_one, 2)


def never_end():
    time.sleep(600)


def test_the_runner_ends_what_does_not_end_by_itself(run_processes):
    with pytest.raises(AssertionError, match=r"ranks \[0, 1\] did not end within 2"):
        run_processes(never_end, 2, timeout=2)
