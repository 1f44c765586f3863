"""The Switch loss: against a loop, numerical derivatives and the function of transformers."""

import pytest
import torch

from drgr.collectives import rank
from drgr.routing import load_balancing_loss


def load_of(scores, top_k, valid=None):
    """Counts of plain top-k routing."""
    chosen = torch.zeros(scores.shape, dtype=torch.int64).scatter_(1, scores.topk(top_k).indices, 1)
    return (chosen if valid is None else chosen[valid]).sum(dim=0)


def by_loop(scores, load, valid):
    """The definition, one token and one expert at a time."""
    num_experts = len(load)
    rows = [row for row, is_real in zip(scores.tolist(), valid, strict=True) if is_real]
    total = 0.0
    for expert in range(num_experts):
        probability = sum(row[expert] / sum(row) for row in rows) / len(rows)
        total += load[expert] / sum(load) * probability
    return num_experts * total


@pytest.mark.parametrize("activation", [torch.sigmoid, lambda x: x.softmax(dim=1)])
@pytest.mark.parametrize("is_padded", [False, True])
def test_equals_the_definition(activation, is_padded):
    scores = activation(torch.randn(13, 5, dtype=torch.float64))
    valid = torch.rand(13) < 0.6 if is_padded else None
    load = load_of(scores, 2, valid)
    mask = [True] * 13 if valid is None else valid.tolist()
    loss = load_balancing_loss(scores, load, valid=valid)
    assert float(loss) == pytest.approx(by_loop(scores, load.tolist(), mask), rel=1e-12)


@pytest.mark.parametrize("is_padded", [False, True])
def test_gradient(is_padded):
    scores = torch.rand(6, 4, dtype=torch.float64, requires_grad=True)
    valid = torch.tensor([True, False, True, True, False, True]) if is_padded else None
    load = torch.tensor([5, 1, 0, 6])
    assert torch.autograd.gradcheck(
        lambda scores: load_balancing_loss(scores, load, valid=valid), scores
    )


def test_is_one_for_uniform_scores_and_for_uniform_load():
    uniform = torch.full((8, 4), 0.3)
    assert float(load_balancing_loss(uniform, torch.tensor([16, 0, 0, 0]))) == pytest.approx(1)
    skewed = torch.rand(8, 4).softmax(dim=1)
    assert float(load_balancing_loss(skewed, torch.full((4,), 4))) == pytest.approx(1)


def test_descent_lowers_the_probability_of_the_hot_expert():
    logits = torch.zeros(6, 3, requires_grad=True)
    load_balancing_loss(logits.softmax(dim=1), torch.tensor([6, 0, 0])).backward()
    assert (logits.grad[:, 0] > 0).all()
    assert (logits.grad[:, 1:] < 0).all()


def test_layers_collapsed_onto_opposite_experts_do_not_hide_each_other():
    layers = [torch.tensor([[1.0, 0.0]] * 5), torch.tensor([[0.0, 1.0]] * 5)]
    loads = [load_of(scores, 1) for scores in layers]
    each = [float(load_balancing_loss(s, c)) for s, c in zip(layers, loads, strict=True)]
    assert each == [2.0, 2.0]
    # Pooled over layers, as the loss of transformers is, both look balanced.
    assert float(load_balancing_loss(torch.cat(layers), sum(loads))) == 1.0


def test_equals_transformers_up_to_the_number_of_experts_per_token():
    """Ours has load fractions that sum to 1; theirs sum to top_k, so theirs is top_k times ours."""
    modeling = pytest.importorskip("transformers.models.mixtral.modeling_mixtral")
    logits = torch.randn(24, 8)
    mask = torch.ones(2, 12)
    mask[0, 7:] = 0
    valid = mask.bool().flatten()
    scores = logits.softmax(dim=1)
    for top_k in (1, 2, 4):
        theirs = modeling.load_balancing_loss_func((logits,), 8, top_k)
        ours = load_balancing_loss(scores, load_of(scores, top_k))
        torch.testing.assert_close(top_k * ours, theirs)
        theirs = modeling.load_balancing_loss_func((logits,), 8, top_k, mask)
        ours = load_balancing_loss(scores, load_of(scores, top_k, valid), valid=valid)
        torch.testing.assert_close(top_k * ours, theirs)


def test_padding_has_no_gradient_and_its_scores_do_not_matter():
    scores = torch.rand(5, 3).softmax(dim=1).requires_grad_()
    valid = torch.tensor([True, True, False, True, False])
    load = torch.tensor([2, 1, 3])
    loss = load_balancing_loss(scores, load, valid=valid)
    loss.backward()
    assert not scores.grad[~valid].any()
    assert scores.grad[valid].any()
    other = torch.where(valid.unsqueeze(1), scores.detach(), torch.rand(5, 3))
    torch.testing.assert_close(load_balancing_loss(other, load, valid=valid), loss.detach())


def test_half_precision_counts_many_tokens():
    # 70000 is beyond the largest float16.
    scores = torch.full((70000, 2), 0.5, dtype=torch.float16)
    loss = load_balancing_loss(scores, torch.tensor([70000, 0]))
    assert loss.dtype == torch.float32
    assert float(loss) == pytest.approx(1, rel=1e-2)


@pytest.mark.parametrize("valid", [torch.zeros(3, dtype=torch.bool), None])
def test_an_empty_batch_has_no_loss(valid):
    scores = torch.rand(3 if valid is not None else 0, 4)
    assert float(load_balancing_loss(scores, torch.zeros(4, dtype=torch.int64), valid=valid)) == 0


def shared_batches():
    """Scores and masks of a batch of 12 tokens, of which rank 0 holds the first 7."""
    generator = torch.Generator().manual_seed(3)
    scores = torch.rand(12, 4, generator=generator, dtype=torch.float64)
    uneven = torch.tensor([1, 1, 1, 0, 0, 0, 0, 1, 1, 1, 1, 0]).bool()
    lonely = torch.zeros(12, dtype=torch.bool)
    lonely[9] = True
    return [(scores, None), (scores, uneven), (scores, lonely), (scores, torch.zeros(12).bool())]


def loss_of_own_share():
    results = []
    for scores, valid in shared_batches():
        part = slice(0, 7) if rank() == 0 else slice(7, None)
        own = scores[part].clone().requires_grad_()
        mask = None if valid is None else valid[part]
        loss = load_balancing_loss(own, load_of(own.detach(), 2, mask), valid=mask)
        loss.backward()
        results.append((loss.detach(), own.grad))
    return results


def test_the_mean_over_processes_is_the_loss_of_the_whole_batch(run_processes):
    for (scores, valid), first, second in zip(
        shared_batches(), *run_processes(loss_of_own_share, 2), strict=True
    ):
        whole = scores.clone().requires_grad_()
        loss = load_balancing_loss(whole, load_of(scores, 2, valid), valid=valid)
        loss.backward()
        torch.testing.assert_close((first[0] + second[0]) / 2, loss.detach())
        # Data-parallel training averages gradients over processes.
        torch.testing.assert_close(torch.cat([first[1], second[1]]) / 2, whole.grad)
