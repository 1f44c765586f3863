"""What holds for every loss over tokens: gradients, padding, order, empty batches, processes."""

import pytest
import torch

from drgr.collectives import rank
from drgr.routing import (
    activation_locality_loss,
    chunk_sparsity_loss,
    expert_load,
    expert_specialisation_loss,
    layer_coupling_loss,
    load_balancing_loss,
    micro_balancing_loss,
    pool_balancing_loss,
    pool_fractions,
    router_z_loss,
    routing_information_loss,
    selected_mass,
    sequence_balancing_loss,
    specialisation_balance_loss,
    top1_balancing_loss,
    tsallis_entropy_loss,
)


def length_of(batch):
    """Tokens of a sequence, padding included."""
    return batch.get("length", 4)


def load_of(batch):
    keep = batch["keep"]
    if batch["valid"] is not None:
        keep = keep & batch["valid"].unsqueeze(1)
    return expert_load(batch["ids"], keep, batch["logits"].shape[1])


def scores_of(batch):
    return batch["logits"].softmax(dim=1)


def _sequence(batch):
    return sequence_balancing_loss(
        scores_of(batch),
        batch["ids"],
        batch["keep"],
        sequence_length=length_of(batch),
        valid=batch["valid"],
    )


def _specialisation(batch):
    # Activations that depend on the logits, so that there is one input to differentiate.
    activations = torch.stack([batch["logits"], batch["logits"].square()], dim=1)
    return expert_specialisation_loss(activations, batch["keep"], valid=batch["valid"])


def _coupling(batch):
    layers = (scores_of(batch), scores_of(batch).square())
    masses = [
        selected_mass(scores, batch["ids"], batch["keep"], valid=batch["valid"])
        for scores in layers
    ]
    return layer_coupling_loss(torch.stack(masses), valid=batch["valid"])


def _pool(batch):
    load = load_of(batch)
    # Counts of a second layer, which add up over processes as those of the first do.
    second = load * torch.arange(1, len(load) + 1)
    fractions = pool_fractions(torch.stack([load, second]))
    return pool_balancing_loss(scores_of(batch), fractions, valid=batch["valid"])


LOSSES = {
    "global": lambda b: load_balancing_loss(scores_of(b), load_of(b), valid=b["valid"]),
    "micro": lambda b: micro_balancing_loss(scores_of(b), load_of(b), valid=b["valid"]),
    "sequence": _sequence,
    "top1": lambda b: top1_balancing_loss(b["logits"], temperature=0.5, valid=b["valid"]),
    "z": lambda b: router_z_loss(b["logits"], valid=b["valid"]),
    "tsallis": lambda b: tsallis_entropy_loss(scores_of(b), order=1.3, valid=b["valid"]),
    "shannon": lambda b: tsallis_entropy_loss(scores_of(b), order=1.0, valid=b["valid"]),
    "decided": lambda b: specialisation_balance_loss(
        scores_of(b), load_of(b), entropy_coefficient=0.3, valid=b["valid"]
    ),
    "printed": lambda b: specialisation_balance_loss(
        scores_of(b), load_of(b), entropy_coefficient=-0.3, valid=b["valid"]
    ),
    "information": lambda b: routing_information_loss(scores_of(b), valid=b["valid"]),
    "locality": lambda b: activation_locality_loss(
        b["logits"], sequence_length=length_of(b), sharpness=2.0, valid=b["valid"]
    ),
    "chunk": lambda b: chunk_sparsity_loss(
        scores_of(b), sequence_length=length_of(b), chunk_length=3, valid=b["valid"]
    ),
    "specialisation": _specialisation,
    "coupling": _coupling,
    "pool": _pool,
}
ORDERED = {"sequence", "locality", "chunk"}
# Losses that the whole batch shares; micro is by definition that of each process.
SHARED = [name for name in LOSSES if name != "micro"]

every_loss = pytest.mark.parametrize("name", LOSSES)


def draw(num_tokens=16, num_experts=4, *, seed=0, is_padded=True):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(num_tokens, num_experts, generator=generator, dtype=torch.float64)
    keep = torch.rand(num_tokens, 2, generator=generator) < 0.8
    valid = torch.rand(num_tokens, generator=generator) < 0.7 if is_padded else None
    return {"logits": logits, "ids": logits.topk(2, dim=1).indices, "keep": keep, "valid": valid}


def with_logits(batch, logits):
    return {**batch, "logits": logits}


@every_loss
@pytest.mark.parametrize("is_padded", [False, True])
def test_gradient(name, is_padded):
    batch = draw(8, 3, is_padded=is_padded)
    if name == "specialisation":
        batch["keep"] = torch.ones(8, 2, dtype=torch.bool)
    logits = batch["logits"].clone().requires_grad_()
    loss = LOSSES[name](batch)
    assert loss.shape == ()
    assert torch.autograd.gradcheck(lambda z: LOSSES[name](with_logits(batch, z)), logits)


@every_loss
def test_what_padding_holds_does_not_matter(name):
    batch = draw()
    expected = LOSSES[name](batch)
    spoiled = batch["logits"].clone()
    spoiled[~batch["valid"]] = torch.nan
    other = {**batch, "keep": batch["keep"] & batch["valid"].unsqueeze(1)}
    if name == "global":  # documented: its padding holds finite scores
        spoiled[~batch["valid"]] = 7.0
    logits = spoiled.requires_grad_()
    loss = LOSSES[name](with_logits(other, logits))
    torch.testing.assert_close(loss.detach(), expected)
    loss.backward()
    assert logits.grad[batch["valid"]].isfinite().all()
    assert logits.grad[batch["valid"]].any()
    if name == "global":
        assert not logits.grad[~batch["valid"]].any()


@every_loss
def test_padding_at_the_end_of_sequences_changes_nothing(name):
    short = draw(12, is_padded=False)
    rows = torch.arange(12).view(3, 4)
    # Each sequence of 4 gets 2 rows of padding.
    place = torch.cat([rows, torch.zeros(3, 2, dtype=torch.int64)], dim=1).flatten()
    valid = torch.tensor([1, 1, 1, 1, 0, 0] * 3).bool()
    keep = short["keep"][place] & valid.unsqueeze(1)
    padded = {
        "logits": short["logits"][place],
        "ids": short["ids"][place],
        "keep": keep,
        "valid": valid,
        "length": 6,
    }
    torch.testing.assert_close(LOSSES[name](padded), LOSSES[name](short))


# The inputs of the other two are built from positions of experts above.
@pytest.mark.parametrize("name", [n for n in LOSSES if n not in {"specialisation", "pool"}])
def test_names_of_experts_do_not_matter(name):
    batch = draw()
    order = torch.tensor([2, 0, 3, 1])
    renamed = {**batch, "logits": batch["logits"][:, order], "ids": order.argsort()[batch["ids"]]}
    torch.testing.assert_close(LOSSES[name](renamed), LOSSES[name](batch))


@every_loss
def test_order_of_tokens_matters_only_where_neighbours_do(name):
    batch = draw()
    order = torch.randperm(16, generator=torch.Generator().manual_seed(1))
    shuffled = {key: rows[order] for key, rows in batch.items()}
    loss, expected = LOSSES[name](shuffled), LOSSES[name](batch)
    assert torch.isclose(loss, expected, rtol=1e-9) == (name not in ORDERED)
    whole = torch.arange(16).view(4, 4)[[2, 0, 3, 1]].flatten()
    by_sequence = {key: rows[whole] for key, rows in batch.items()}
    torch.testing.assert_close(LOSSES[name](by_sequence), expected)


@every_loss
def test_no_real_token_has_no_loss_and_no_gradient(name):
    batch = {**draw(8), "valid": torch.zeros(8, dtype=torch.bool)}
    logits = batch["logits"].clone().requires_grad_()
    loss = LOSSES[name](with_logits(batch, logits))
    assert float(loss.detach()) == 0
    loss.backward()
    assert not logits.grad.any()


@every_loss
def test_an_empty_batch_has_no_loss(name):
    assert float(LOSSES[name](draw(0, is_padded=False))) == 0


@every_loss
def test_an_empty_plan_is_finite(name):
    batch = {**draw(), "keep": torch.zeros(16, 2, dtype=torch.bool)}
    loss = float(LOSSES[name](batch))
    assert loss == pytest.approx(loss, nan_ok=False)
    if name in {"global", "micro", "sequence", "specialisation", "coupling"}:
        assert loss == 0


@pytest.mark.parametrize("name", [name for name in LOSSES if name != "specialisation"])
def test_one_expert_is_finite(name):
    batch = draw(num_experts=2)
    batch = {
        **batch,
        "logits": batch["logits"][:, :1],
        "ids": torch.zeros(16, 2, dtype=torch.int64),
    }
    batch["keep"] = batch["keep"].clone()
    batch["keep"][:, 1] = False
    logits = batch["logits"].clone().requires_grad_()
    loss = LOSSES[name](with_logits(batch, logits))
    loss.backward()
    assert logits.grad.isfinite().all()
    if name in {"global", "micro", "top1"}:
        assert float(loss.detach()) == pytest.approx(1)
    if name in {"tsallis", "shannon", "information"}:
        assert float(loss.detach()) == 0


@every_loss
def test_half_precision_gives_float32(name):
    batch = with_logits(draw(), draw()["logits"].bfloat16())
    assert LOSSES[name](batch).dtype == torch.float32


def shares():
    """Batches of 16 tokens, of which rank 0 holds the first 12; one leaves rank 1 no token."""
    lonely = draw(seed=2)
    lonely["valid"] = lonely["valid"] & (torch.arange(16) < 12)
    return [draw(is_padded=False), draw(seed=1), lonely]


def losses_of_own_share():
    results = []
    part = slice(0, 12) if rank() == 0 else slice(12, None)
    for whole in shares():
        own = {key: None if rows is None else rows[part] for key, rows in whole.items()}
        for name in SHARED:
            logits = own["logits"].clone().requires_grad_()
            loss = LOSSES[name](with_logits(own, logits))
            loss.backward()
            results.append((loss.detach(), logits.grad))
    return results


def test_two_processes_are_one(run_processes):
    first, second = run_processes(losses_of_own_share, 2)
    cases = [(whole, name) for whole in shares() for name in SHARED]
    for (whole, name), one, two in zip(cases, first, second, strict=True):
        logits = whole["logits"].clone().requires_grad_()
        loss = LOSSES[name](with_logits(whole, logits))
        loss.backward()

        def message(default, name=name):
            return f"{name}: {default}"

        torch.testing.assert_close((one[0] + two[0]) / 2, loss.detach(), msg=message)
        if name not in {"global", "decided", "printed"}:
            torch.testing.assert_close(one[0], two[0], msg=message)
        # Data-parallel training averages gradients over processes.
        gradient = torch.cat([one[1], two[1]]) / 2
        torch.testing.assert_close(gradient, logits.grad, msg=message)
