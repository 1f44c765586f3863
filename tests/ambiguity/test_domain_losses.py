import numpy as np
import pytest
import torch
from torch.autograd import gradcheck

from drgr.ambiguity import (
    KL,
    ChiSquare,
    DomainLosses,
    domain_sums,
    load_reference_losses,
    worst_case,
)
from drgr.errors import CheckpointError, NonFiniteLossError


def tensor(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def test_sums_and_counts_by_a_plain_loop():
    rng = np.random.default_rng(0)
    losses, mask = rng.random((7, 5)), rng.random((7, 5)) < 0.6
    domain = rng.integers(0, 4, 7)
    domain[domain == 2] = 0
    sums, counts = [0.0] * 4, [0] * 4
    for b in range(7):
        for s in range(5):
            if mask[b, s]:
                sums[domain[b]] += losses[b, s]
                counts[domain[b]] += 1
    found_sums, found_counts = domain_sums(
        torch.from_numpy(losses), torch.from_numpy(domain), 4, mask=torch.from_numpy(mask)
    )
    np.testing.assert_allclose(found_sums.numpy(), sums, rtol=1e-14)
    assert found_counts.tolist() == counts
    assert found_counts.dtype == torch.int64
    all_sums, all_counts = domain_sums(torch.from_numpy(losses), torch.from_numpy(domain), 4)
    assert all_sums.sum().item() == pytest.approx(losses.sum())
    assert all_counts.sum().item() == 35


def test_sums_are_differentiable_and_masked_losses_do_not_leak():
    losses = torch.rand(3, 4, dtype=torch.float64, requires_grad=True)
    domain, mask = torch.tensor([1, 0, 1]), torch.rand(3, 4) < 0.5
    assert gradcheck(lambda x: domain_sums(x, domain, 2, mask=mask)[0], (losses,))
    broken = torch.tensor([[1.0, torch.nan], [2.0, torch.inf]], requires_grad=True)
    keep = torch.tensor([[True, False], [True, False]])
    sums, counts = domain_sums(broken, torch.tensor([0, 1]), 2, mask=keep)
    sums.sum().backward()
    assert sums.tolist() == [1.0, 2.0]
    assert counts.tolist() == [1, 1]
    assert broken.grad.tolist() == [[1.0, 0.0], [1.0, 0.0]]


def test_half_losses_are_summed_in_float32():
    losses = torch.full((1, 4096), 1.0, dtype=torch.bfloat16)
    sums, _ = domain_sums(losses, torch.tensor([0]), 1)
    assert sums.dtype == torch.float32
    assert sums.item() == 4096


def test_bad_batches():
    losses, domain = torch.zeros(2, 3), torch.tensor([0, 1])
    with pytest.raises(TypeError, match=r"token_losses must be floating point, got torch.int64"):
        domain_sums(losses.long(), domain, 2)
    with pytest.raises(TypeError, match=r"domain must be int64, got torch.int32"):
        domain_sums(losses, domain.int(), 2)
    with pytest.raises(TypeError, match=r"mask must be bool, got torch.float32"):
        domain_sums(losses, domain, 2, mask=torch.ones(2, 3))
    with pytest.raises(ValueError, match="token_losses must have shape"):
        domain_sums(losses[0], domain, 2)
    with pytest.raises(ValueError, match=r"domain must have shape \(2,\)"):
        domain_sums(losses, domain[:1], 2)
    with pytest.raises(ValueError, match=r"mask must have shape \(2, 3\)"):
        domain_sums(losses, domain, 2, mask=torch.ones(2, 2, dtype=torch.bool))
    with pytest.raises(ValueError, match="num_domains must be at least 1, got 0"):
        domain_sums(losses, domain, 0)
    with pytest.raises(IndexError):
        domain_sums(losses, torch.tensor([0, 2]), 2)


def test_estimate_is_a_token_mean_and_the_first_observation_is_whole():
    tracker = DomainLosses(3, smoothing=0.5)
    assert tracker.seen.tolist() == [False, False, False]
    assert tracker.estimate.tolist() == [0.0, 0.0, 0.0]
    tracker.update(tensor(40.0, 6.0, 0.0), torch.tensor([10, 2, 0]))
    assert tracker.estimate.tolist() == [4.0, 3.0, 0.0]
    assert tracker.seen.tolist() == [True, True, False]
    # Domain 0: (0.5 * 40 + 10) / (0.5 * 10 + 5); domain 1 is absent and keeps its estimate.
    tracker.update(tensor(10.0, 0.0, 7.0), torch.tensor([5, 0, 1]))
    assert tracker.estimate.tolist() == [3.0, 3.0, 7.0]
    tracker.update(tensor(0.0, 0.0, 0.0), torch.tensor([0, 0, 0]))
    assert tracker.estimate.tolist() == [3.0, 3.0, 7.0]


def test_estimate_of_equal_counts_is_the_unbiased_exponential_mean():
    observed, smoothing = np.random.default_rng(1).random(20), 0.9
    tracker = DomainLosses(1, smoothing=smoothing)
    for loss in observed:
        tracker.update(tensor(loss * 100), tensor(100))
    age = smoothing ** np.arange(19, -1, -1)
    assert tracker.estimate.item() == pytest.approx((age * observed).sum() / age.sum(), rel=1e-14)


def test_no_smoothing_keeps_the_last_observation():
    tracker = DomainLosses(1, smoothing=0.0)
    for loss in (3.0, 1.0, 2.0):
        tracker.update(tensor(4 * loss), tensor(4))
    assert tracker.estimate.item() == 2.0


def test_one_update_of_joint_sums_equals_a_large_batch():
    losses, domain = torch.rand(8, 5, dtype=torch.float64), torch.arange(8) % 3
    whole, parts = DomainLosses(3), DomainLosses(3)
    whole.update(*domain_sums(losses, domain, 3))
    halves = [domain_sums(losses[part], domain[part], 3) for part in (slice(0, 3), slice(3, 8))]
    parts.update(halves[0][0] + halves[1][0], halves[0][1] + halves[1][1])
    torch.testing.assert_close(whole.estimate, parts.estimate, rtol=1e-14, atol=0)


def test_excess_over_the_reference():
    tracker = DomainLosses(3, reference=torch.tensor([1.0, 5.0, 2.0]))
    tracker.update(tensor(8.0, 12.0, 0.0), torch.tensor([2, 3, 0]))
    assert tracker.excess.tolist() == [3.0, -1.0, 0.0]
    assert DomainLosses(2).excess.tolist() == [0.0, 0.0]


def test_weights_are_the_worst_case_of_the_excess(tmp_path):
    path = tmp_path / "reference.json"
    path.write_text('{"a": 1.0, "b": 2.0}')
    tracker = DomainLosses(2, reference=load_reference_losses(path, ["a", "b"]))
    tracker.update(tensor(6.0, 5.0), torch.tensor([2, 2]))
    result = tracker.weights(KL(), penalty=0.5, nominal=torch.tensor([0.9, 0.1]))
    expected = worst_case(
        tensor(2.0, 0.5), divergence=KL(), penalty=0.5, nominal=torch.tensor([0.9, 0.1])
    )
    assert torch.equal(result.weights, expected.weights)
    assert torch.equal(result.value, expected.value)


@pytest.mark.parametrize("divergence", [KL(), ChiSquare()])
@pytest.mark.parametrize("level", [{"radius": 0.2}, {"penalty": 0.7}])
def test_unseen_domains_keep_their_nominal_weight(divergence, level):
    nominal = tensor(0.4, 0.3, 0.2, 0.1)
    tracker = DomainLosses(4)
    tracker.update(tensor(3.0, 0.0, 8.0, 0.0), torch.tensor([2, 0, 2, 0]))
    result = tracker.weights(divergence, nominal=nominal, **level)
    torch.testing.assert_close(result.weights[[1, 3]], nominal[[1, 3]], rtol=1e-15, atol=0)
    assert result.weights.sum().item() == pytest.approx(1, abs=1e-15)
    seen = worst_case(
        tensor(1.5, 4.0), divergence=divergence, nominal=tensor(2 / 3, 1 / 3), **level
    )
    torch.testing.assert_close(result.weights[[0, 2]], 0.6 * seen.weights)
    torch.testing.assert_close(result.value, seen.value)
    # Divergence of the whole vector: that of the seen part times its mass.
    whole = nominal @ divergence.generator((result.weights / nominal).log())
    torch.testing.assert_close(whole, 0.6 * seen.divergence)


def test_weights_need_an_observation():
    tracker = DomainLosses(3)
    with pytest.raises(ValueError, match=r"observed, got seen=\[\]; call update first"):
        tracker.weights(KL(), penalty=1.0)
    tracker.update(tensor(1.0, 0.0, 0.0), torch.tensor([1, 0, 0]))
    with pytest.raises(ValueError, match=r"nominal mass that was observed, got seen=\[0\]"):
        tracker.weights(KL(), penalty=1.0, nominal=tensor(0.0, 0.5, 0.5))
    with pytest.raises(ValueError, match=r"nominal must have shape \(3,\)"):
        tracker.weights(KL(), penalty=1.0, nominal=tensor(0.5, 0.5))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("count", [0, 4])
def test_a_non_finite_loss_names_the_domain_and_changes_nothing(bad, count):
    tracker = DomainLosses(3)
    tracker.update(tensor(1.0, 2.0, 3.0), torch.tensor([1, 1, 1]))
    with pytest.raises(NonFiniteLossError, match=f"domain 2 must be finite, got {bad}; lower"):
        tracker.update(tensor(9.0, 9.0, bad), torch.tensor([1, 1, count]))
    assert tracker.estimate.tolist() == [1.0, 2.0, 3.0]


def test_bad_updates():
    tracker = DomainLosses(2)
    with pytest.raises(
        ValueError, match=r"counts must be finite and not negative, got -1.0 for domain 1"
    ):
        tracker.update(tensor(1.0, 1.0), tensor(1.0, -1.0))
    with pytest.raises(ValueError, match=r"sums must be 0 where counts is 0, got 1.0 for domain 0"):
        tracker.update(tensor(1.0, 1.0), tensor(0.0, 1.0))
    with pytest.raises(ValueError, match=r"sums must have shape \(2,\)"):
        tracker.update(tensor(1.0), tensor(1.0, 1.0))
    with pytest.raises(ValueError, match=r"counts must have shape \(2,\)"):
        tracker.update(tensor(1.0, 1.0), tensor(1.0))
    assert not tracker.seen.any()


def test_bad_construction():
    with pytest.raises(ValueError, match="num_domains must be at least 1, got 0"):
        DomainLosses(0)
    for smoothing in (1.0, -0.1, float("nan")):
        with pytest.raises(ValueError, match=r"smoothing must lie in \[0, 1\), got"):
            DomainLosses(2, smoothing=smoothing)
    with pytest.raises(ValueError, match=r"reference must have shape \(2,\)"):
        DomainLosses(2, reference=torch.zeros(3))
    with pytest.raises(ValueError, match="reference must be finite, got nan for domain 1"):
        DomainLosses(2, reference=torch.tensor([1.0, torch.nan]))


def test_state_round_trips_bit_for_bit(tmp_path):
    straight = DomainLosses(3)
    steps = [(torch.rand(3, dtype=torch.float64), torch.tensor([3, 1, 2])) for _ in range(6)]
    for step in steps[:3]:
        straight.update(*step)
    torch.save(straight.state_dict(), tmp_path / "state.pt")
    resumed = DomainLosses(3)
    resumed.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    for step in steps[3:]:
        straight.update(*step)
        resumed.update(*step)
    assert torch.equal(straight.estimate, resumed.estimate)
    for name, entry in straight.state_dict().items():
        assert torch.equal(entry, resumed.state_dict()[name])


def test_state_is_a_copy():
    tracker = DomainLosses(1)
    state = tracker.state_dict()
    tracker.load_state_dict(state)
    state["token_counts"] += 1
    assert not tracker.seen.any()


@pytest.mark.parametrize(
    "state",
    [
        {},
        {"loss_sums": torch.zeros(2)},
        {"loss_sums": torch.zeros(3), "token_counts": torch.zeros(3)},
        {"loss_sums": torch.zeros(2), "token_counts": torch.zeros(2), "extra": torch.zeros(2)},
    ],
)
def test_a_state_of_another_run_is_refused(state):
    with pytest.raises(CheckpointError, match=r"must hold \['loss_sums', 'token_counts'\] of 2"):
        DomainLosses(2).load_state_dict(state)


def test_the_caller_keeps_its_graph():
    losses = torch.rand(2, 3, requires_grad=True)
    sums, counts = domain_sums(losses, torch.tensor([0, 1]), 2)
    tracker = DomainLosses(2)
    tracker.update(sums, counts)
    assert not tracker.estimate.requires_grad
    result = tracker.weights(KL(), penalty=1.0)
    (result.weights.to(sums.dtype) @ (sums / counts)).backward()
    expected = (result.weights / counts).unsqueeze(-1).expand(2, 3).float()
    torch.testing.assert_close(losses.grad, expected)
