"""Several processes against one."""

import pytest
import torch
import torch.distributed as dist

from drgr.bilevel import CG, Exact, hypergradient

DOUBLE = torch.float64


def _losses(rows):
    generator = torch.Generator().manual_seed(0)
    data = torch.randn(8, 3, generator=generator, dtype=DOUBLE)[rows]
    target = torch.randn(8, generator=generator, dtype=DOUBLE)[rows]

    def inner_loss(x, y):
        return (data @ y - target).square().mean() + (x.exp() * y * y).sum()

    def outer_loss(x, y):
        return (data @ y).exp().mean() + x.sum()

    return outer_loss, inner_loss


def _on_a_share(solver):
    rows = slice(4 * dist.get_rank(), 4 * dist.get_rank() + 4)
    x, y = torch.zeros(3, dtype=DOUBLE), torch.full((3,), 0.1, dtype=DOUBLE)
    result = hypergradient(*_losses(rows), x, y, solver=solver, average_over_processes=True)
    return result.grads, result.outer_loss, result.num_hvps


@pytest.mark.parametrize("solver", [CG(rtol=1e-10), Exact()], ids=lambda s: type(s).__name__)
def test_two_processes_equal_one(run_processes, solver):
    x, y = torch.zeros(3, dtype=DOUBLE), torch.full((3,), 0.1, dtype=DOUBLE)
    whole = hypergradient(*_losses(slice(0, 8)), x, y, solver=solver)
    for grads, outer_loss, num_hvps in run_processes(_on_a_share, 2, solver):
        torch.testing.assert_close(grads, whole.grads, rtol=1e-12, atol=1e-13)
        torch.testing.assert_close(outer_loss, whole.outer_loss, rtol=1e-13, atol=0)
        assert num_hvps == whole.num_hvps
