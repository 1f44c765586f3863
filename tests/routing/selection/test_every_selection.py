"""What holds for every selection: padding, forbidden experts, causality, processes, state."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from drgr.budgets import TokenBudget
from drgr.collectives import rank
from drgr.routing import LayerRouting, RoutingPlan, expert_load
from drgr.routing.place import LayerPlace
from drgr.routing.selection import (
    BudgetedSelector,
    ProgressiveSelector,
    QuantileSelector,
    SelectionInputs,
    SequenceSelector,
    ThresholdSelector,
    TopPSelector,
    batch_percentile,
    layer_budgets,
    sparsification,
)

NUM_EXPERTS, LENGTH = 6, 5
BUDGET = TokenBudget(minimum=1, maximum=4, average=2.4)
WIDE = TokenBudget(minimum=2, maximum=5, average=3.5)
PLACE = LayerPlace(number=1, num_layers=2, num_experts=6, width=4, device=torch.device("cpu"))

SELECTORS = {
    "budgeted": lambda: BudgetedSelector(BUDGET),
    "percentile": lambda: batch_percentile(60, num_experts=6),
    "layers": lambda: layer_budgets([WIDE, BUDGET])(PLACE),
    "progressive": lambda: ProgressiveSelector(
        sparsification(WIDE, BUDGET, switch_step=2), maximum=5
    ),
    "sequence": lambda: SequenceSelector(BUDGET),
    "top-p": lambda: TopPSelector(0.6, minimum=1, maximum=4),
    "threshold": lambda: ThresholdSelector(0.5, minimum=1, maximum=4),
    "quantile": lambda: QuantileSelector(BUDGET),
    "expert-quantiles": lambda: QuantileSelector(BUDGET, num_experts=6),
}
# In training too, no token has a say in the experts of another.
ALONE = ("top-p", "threshold", "quantile", "expert-quantiles")
STATES = {
    "progressive": {"price", "step"},
    "top-p": set(),
    "threshold": set(),
    "quantile": {"thresholds"},
    "expert-quantiles": {"thresholds"},
}

every_selection = pytest.mark.parametrize("name", SELECTORS)
whether_exact = pytest.mark.parametrize("exact", [True, False])


def inputs_of(values, *, valid=None, exact=True):
    return SelectionInputs(
        values=values,
        scores=values.nan_to_num(neginf=0.0),
        valid=valid,
        sequence_length=LENGTH,
        exact=exact,
    )


def record_of(values, selection, valid=None):
    """What a layer would show its selector."""
    ids, keep = selection.expert_ids, selection.keep
    plan = RoutingPlan(
        expert_ids=ids,
        combine_weights=values.gather(1, ids) * keep,
        keep=keep,
        expert_load=expert_load(ids, keep, values.shape[1]),
    )
    return LayerRouting(
        name="layer", scores=values, values=values, plan=plan, selection=selection, valid=valid
    )


def train(selector, *batches):
    """One step for each batch of values and mask."""
    for values, valid in batches:
        selection = selector.select(inputs_of(values, valid=valid))
        selector.observe(record_of(values, selection, valid))
        selector.update()
    return selector


def trained(name):
    generator = torch.Generator().manual_seed(3)
    batches = torch.rand(3, 4 * LENGTH, NUM_EXPERTS, generator=generator)
    return train(SELECTORS[name](), *((values, None) for values in batches))


def dense(selection):
    mask = torch.zeros(len(selection.keep), NUM_EXPERTS, dtype=torch.bool)
    return mask.scatter_(1, selection.expert_ids, selection.keep)


def assert_same(one, other):
    for field in ("expert_ids", "keep", "spend", "limit", "price"):
        torch.testing.assert_close(getattr(one, field), getattr(other, field), equal_nan=True)


@every_selection
@whether_exact
@settings(deadline=None, derandomize=True, max_examples=15)
@given(
    num_sequences=st.integers(0, 4),
    seed=st.integers(0, 99),
    forbidden=st.sampled_from([0.0, 0.4, 1.0]),
    padded=st.booleans(),
)
def test_bounds_order_and_counts(name, exact, num_sequences, seed, forbidden, padded):
    selector = trained(name)
    generator = torch.Generator().manual_seed(seed)
    values = torch.rand(num_sequences * LENGTH, NUM_EXPERTS, generator=generator)
    closed = torch.rand(values.shape, generator=generator) < forbidden
    values = values.masked_fill(closed, -torch.inf)
    valid = torch.rand(len(values), generator=generator) < 0.7 if padded else None
    chosen = selector.select(inputs_of(values, valid=valid, exact=exact))
    real = torch.ones(len(values), dtype=torch.bool) if valid is None else valid
    counts, permitted = chosen.keep.sum(dim=1), (~closed).sum(dim=1) * real
    assert (counts >= permitted.clamp_max(1)).all()
    assert (counts <= permitted.clamp_max(selector.maximum)).all()
    assert int(chosen.spend) == int(counts.sum())
    assert chosen.spend.dtype == chosen.limit.dtype == torch.int64
    assert not (chosen.keep[:, 1:] & ~chosen.keep[:, :-1]).any()
    assert torch.isfinite(values.gather(1, chosen.expert_ids)[chosen.keep]).all()
    for ids in chosen.expert_ids.tolist():
        assert len(set(ids)) == len(ids)


@every_selection
@whether_exact
def test_what_padding_holds_changes_nothing(name, exact):
    values, valid = torch.rand(20, NUM_EXPERTS), torch.rand(20) < 0.6
    other = torch.where(valid.unsqueeze(1), values, 9 * torch.rand(20, NUM_EXPERTS))
    one, two = (
        trained(name).select(inputs_of(given, valid=valid, exact=exact))
        for given in (values, other)
    )
    assert torch.equal(dense(one)[valid], dense(two)[valid])
    assert not dense(two)[~valid].any()
    for field in ("spend", "limit", "price"):
        torch.testing.assert_close(getattr(one, field), getattr(two, field), equal_nan=True)
    one, two = (train(trained(name), (given, valid)).state_dict() for given in (values, other))
    torch.testing.assert_close(one, two)


@every_selection
@whether_exact
def test_tokens_decide_alone_at_evaluation(name, exact):
    """Also that in training those that need the whole batch really look at it."""
    selector, values = trained(name), torch.rand(20, NUM_EXPERTS)
    whole = dense(selector.select(inputs_of(values, exact=exact)))
    crowd = torch.cat([values[:5], 1 + torch.rand(15, NUM_EXPERTS)])
    crowd[4] += 1
    among = dense(selector.select(inputs_of(crowd, exact=exact)))
    is_alone = not exact or name in ALONE
    assert torch.equal(whole[:4], among[:4]) == is_alone
    if is_alone:
        for token in range(20):
            one = SelectionInputs(
                values=values[token : token + 1],
                scores=values[token : token + 1],
                sequence_length=1,
                exact=exact,
            )
            assert torch.equal(dense(selector.select(one)), whole[token : token + 1])


@every_selection
def test_selecting_moves_nothing_and_learning_only_at_the_update(name):
    selector = trained(name)
    before = selector.state_dict()
    values = torch.rand(20, NUM_EXPERTS)
    for exact in (True, False):
        chosen = selector.select(inputs_of(values, exact=exact))
    selector.observe(record_of(values, chosen))
    torch.testing.assert_close(selector.state_dict(), before, rtol=0, atol=0)


@every_selection
def test_state_round_trip(name):
    selector, other = trained(name), SELECTORS[name]()
    state = selector.state_dict()
    assert set(state) == STATES.get(name, {"price"})
    other.load_state_dict({key: value.clone() for key, value in state.items()})
    values = torch.rand(20, NUM_EXPERTS)
    for exact in (True, False):
        assert_same(*(one.select(inputs_of(values, exact=exact)) for one in (selector, other)))
    torch.testing.assert_close(
        train(selector, (values, None)).state_dict(), train(other, (values, None)).state_dict()
    )
    with pytest.raises(ValueError, match=r"must hold \[.*\], got \['nothing'\]; it belongs to ano"):
        other.load_state_dict({"nothing": torch.zeros(())})


@every_selection
def test_loading_forgets_what_was_observed(name):
    selector, values = trained(name), torch.rand(20, NUM_EXPERTS)
    state = selector.state_dict()
    selector.observe(record_of(values, selector.select(inputs_of(values))))
    selector.load_state_dict(state)
    selector.update()
    after = selector.state_dict()
    if "step" in state:
        assert int(after.pop("step")) == int(state.pop("step")) + 1
    torch.testing.assert_close(after, state)


@every_selection
@whether_exact
def test_before_the_first_step(name, exact):
    """Nothing is learned yet: tokens have what the average, rounded down, or their scores say."""
    selector, values = SELECTORS[name](), torch.rand(20, NUM_EXPERTS)
    if name != "threshold":
        assert selector.price is None
    counts = selector.select(inputs_of(values, exact=exact)).keep.sum(dim=1)
    learned = name not in ("top-p", "threshold")
    if learned and (not exact or name in ALONE):
        assert (counts == {"progressive": 3}.get(name, 2)).all()


def shares():
    """Batches, their masks, and the row at which rank 1 takes over: always between sequences."""
    generator = torch.Generator().manual_seed(5)
    cases = []
    for cut in (5, 15, 0, 20):
        values = torch.rand(20, NUM_EXPERTS, generator=generator)
        values[torch.rand(values.shape, generator=generator) < 0.2] = -torch.inf
        cases.append((values, torch.rand(20, generator=generator) < 0.7, cut))
    return cases


def learn_own_share(name):
    selector = SELECTORS[name]()
    chosen = []
    for values, valid, cut in shares():
        part = slice(0, cut) if rank() == 0 else slice(cut, None)
        selection = selector.select(inputs_of(values[part], valid=valid[part]))
        selector.observe(record_of(values[part], selection, valid[part]))
        selector.update()
        alone = selector.select(inputs_of(values[part], valid=valid[part], exact=False))
        chosen.append((selection, alone))
    return chosen, selector.state_dict()


def learn_own_shares():
    return {name: learn_own_share(name) for name in SELECTORS}


def test_two_processes_equal_one(run_processes):
    first, second = run_processes(learn_own_shares, 2)
    for name in SELECTORS:
        whole, state = learn_own_share_of_all(name)
        for own in (first, second):
            torch.testing.assert_close(own[name][1], state, rtol=1e-6, atol=1e-6)
        for one, mine, theirs in zip(whole, first[name][0], second[name][0], strict=True):
            for exact in (0, 1):
                joined = torch.cat([dense(mine[exact]), dense(theirs[exact])])
                assert torch.equal(joined, dense(one[exact])), name
            for own in (mine, theirs):
                for field in ("spend", "limit", "price"):
                    torch.testing.assert_close(
                        getattr(own[0], field),
                        getattr(one[0], field),
                        rtol=1e-6,
                        atol=1e-6,
                        equal_nan=True,
                    )
            # Evaluation adds nothing up: processes need not run the same passes.
            spends = [int(own[1].spend) for own in (mine, theirs)]
            assert sum(spends) == int(one[1].spend)


def learn_own_share_of_all(name):
    selector, chosen = SELECTORS[name](), []
    for values, valid, _ in shares():
        selection = selector.select(inputs_of(values, valid=valid))
        selector.observe(record_of(values, selection, valid))
        selector.update()
        alone = selector.select(inputs_of(values, valid=valid, exact=False))
        chosen.append((selection, alone))
    return chosen, selector.state_dict()


@every_selection
def test_more_experts_than_there_are(name):
    selector = SELECTORS[name]()
    few = inputs_of(torch.rand(5, 3))
    message = r"maximum must be at most the number of experts, got \d for 3"
    with pytest.raises(ValueError, match=message):
        selector.select(few)


@pytest.mark.parametrize("name", ["budgeted", "percentile", "layers", "sequence", "quantile"])
def test_the_learned_price_keeps_to_the_average_on_new_tokens(name):
    generator = torch.Generator().manual_seed(1)
    selector = SELECTORS[name]()
    for values in torch.rand(25, 64 * LENGTH, NUM_EXPERTS, generator=generator):
        train(selector, (values, None))
    values = torch.rand(3000 * LENGTH, NUM_EXPERTS, generator=generator)
    chosen = selector.select(inputs_of(values, exact=False))
    assert float(chosen.spend / chosen.limit) == pytest.approx(1, rel=0.03)
    assert len(chosen.keep.sum(dim=1).unique()) > 2


def test_prices_that_do_not_exist_are_not_numbers():
    for name in ("top-p", "expert-quantiles"):
        chosen = trained(name).select(inputs_of(torch.rand(20, NUM_EXPERTS)))
        assert math.isnan(chosen.price)
        assert trained(name).price is None


def test_half_precision_scores_are_added_in_full():
    values = torch.rand(20, NUM_EXPERTS).bfloat16().float()
    selector = TopPSelector(0.6, maximum=4)
    full = selector.select(inputs_of(values))
    half = selector.select(replace(inputs_of(values), scores=values.bfloat16()))
    assert_same(half, full)
