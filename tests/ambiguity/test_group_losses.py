"""Weights of groups: micro-batches and processes as one batch, absent and overlapping groups."""

import copy
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.autograd import gradcheck, gradgradcheck
from torch.nn.parallel import DistributedDataParallel

from drgr.ambiguity import KL, ChiSquare, CVaR, Status, worst_case
from drgr.ambiguity.group_losses import GroupLosses
from drgr.collectives import rank
from drgr.errors import CheckpointError, NonFiniteLossError

NOMINAL = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)


def double(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def three_groups(**arguments):
    return GroupLosses(3, KL(), **({"penalty": 0.5, "nominal": NOMINAL} | arguments))


def step(groups, losses, membership):
    groups.accumulate(losses, membership)
    return groups.update()


def test_the_objective_and_its_gradient_by_hand():
    groups = three_groups()
    losses = double(1.0, 3.0, 5.0, 7.0).requires_grad_()
    membership = torch.tensor([2, 0, 2, 1])
    loss = groups(losses, membership)
    # Means 3, 7 and 3 of the groups 0, 1 and 2, at the nominal weights.
    assert loss.item() == pytest.approx(0.5 * 3 + 0.3 * 7 + 0.2 * 3)
    loss.backward()
    torch.testing.assert_close(losses.grad, double(0.1, 0.5, 0.1, 0.3))
    result = step(groups, losses, membership)
    q = NOMINAL.numpy() * np.exp(np.array([3.0, 7.0, 3.0]) / 0.5)
    np.testing.assert_allclose(groups.weights.numpy(), q / q.sum(), rtol=1e-12)
    assert groups.estimate.tolist() == [3.0, 7.0, 3.0]
    assert groups.seen.all()
    assert result.status is Status.CONVERGED
    expected = (groups.weights * double(3.0, 7.0, 3.0)).sum()
    torch.testing.assert_close(groups(losses, membership), expected)


@pytest.mark.parametrize(
    ("divergence", "level"),
    [
        (KL(), {"radius": 0.2}),
        (KL(), {"penalty": 0.7}),
        (ChiSquare(), {"radius": 0.2}),
        (ChiSquare(), {"penalty": 0.7}),
        (CVaR(0.4), {}),
    ],
    ids=["kl-radius", "kl-penalty", "chi_square-radius", "chi_square-penalty", "cvar"],
)
def test_current_weights_give_the_gradient_of_the_worst_case_of_the_means(divergence, level):
    model, inputs = nn.Linear(4, 1, dtype=torch.float64), torch.randn(12, 4, dtype=torch.float64)
    membership = torch.arange(12) % 3
    groups = GroupLosses(3, divergence, nominal=NOMINAL, smoothing=0.0, **level)
    step(groups, model(inputs).square().squeeze(1), membership)
    groups(model(inputs).square().squeeze(1), membership).backward()
    found = model.weight.grad.clone()
    model.zero_grad()
    means = model(inputs).square().reshape(4, 3).mean(dim=0)
    worst_case(means, divergence=divergence, nominal=NOMINAL, **level).value.backward()
    torch.testing.assert_close(found, model.weight.grad)


def test_weights_are_fixed_until_the_update():
    groups, membership = three_groups(), torch.tensor([0, 1, 2])
    for scale in (1.0, 10.0):
        groups(scale * double(1.0, 2.0, 3.0), membership)
        groups.accumulate(scale * double(1.0, 2.0, 3.0), membership)
        assert torch.equal(groups.weights, NOMINAL)
        assert not groups.seen.any()
    groups.update()
    assert groups.estimate.tolist() == [5.5, 11.0, 16.5]
    assert not torch.equal(groups.weights, NOMINAL)


def test_the_estimate_is_the_running_mean_of_domain_losses():
    groups = three_groups(smoothing=0.5)
    step(groups, double(4.0, 4.0, 3.0), torch.tensor([0, 0, 1]))
    step(groups, double(1.0, 7.0), torch.tensor([0, 2]))
    # Group 0: (0.5 * 8 + 1) / (0.5 * 2 + 1).
    assert groups.estimate.tolist() == [2.5, 3.0, 7.0]


SOFT = torch.tensor(
    [
        [1.0, 0.0, 0.0],
        [1.0, 1.0, 0.0],
        [0.0, 0.3, 2.0],
        [0.0, 0.0, 0.0],
        [0.5, 0.5, 1.0],
        [0.0, 1.0, 1.0],
    ],
    dtype=torch.float64,
)


def test_overlapping_groups_have_weighted_means():
    losses, q = np.random.default_rng(0).random(6), NOMINAL.numpy()
    w = SOFT.numpy()
    expected = sum(
        q[g] * sum(w[i, g] * losses[i] for i in range(6)) / w[:, g].sum() for g in range(3)
    )
    slope = [sum(q[g] * w[i, g] / w[:, g].sum() for g in range(3)) for i in range(6)]
    variable = torch.from_numpy(losses).requires_grad_()
    groups = three_groups()
    loss = groups(variable, SOFT)
    loss.backward()
    assert loss.item() == pytest.approx(expected, rel=1e-12)
    np.testing.assert_allclose(variable.grad.numpy(), slope, rtol=1e-12)
    step(groups, variable, SOFT)
    np.testing.assert_allclose(groups.estimate.numpy(), w.T @ losses / w.sum(axis=0), rtol=1e-12)


def test_groups_that_overlap_as_flags():
    """Comments that mention several identities at once belong to all of them."""
    losses, flags = double(1.0, 2.0, 6.0), torch.tensor([[1, 1, 0], [0, 1, 1], [0, 0, 1]]).bool()
    groups = three_groups()
    step(groups, losses, flags)
    assert groups.estimate.tolist() == [1.0, 1.5, 4.0]
    torch.testing.assert_close(groups(losses, flags), groups(losses, flags.float()))
    torch.testing.assert_close(groups.count(flags), double(1, 2, 2))


def test_one_hot_membership_is_the_index():
    losses, index = torch.randn(20, dtype=torch.float64), torch.randint(3, (20,))
    groups = three_groups()
    one_hot = nn.functional.one_hot(index, 3)
    torch.testing.assert_close(groups(losses, index), groups(losses, one_hot.float()))
    assert torch.equal(groups.count(index), groups.count(one_hot.bool()))


def test_a_sample_without_group_may_have_any_loss():
    losses = torch.arange(6.0, dtype=torch.float64)
    losses[3] = torch.nan
    losses.requires_grad_()
    groups = three_groups()
    groups(losses, SOFT).backward()
    assert losses.grad[3] == 0
    assert losses.grad.isfinite().all()
    step(groups, losses, SOFT)
    assert groups.estimate.isfinite().all()


def test_absent_groups_keep_estimate_and_weight_and_get_no_gradient():
    groups = three_groups(smoothing=0.5)
    step(groups, double(1.0, 2.0, 3.0), torch.tensor([0, 1, 2]))
    before = groups.weights
    decayed = before.numpy().copy()
    losses, membership = double(1.0, 2.0).requires_grad_(), torch.tensor([0, 1])
    for _ in range(30):
        step(groups, losses, membership)
        # The exponentiated-gradient step of group DRO, which gives an absent group the loss 0.
        decayed *= np.exp(0.1 * np.array([1.0, 2.0, 0.0]))
        decayed /= decayed.sum()
    assert groups.estimate.tolist() == [1.0, 2.0, 3.0]
    assert torch.equal(groups.weights, before)
    assert decayed[2] < 0.05 * before[2].item()
    loss = groups(losses, membership)
    torch.testing.assert_close(loss, before[0] + 2 * before[1])
    loss.backward()
    torch.testing.assert_close(losses.grad, before[:2])


def test_a_group_never_seen_keeps_its_nominal_weight():
    groups = three_groups()
    step(groups, double(1.0, 9.0), torch.tensor([0, 1]))
    assert groups.seen.tolist() == [True, True, False]
    assert groups.weights[2].item() == pytest.approx(0.2)
    assert groups.weights[1] > 0.3


def test_reported_losses_are_not_shifted_by_the_reference():
    """In a known implementation the adjustment of the weights is added to the reported losses."""
    losses, membership = double(1.0, 2.0, 3.0), torch.tensor([0, 1, 2])
    plain, shifted = three_groups(), three_groups(reference=double(0.0, 0.0, 2.5))
    original = losses.clone()
    for groups in (plain, shifted):
        step(groups, losses, membership)
        groups(losses, membership)
        assert torch.equal(losses, original)
    assert torch.equal(plain.estimate, shifted.estimate)
    assert plain.weights.argmax() == 2
    assert shifted.weights.argmax() == 1


def test_what_is_returned_is_a_copy():
    groups = three_groups()
    result = step(groups, double(1.0, 2.0, 3.0), torch.tensor([0, 1, 2]))
    weights, estimate, state = groups.weights, groups.estimate, copy.deepcopy(groups.state_dict())
    groups.weights.zero_()
    groups.estimate.zero_()
    groups.get_extra_state()["weights"].zero_()
    result.weights.zero_()
    assert torch.equal(groups.weights, weights)
    assert torch.equal(groups.estimate, estimate)
    groups.load_state_dict(state)
    state["_extra_state"]["weights"].zero_()
    assert torch.equal(groups.weights, weights)


def micro_batches():
    """Four unequal micro-batches; group 2 occurs in the last alone, the third is empty."""
    generator = torch.Generator().manual_seed(2)
    inputs = torch.randn(11, 4, dtype=torch.float64, generator=generator)
    hard = torch.tensor([0, 0, 1, 0, 1, 1, 0, 0, 2, 2, 1])
    soft = torch.rand(11, 3, dtype=torch.float64, generator=generator)
    soft = soft.masked_fill(soft < 0.5, 0.0)
    soft[:8, 2] = 0.0
    parts = [slice(0, 5), slice(5, 6), slice(6, 6), slice(6, 11)]
    return inputs, hard, soft, parts


def network():
    torch.manual_seed(0)
    return nn.Linear(4, 1, dtype=torch.float64)


def losses_of(model, inputs):
    return model(inputs).square().squeeze(1)


def observed():
    """A module whose weights are not the nominal."""
    groups = three_groups(smoothing=0.7)
    step(groups, double(2.0, 2.5, 1.0), torch.tensor([0, 1, 2]))
    return groups


@pytest.mark.parametrize("kind", ["hard", "soft"])
def test_micro_batches_add_up_to_one_batch(kind):
    inputs, hard, soft, parts = micro_batches()
    membership = hard if kind == "hard" else soft
    whole_model, parts_model = network(), network()
    whole, parted = observed(), observed()

    losses = losses_of(whole_model, inputs)
    loss = whole(losses, membership)
    loss.backward()
    whole.accumulate(losses, membership)

    step_counts, total = parted.count(membership), 0.0
    for part in parts:
        losses = losses_of(parts_model, inputs[part])
        share = parted(losses, membership[part], step_counts=step_counts)
        share.backward()
        parted.accumulate(losses, membership[part])
        total += share.detach()

    torch.testing.assert_close(total, loss.detach())
    torch.testing.assert_close(parts_model.weight.grad, whole_model.weight.grad)
    torch.testing.assert_close(parted.update().weights, whole.update().weights)
    torch.testing.assert_close(parted.estimate, whole.estimate)
    # Without the counts of the step it is another objective.
    alone = sum(parted(losses_of(whole_model, inputs[part]), membership[part]) for part in parts)
    assert (alone - loss).abs() > 0.1


def train_in_processes(kind):
    inputs, hard, soft, parts = micro_batches()
    membership = hard if kind == "hard" else soft
    # Unequal shares of the two processes, of two micro-batches each.
    own = [[parts[0], parts[2]], [parts[1], parts[3]]][rank()]
    model, groups = DistributedDataParallel(network()), observed_in_processes()
    counts = groups.count(torch.cat([membership[part] for part in own]))
    with model.no_sync():
        first = groups(losses_of(model, inputs[own[0]]), membership[own[0]], step_counts=counts)
        first.backward()
    second = groups(losses_of(model, inputs[own[1]]), membership[own[1]], step_counts=counts)
    second.backward()
    gradient = model.module.weight.grad.clone()
    for part in own:
        groups.accumulate(losses_of(model, inputs[part]).detach(), membership[part])
    groups.update()
    model.zero_grad()
    # A plain batch of this process, counted by the module itself.
    joint = slice(0, 6) if rank() == 0 else slice(6, 11)
    plain = groups(losses_of(model, inputs[joint]), membership[joint])
    plain.backward()
    return {
        "value": (first + second).detach(),
        "gradient": gradient,
        "weights": groups.weights,
        "estimate": groups.estimate,
        "plain_value": plain.detach(),
        "plain_gradient": model.module.weight.grad,
    }


def observed_in_processes():
    """As ``observed``; what is accumulated on one process counts once."""
    groups = three_groups(smoothing=0.7)
    if rank() == 1:
        groups.accumulate(double(2.0, 2.5, 1.0), torch.tensor([0, 1, 2]))
    groups.update()
    return groups


@pytest.mark.parametrize("kind", ["hard", "soft"])
def test_two_processes_are_one(run_processes, kind):
    inputs, hard, soft, _ = micro_batches()
    membership = hard if kind == "hard" else soft
    model, groups = network(), observed()
    losses = losses_of(model, inputs)
    value = groups(losses, membership)
    value.backward()
    gradient = model.weight.grad.clone()
    step(groups, losses, membership)
    model.zero_grad()
    plain = groups(losses_of(model, inputs), membership)
    plain.backward()

    first, second = run_processes(train_in_processes, 2, kind)
    for result in (first, second):
        torch.testing.assert_close(result["gradient"], gradient)
        torch.testing.assert_close(result["weights"], groups.weights)
        torch.testing.assert_close(result["estimate"], groups.estimate)
        torch.testing.assert_close(result["plain_gradient"], model.weight.grad)
    assert torch.equal(first["weights"], second["weights"])
    torch.testing.assert_close((first["value"] + second["value"]) / 2, value.detach())
    plain_mean = (first["plain_value"] + second["plain_value"]) / 2
    torch.testing.assert_close(plain_mean, plain.detach())


@settings(deadline=None, derandomize=True, max_examples=60)
@given(st.data())
def test_any_split_of_a_step_gives_the_same_objective(data):
    count = data.draw(st.integers(1, 10))
    membership = torch.tensor(
        data.draw(st.lists(st.integers(0, 2), min_size=count, max_size=count))
    )
    losses = double(*data.draw(st.lists(st.floats(-50, 50), min_size=count, max_size=count)))
    cuts = sorted(data.draw(st.lists(st.integers(0, count), max_size=3)))
    whole, parted = three_groups(), three_groups()
    counts = parted.count(membership)
    total = 0.0
    for start, end in zip([0, *cuts], [*cuts, count], strict=True):
        part = slice(start, end)
        total += parted(losses[part], membership[part], step_counts=counts).item()
        parted.accumulate(losses[part], membership[part])
    assert total == pytest.approx(whole(losses, membership).item(), rel=1e-10, abs=1e-10)
    parted.update()
    step(whole, losses, membership)
    torch.testing.assert_close(parted.weights, whole.weights)
    assert parted.weights.sum().item() == pytest.approx(1)


def test_gradcheck():
    losses = torch.randn(6, dtype=torch.float64, requires_grad=True)
    groups = observed()
    for membership in (torch.tensor([0, 1, 2, 0, 1, 1]), SOFT):
        assert gradcheck(lambda x, w=membership: groups(x, w), (losses,))
        assert gradgradcheck(lambda x, w=membership: groups(x.square(), w), (losses,))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_dtypes(dtype):
    losses = torch.full((4096,), 1.5, dtype=dtype, requires_grad=True)
    for membership in (torch.arange(4096) % 3, torch.rand(4096, 3, dtype=torch.bfloat16) + 0.1):
        groups = three_groups()
        loss = groups(losses, membership)
        loss.backward()
        assert loss.dtype == torch.float32
        assert loss.item() == pytest.approx(1.5, rel=1e-5)
        assert losses.grad.dtype == dtype
        groups.accumulate(losses, membership)
        groups.update()
        torch.testing.assert_close(groups.estimate, double(1.5, 1.5, 1.5), rtol=1e-6, atol=0)


def test_a_run_resumes_bit_for_bit_in_the_middle_of_a_step(tmp_path):
    batches = [(torch.rand(5), torch.randint(3, (5,))) for _ in range(6)]
    straight = three_groups()
    step(straight, *batches[0])
    straight.accumulate(*batches[1])
    model = nn.ModuleDict({"groups": straight})
    torch.save(model.state_dict(), tmp_path / "state.pt")
    resumed = three_groups()
    restored = torch.load(tmp_path / "state.pt", weights_only=True)
    nn.ModuleDict({"groups": resumed}).load_state_dict(restored)
    assert torch.equal(resumed.weights, straight.weights)
    for batch in batches[2:]:
        for groups in (straight, resumed):
            step(groups, *batch)
        assert torch.equal(resumed.weights, straight.weights)
        assert torch.equal(resumed.estimate, straight.estimate)
        assert torch.equal(resumed(*batch), straight(*batch))


def test_the_state_stays_in_float64_when_the_module_is_cast():
    groups = observed()
    before = groups.estimate
    groups.to(torch.bfloat16)
    assert torch.equal(groups.estimate, before)
    assert groups.weights.dtype == torch.float64


def test_a_state_of_other_groups_is_refused():
    with pytest.raises(CheckpointError, match="of 2 domains"):
        GroupLosses(2, KL(), penalty=1.0).load_state_dict(three_groups().state_dict())
    with pytest.raises(CheckpointError, match=r"group losses must hold .*, got \['weights'\]; use"):
        three_groups().set_extra_state({"weights": NOMINAL})
    with pytest.raises(RuntimeError, match="Missing key"):
        three_groups().load_state_dict({})


def test_levels_may_follow_a_schedule():
    groups, losses, membership = observed(), double(1.0, 2.0, 3.0), torch.tensor([0, 1, 2])
    groups.penalty = 1e9
    step(groups, losses, membership)
    torch.testing.assert_close(groups.weights, NOMINAL)
    assert repr(groups) == "GroupLosses(3, KL(), radius=None, penalty=1000000000.0)"


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_broken_loss_names_its_group_and_changes_nothing(bad):
    groups = observed()
    weights, estimate = groups.weights, groups.estimate
    groups.accumulate(double(1.0, bad), torch.tensor([0, 1]))
    with pytest.raises(NonFiniteLossError, match="domain 1 must be finite"):
        groups.update()
    assert torch.equal(groups.weights, weights)
    assert torch.equal(groups.estimate, estimate)
    # The broken step is gone.
    step(groups, double(1.0, 1.0), torch.tensor([0, 1]))
    assert groups.estimate.isfinite().all()


def test_an_update_needs_members():
    groups = observed()
    with pytest.raises(ValueError, match=r"update must follow accumulate, got a step without"):
        groups.update()
    groups.accumulate(torch.zeros(0), torch.zeros(0, dtype=torch.int64))
    groups.accumulate(torch.zeros(2), torch.zeros(2, 3))
    with pytest.raises(ValueError, match=r"update must follow accumulate, got a step without"):
        groups.update()


def test_an_empty_batch_has_the_objective_zero():
    losses = torch.zeros(0, requires_grad=True)
    loss = three_groups()(losses, torch.zeros(0, dtype=torch.int64))
    loss.backward()
    assert loss.item() == 0.0


def test_bad_construction():
    with pytest.raises(ValueError, match="num_groups must be at least 1, got 0"):
        GroupLosses(0, KL(), penalty=1.0)
    with pytest.raises(ValueError, match="exactly one of radius and penalty"):
        GroupLosses(2, KL())
    with pytest.raises(ValueError, match=r"nominal must have shape \(3,\), got \(2,\)"):
        three_groups(nominal=double(0.5, 0.5))
    with pytest.raises(ValueError, match="nominal must sum to 1"):
        three_groups(nominal=double(0.5, 0.5, 0.5))
    with pytest.raises(TypeError, match="nominal must be a floating-point tensor"):
        three_groups(nominal=torch.tensor([1, 0, 0]))
    with pytest.raises(ValueError, match=r"smoothing must lie in \[0, 1\)"):
        three_groups(smoothing=1.0)
    with pytest.raises(ValueError, match=r"reference must have shape \(3,\)"):
        three_groups(reference=torch.zeros(2))


@pytest.mark.parametrize(
    ("error", "message", "losses", "membership"),
    [
        (ValueError, r"losses must have shape \('any',\), got \(2, 1\)", (2, 1), [0, 1]),
        (ValueError, r"membership must have shape \(2,\), got \(3,\)", (2,), [0, 1, 0]),
        (ValueError, r"membership must have shape \(2, 3\), got \(2, 2\)", (2,), [[0.0, 1.0]] * 2),
        (
            ValueError,
            r"membership must have shape \(2,\), got \(1, 2, 3\)",
            (2,),
            [[[0.0] * 3] * 2],
        ),
        (
            TypeError,
            r"membership must be int64 for shape \(N,\), got torch.float",
            (2,),
            [0.0, 1.0],
        ),
        (TypeError, r"membership must be floating point or bool for", (2,), [[0, 1, 0]] * 2),
        (ValueError, r"membership must lie in \[0, 3\), got 3 for sample 1", (2,), [0, 3]),
        (ValueError, r"membership must lie in \[0, 3\), got -1 for sample 0", (2,), [-1, 3]),
        (
            ValueError,
            "membership must be finite and not negative, got -1.0 for sample 1",
            (2,),
            [[1.0, 0.0, 0.0], [1.0, 0.0, -1.0]],
        ),
        (
            ValueError,
            "membership must be finite and not negative, got nan for sample 0",
            (1,),
            [[1.0, math.nan, 0.0]],
        ),
    ],
)
def test_bad_batches(error, message, losses, membership):
    groups = three_groups()
    for method in (groups, groups.accumulate):
        with pytest.raises(error, match=message):
            method(torch.zeros(losses), torch.tensor(membership))


def test_integer_losses_and_bad_counts():
    groups = three_groups()
    with pytest.raises(TypeError, match=r"losses must be floating point, got torch.int64"):
        groups(torch.tensor([1]), torch.tensor([0]))
    with pytest.raises(ValueError, match=r"step_counts must have shape \(3,\), got \(2,\)"):
        groups(torch.zeros(1), torch.tensor([0]), step_counts=torch.ones(2))
    with pytest.raises(ValueError, match=r"step_counts must be at least .* \[0.0, 2.0, 0.0\], got"):
        groups(torch.zeros(2), torch.tensor([1, 1]), step_counts=torch.tensor([5, 1, 5]))
