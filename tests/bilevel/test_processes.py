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


def _outcome(losses, solver):
    x, y = torch.zeros(3, dtype=DOUBLE), torch.full((3,), 0.1, dtype=DOUBLE)
    try:
        hypergradient(*losses, x, y, solver=solver, average_over_processes=True)
    except (ValueError, RuntimeError, KeyError) as error:
        return type(error).__name__, str(error)
    return "", ""


def _with_a_failure_on_the_last(failure):
    outer_loss, inner_loss = _losses(slice(0, 4))
    is_last = dist.get_rank() == dist.get_world_size() - 1

    def failing(x, y):
        if is_last and failure == "key":
            return {}["missing"]
        if is_last and failure == "independent":
            return x.sum()
        if is_last and failure == "gradient":
            return inner_loss(x, y) + (y - y.detach()).square().sum().sqrt()
        return inner_loss(x, y) * (torch.inf if is_last and failure == "loss" else 1.0)

    def not_a_number(x, y):
        return outer_loss(x, y) * torch.nan if is_last else outer_loss(x, y)

    losses = (not_a_number, inner_loss) if failure == "outer" else (outer_loss, failing)
    failed = _outcome(losses, CG())
    # The group is in step afterwards: the next hypergradient is a right one.
    return *failed, *_outcome((outer_loss, inner_loss), CG())


@pytest.mark.parametrize(
    ("failure", "own", "elsewhere"),
    [
        ("loss", "inner_loss must be finite, got inf", "NonFiniteLossError"),
        ("outer", "outer_loss must be finite, got nan", "NonFiniteLossError"),
        ("gradient", "the gradient of inner_loss in inner_params is not", "NonFiniteLossError"),
        ("independent", "inner_loss does not depend on inner_params", "RuntimeError"),
        ("key", "missing", "RuntimeError"),
    ],
)
def test_a_failure_on_one_process_is_raised_on_all(run_processes, failure, own, elsewhere):
    *others, (_, message, *after) = run_processes(_with_a_failure_on_the_last, 2, failure)
    assert own in message
    assert after == ["", ""]
    for kind, told, *after in others:
        assert kind == elsewhere
        assert "on process 1 of the group, whose own error says" in told
        assert after == ["", ""]
