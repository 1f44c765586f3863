"""The worst case as a loss: equal to its definition, in one process and in several."""

import dataclasses
import math
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.autograd import gradcheck

from drgr.ambiguity import (
    KL,
    Burg,
    ChiSquare,
    CVaR,
    Spectral,
    Status,
    TotalVariation,
    worst_case,
)
from drgr.ambiguity.robust_loss import RobustLoss
from drgr.collectives import rank, sum_over_processes, world_size

CASES = [
    (KL(), {"penalty": 0.7}),
    (KL(), {"radius": 0.3}),
    (ChiSquare(), {"penalty": 0.7}),
    (ChiSquare(), {"radius": 0.3}),
    (CVaR(0.3), {}),
    (TotalVariation(), {"radius": 0.3}),
    (Burg(), {"penalty": 0.7}),
    (Spectral.extremile(2.0), {}),
]
NAMES = [f"{type(divergence).__name__}-{'-'.join(level)}" for divergence, level in CASES]
SETS = pytest.mark.parametrize(("divergence", "level"), CASES, ids=NAMES)


def double(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


@SETS
@pytest.mark.parametrize("shape", [(), (1,), (7,), (2, 3, 4)])
def test_samples_of_any_shape_are_the_atoms(divergence, level, shape):
    losses = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    robust = RobustLoss(divergence, **level)
    loss = robust(losses)
    expected = worst_case(losses.detach().reshape(-1), divergence=divergence, **level)
    assert loss.shape == ()
    torch.testing.assert_close(loss, expected.value)
    loss.backward()
    torch.testing.assert_close(losses.grad, expected.weights.reshape(shape))
    result = robust.worst_case(losses)
    assert torch.equal(result.weights, losses.grad)
    assert result.status is Status.CONVERGED


def test_the_kl_penalty_is_the_logarithm_of_the_mean_exponential():
    losses = np.random.default_rng(0).normal(size=30)
    found = RobustLoss(KL(), penalty=0.5)(torch.from_numpy(losses))
    assert found.item() == pytest.approx(0.5 * math.log(np.exp(losses / 0.5).mean()), rel=1e-12)


def test_it_replaces_the_mean_of_a_classifier():
    model, inputs, labels = nn.Linear(4, 3), torch.randn(10, 4), torch.randint(3, (10,))
    robust = RobustLoss(ChiSquare(), radius=0.5)
    robust(F.cross_entropy(model(inputs), labels, reduction="none")).backward()
    found = model.weight.grad.clone()
    model.zero_grad()
    losses = F.cross_entropy(model(inputs), labels, reduction="none")
    weights = worst_case(losses.detach(), divergence=ChiSquare(), radius=0.5).weights
    (weights * losses).sum().backward()
    torch.testing.assert_close(found, model.weight.grad)
    assert (weights - 0.1).abs().max() > 0.02


@SETS
def test_masked_samples_are_as_if_they_were_not_there(divergence, level):
    # Negative losses: a masked atom that counted as 0 would be the worst.
    losses = torch.randn(3, 5, dtype=torch.float64) - 4
    mask = torch.rand(3, 5) < 0.5
    broken = losses.masked_fill(~mask, torch.nan).requires_grad_()
    robust = RobustLoss(divergence, **level)
    loss = robust(broken, mask=mask)
    loss.backward()
    expected = worst_case(losses[mask], divergence=divergence, **level)
    torch.testing.assert_close(loss, expected.value)
    torch.testing.assert_close(broken.grad[mask], expected.weights)
    assert (broken.grad[~mask] == 0).all()
    assert (robust.worst_case(broken, mask=mask).weights[~mask] == 0).all()


@SETS
def test_nominal_weights_are_relative(divergence, level):
    losses, nominal = torch.randn(6, dtype=torch.float64), torch.rand(6) + 0.1
    mask = torch.tensor([True, True, False, True, True, True])
    robust = RobustLoss(divergence, **level)
    found = robust(losses, 40 * nominal, mask)
    counted = nominal[mask].double()
    expected = worst_case(
        losses[mask], divergence=divergence, nominal=counted / counted.sum(), **level
    )
    torch.testing.assert_close(found, expected.value)


@settings(deadline=None, derandomize=True, max_examples=60)
@given(
    losses=st.lists(st.floats(-1e3, 1e3), min_size=1, max_size=12),
    radius=st.floats(0, 3),
)
def test_the_value_lies_between_mean_and_maximum(losses, radius):
    losses = double(*losses)
    result = RobustLoss(KL(), radius=radius).worst_case(losses)
    slack = 1e-9 * (1 + losses.abs().max())
    assert losses.mean() - slack <= result.value <= losses.max() + slack
    assert result.weights.sum().item() == pytest.approx(1)
    assert (result.weights >= 0).all()


def test_limits():
    losses = torch.randn(9, dtype=torch.float64)
    torch.testing.assert_close(RobustLoss(KL(), radius=0.0)(losses), losses.mean())
    torch.testing.assert_close(RobustLoss(KL(), penalty=1e9)(losses), losses.mean())
    torch.testing.assert_close(RobustLoss(ChiSquare(), radius=99.0)(losses), losses.max())


@SETS
def test_gradcheck(divergence, level):
    robust = RobustLoss(divergence, **level)
    losses = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    mask = torch.tensor([[True, False, True], [True, True, True]])
    nominal = torch.rand(2, 3, dtype=torch.float64) + 0.1
    assert gradcheck(lambda x: robust(x, nominal, mask), (losses,), atol=1e-6)


def test_a_second_derivative_raises_instead_of_missing_a_part():
    losses = torch.rand(3, requires_grad=True)
    robust = RobustLoss(KL(), penalty=1.0)
    with pytest.raises(RuntimeError, match="must not be differentiated twice, got create_graph"):
        torch.autograd.grad(robust(losses), losses, create_graph=True)
    assert not robust(losses.detach()).requires_grad


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_dtypes(dtype):
    losses = torch.tensor([1.0, 2.0, 4.0], dtype=dtype, requires_grad=True)
    loss = RobustLoss(KL(), penalty=1.0)(losses, mask=torch.tensor([True, False, True]))
    loss.backward()
    assert loss.dtype == torch.float32
    assert losses.grad.dtype == dtype
    assert loss.item() == pytest.approx(math.log((math.e + math.exp(4)) / 2), rel=1e-6)


def test_the_level_may_follow_a_schedule():
    losses, robust = torch.tensor([0.0, 1.0]), RobustLoss(KL(), radius=0.1)
    before = robust(losses)
    robust.radius = 0.2
    assert robust(losses) > before
    assert repr(robust) == "RobustLoss(KL(), radius=0.2, penalty=None)"
    assert robust.state_dict() == {}


@dataclass(frozen=True)
class Wrong:
    """KL whose solver takes the penalty for three times what it is."""

    has_level: ClassVar[bool] = True

    def __getattr__(self, name):
        return getattr(KL(), name)

    def penalized(self, problem, penalty):
        return dataclasses.replace(KL().penalized(problem, 3 * penalty), multiplier=penalty)


def test_a_missed_tolerance_is_told_and_the_weights_are_feasible():
    losses = torch.tensor([1.0, 2.0, 6.0], requires_grad=True)
    robust = RobustLoss(Wrong(), penalty=1.0)
    result = robust.worst_case(losses)
    assert result.status is Status.INACCURATE
    truth = RobustLoss(KL(), penalty=1.0)(losses)
    assert result.value < truth <= result.value + result.gap
    robust(losses).backward()
    torch.testing.assert_close(losses.grad, (losses.detach() / 3).softmax(0))


def test_bad_arguments():
    with pytest.raises(ValueError, match="exactly one of radius and penalty must be given"):
        RobustLoss(KL())
    with pytest.raises(ValueError, match="penalty must be a finite number above 0, got -1"):
        RobustLoss(KL(), penalty=-1.0)
    robust, losses = RobustLoss(KL(), penalty=1.0), torch.zeros(2, 3)
    with pytest.raises(TypeError, match=r"losses must be floating point, got torch.int64"):
        robust(losses.long())
    with pytest.raises(ValueError, match=r"nominal must have shape \(2, 3\), got \(3,\)"):
        robust(losses, torch.ones(3))
    with pytest.raises(TypeError, match=r"nominal must be floating point, got torch.int64"):
        robust(losses, torch.ones(2, 3, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"mask must have shape \(2, 3\), got \(3,\)"):
        robust(losses, mask=torch.ones(3, dtype=torch.bool))
    with pytest.raises(TypeError, match=r"mask must be bool, got torch.float32"):
        robust(losses, mask=torch.ones(2, 3))
    with pytest.raises(ValueError, match=r"losses must be finite, got nan at index 4; drop"):
        robust(torch.tensor([[0.0, 0.0], [0.0, 0.0], [torch.nan, 0.0]]))


@pytest.mark.parametrize("bad", [-1.0, math.nan, math.inf])
def test_bad_nominal_weights(bad):
    nominal = torch.tensor([1.0, 1.0, bad])
    with pytest.raises(ValueError, match=f"nominal must be .*, got {bad} at index 2; give weights"):
        RobustLoss(KL(), penalty=1.0)(torch.zeros(3), nominal)


@pytest.mark.parametrize(
    ("losses", "arguments"),
    [
        (torch.zeros(0), {}),
        (torch.zeros(2), {"mask": torch.zeros(2, dtype=torch.bool)}),
        (torch.zeros(2), {"nominal": torch.zeros(2)}),
    ],
)
def test_a_batch_without_samples(losses, arguments):
    with pytest.raises(ValueError, match=r"losses must have a counted sample .* got none of \d"):
        RobustLoss(KL(), penalty=1.0)(losses, **arguments)


SPLIT = (4, 0, 6)


def samples():
    generator = torch.Generator().manual_seed(5)
    count = sum(SPLIT)
    inputs = torch.randn(count, 3, dtype=torch.float64, generator=generator)
    labels = torch.randint(2, (count,), generator=generator)
    nominal = torch.rand(count, dtype=torch.float64, generator=generator) + 0.1
    return inputs, labels, nominal, torch.rand(count, generator=generator) < 0.8


def classifier():
    torch.manual_seed(0)
    return nn.Linear(3, 2, dtype=torch.float64)


def losses_and_gradients(model, batch):
    """Value, weights, gap and gradients of the parameters for each of the cases.

    Gradients are averaged over processes, as data-parallel training does.
    """
    inputs, labels, nominal, mask = batch
    found = []
    for divergence, level in CASES:
        model.zero_grad()
        robust = RobustLoss(divergence, **level)
        losses = F.cross_entropy(model(inputs), labels, reduction="none")
        result = robust.worst_case(losses.detach(), nominal, mask)
        robust(losses, nominal, mask).backward()
        gradients = [parameter.grad / world_size() for parameter in model.parameters()]
        gradients = [sum_over_processes(gradient) for gradient in gradients]
        found.append((result.value, result.weights, result.gap, gradients))
    return found


def train_on_own_part():
    start = sum(SPLIT[: rank()])
    batch = [entry[start : start + SPLIT[rank()]] for entry in samples()]
    return losses_and_gradients(classifier(), batch)


def test_processes_train_as_one_on_the_joint_batch(run_processes):
    expected = losses_and_gradients(classifier(), samples())
    results = run_processes(train_on_own_part, len(SPLIT))
    for case, (value, weights, _, gradients) in enumerate(expected):
        for result in results:
            found_value, _, gap, found_gradients = result[case]
            torch.testing.assert_close(found_value, value)
            torch.testing.assert_close(found_gradients, gradients)
            assert gap < 1e-9
        torch.testing.assert_close(torch.cat([result[case][1] for result in results]), weights)


def robust_in_a_subgroup():
    members = dist.new_group([1, 2])
    losses = torch.tensor([float(rank())], requires_grad=True)
    if rank() == 0:
        return None
    loss = RobustLoss(KL(), penalty=1.0, process_group=members)(losses)
    loss.backward()
    return loss.item(), losses.grad.item()


def test_a_subgroup_shares_its_own_batch(run_processes):
    expected = worst_case(torch.tensor([1.0, 2.0]), divergence=KL(), penalty=1.0)
    results = run_processes(robust_in_a_subgroup, 3)
    for index, (value, gradient) in enumerate(results[1:]):
        assert value == pytest.approx(expected.value.item(), rel=1e-6)
        assert gradient == pytest.approx(2 * expected.weights[index].item(), rel=1e-6)


def errors_of_one_rank():
    robust, messages = RobustLoss(KL(), penalty=1.0), []
    for arguments in (
        (torch.tensor([1.0, torch.nan if rank() == 1 else 2.0]),),
        (torch.ones(2), torch.tensor([1.0, -1.0 if rank() == 1 else 2.0])),
        (torch.ones(2), None, torch.zeros(2, dtype=torch.bool)),
    ):
        with pytest.raises(ValueError, match="must") as caught:
            robust(*arguments)
        messages.append(str(caught.value))
    only_here = robust(torch.ones(2), None, torch.full((2,), rank() == 0))
    return messages, only_here.item()


def test_all_processes_raise_together(run_processes):
    for messages, only_here in run_processes(errors_of_one_rank, 2):
        assert "got nan at index 3" in messages[0]
        assert "got -1.0 at index 3" in messages[1]
        assert "got none of 4" in messages[2]
        assert only_here == 1.0
