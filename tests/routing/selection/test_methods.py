"""Each selection against an oracle that tries all subsets, and what it refuses."""

import itertools
import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from drgr.budgets import TokenBudget, select_at_price, select_exactly
from drgr.errors import InfeasibleBudgetError
from drgr.routing import LayerRouting, RoutingPlan, expert_load
from drgr.routing.place import LayerPlace
from drgr.routing.selection import (
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

properties = settings(deadline=None, derandomize=True, max_examples=80)


def distinct(num_tokens, num_experts, seed):
    """Worths without ties, whose sums are exact."""
    generator = torch.Generator().manual_seed(seed)
    size = num_tokens * num_experts
    flat = (torch.randperm(size, generator=generator) + 1) / 64
    return flat.reshape(num_tokens, num_experts)


def inputs_of(values, *, scores=None, valid=None, sequence_length=None, exact=True):
    return SelectionInputs(
        values=values,
        scores=values if scores is None else scores,
        valid=valid,
        sequence_length=sequence_length,
        exact=exact,
    )


def chosen_sets(selection):
    return [
        {expert for expert, is_kept in zip(ids, keep, strict=True) if is_kept}
        for ids, keep in zip(selection.expert_ids.tolist(), selection.keep.tolist(), strict=True)
    ]


def record_of(values, selection, valid=None):
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


def step(selector, *micro_batches, sequence_length=None):
    for values, valid in micro_batches:
        inputs = inputs_of(values, valid=valid, sequence_length=sequence_length)
        selector.observe(record_of(values, selector.select(inputs), valid))
    selector.update()


def subsets(experts):
    return itertools.chain.from_iterable(
        itertools.combinations(experts, size) for size in range(len(experts) + 1)
    )


def upper_sets(row):
    """Subsets of the permitted experts that leave out nothing better than what they hold."""
    permitted = [expert for expert, value in enumerate(row) if value > -math.inf]
    for held in subsets(permitted):
        others = [row[expert] for expert in permitted if expert not in held]
        if min((row[expert] for expert in held), default=math.inf) > max(others, default=-math.inf):
            yield set(held)


def of_size(row, size):
    """The upper set of so many experts, or of all permitted where there are fewer."""
    sets = {len(held): held for held in upper_sets(row)}
    return sets[min(size, max(sets))]


@properties
@given(
    seed=st.integers(0, 999),
    sixteenths=st.integers(1, 16),
    minimum=st.integers(0, 2),
    more=st.integers(0, 2),
    priced=st.booleans(),
    closed=st.booleans(),
)
def test_top_p_is_the_smallest_set_that_reaches_p(seed, sixteenths, minimum, more, priced, closed):
    scores = distinct(3, 4, seed)
    values = scores - distinct(1, 4, seed + 1) * 2 if priced else scores
    # Ties of worths are decided by nothing that an oracle could know.
    values = values - torch.arange(4) / 1024
    if closed:
        values[:, seed % 4] = -torch.inf
    maximum = max(minimum + more, 1)
    selector = TopPSelector(sixteenths / 16, minimum=minimum, maximum=maximum)
    expected = []
    for row, own in zip(values.tolist(), scores.tolist(), strict=True):
        total = sum(own[expert] for expert, value in enumerate(row) if value > -math.inf)
        enough = [
            held
            for held in upper_sets(row)
            if sum(own[expert] for expert in held) >= sixteenths / 16 * total
        ]
        expected.append(of_size(row, min(max(min(map(len, enough)), minimum), maximum)))
    assert chosen_sets(selector.select(inputs_of(values, scores=scores))) == expected


def test_top_p_by_scores_alone_is_the_nucleus():
    """The fewest experts of any kind whose scores reach p, and of those the best."""
    scores = distinct(6, 5, 0)
    chosen = chosen_sets(TopPSelector(0.75, maximum=5).select(inputs_of(scores)))
    for row, held in zip(scores.tolist(), chosen, strict=True):
        enough = [s for s in subsets(range(5)) if sum(row[e] for e in s) >= 0.75 * sum(row)]
        fewest = min(map(len, enough))
        best = max((s for s in enough if len(s) == fewest), key=lambda s: sum(row[e] for e in s))
        assert held == set(best)


def test_top_p_of_scores_that_are_all_zero_is_the_minimum():
    for minimum in (0, 2):
        chosen = TopPSelector(0.5, minimum=minimum, maximum=3).select(inputs_of(torch.zeros(4, 5)))
        assert chosen.keep.sum(dim=1).tolist() == [minimum] * 4


def test_limits_of_what_has_no_average_are_the_maximum():
    valid = torch.tensor([True, False, True, True])
    for selector in (TopPSelector(0.5, maximum=3), ThresholdSelector(0.1, maximum=3)):
        assert int(selector.select(inputs_of(torch.rand(4, 5), valid=valid)).limit) == 9


@properties
@given(
    seed=st.integers(0, 999),
    threshold=st.integers(0, 13).map(lambda count: count / 64),
    minimum=st.integers(0, 2),
    more=st.integers(0, 2),
    closed=st.booleans(),
)
def test_threshold_runs_what_exceeds_it(seed, threshold, minimum, more, closed):
    values, maximum = distinct(3, 4, seed), max(minimum + more, 1)
    if closed:
        values[:, seed % 4] = -torch.inf
    selector = ThresholdSelector(threshold, minimum=minimum, maximum=maximum)
    expected = []
    for row in values.tolist():
        above = sum(value > threshold for value in row)
        expected.append(of_size(row, min(max(above, minimum), maximum)))
    chosen = selector.select(inputs_of(values))
    assert chosen_sets(chosen) == expected
    assert float(chosen.price) == float(selector.price) == threshold


def spends(values, valid, threshold, minimum, maximum):
    """Assignments of a batch at a threshold, counted token by token."""
    total = 0
    for row, is_real in zip(values.tolist(), valid.tolist(), strict=True):
        ordered = sorted((value for value in row if value > -math.inf), reverse=True)[:maximum]
        total += is_real * sum(
            place < minimum or value > threshold for place, value in enumerate(ordered)
        )
    return total


@properties
@given(
    seed=st.integers(0, 999),
    bounds=st.sampled_from([(0, 3, "0.7"), (1, 4, "2.3"), (1, 2, "1.5"), (0, 4, "3.9")]),
    closed=st.sampled_from([0.0, 0.4, 0.9]),
    padded=st.booleans(),
)
def test_the_quantile_meets_the_average_on_what_it_saw(seed, bounds, closed, padded):
    minimum, maximum, average = bounds
    values = distinct(14, 4, seed)
    generator = torch.Generator().manual_seed(seed)
    values[torch.rand(values.shape, generator=generator) < closed] = -torch.inf
    valid = torch.rand(14, generator=generator) < (0.6 if padded else 2)
    budget = TokenBudget(minimum=minimum, maximum=maximum, average=float(average))
    selector = QuantileSelector(budget, smoothing=0.0)
    step(selector, (values[:5], valid[:5]), (values[5:], valid[5:]))
    limit = math.floor(Fraction(average) * int(valid.sum()))
    possible = {spends(values, valid, bar / 128, minimum, maximum) for bar in range(-1, 130)}
    met = max(spend for spend in possible if spend <= limit)
    if selector.price is None:  # no token has an expert to choose
        assert len(possible) == 1
        return
    assert spends(values, valid, float(selector.price), minimum, maximum) == met
    chosen = selector.select(inputs_of(values, valid=valid))
    assert int(chosen.spend) == met
    assert int(chosen.limit) == limit


def test_thresholds_are_averaged_over_steps():
    budget = TokenBudget(minimum=0, maximum=4, average=1.5)
    selector, batches = QuantileSelector(budget, smoothing=0.75), torch.rand(3, 8, 4)
    expected = None
    for values in batches:
        step(selector, (values, None))
        # The best value refused: 12 of 32 are to be above.
        found = sorted(values.flatten().tolist(), reverse=True)[12]
        expected = found if expected is None else 0.75 * expected + 0.25 * found
        assert float(selector.price) == pytest.approx(expected)
    selector.update()
    assert float(selector.price) == pytest.approx(expected)


@pytest.mark.parametrize("average", [0.7, 1.5, 2, 3.5, 4])
def test_quantiles_of_experts_give_each_its_share(average):
    values = distinct(12, 4, 0) * torch.tensor([1.0, 2.0, 0.5, 1.0])
    budget = TokenBudget(minimum=0, maximum=4, average=average)
    selector = QuantileSelector(budget, num_experts=4, smoothing=0.0)
    step(selector, (values[:7], None), (values[7:], None))
    share = math.floor(average * 12) // 4
    for column, threshold in zip(values.T.tolist(), selector.thresholds.tolist(), strict=True):
        assert sum(value > threshold for value in column) == share
    if average < 4:  # at the maximum every token has it, whatever the thresholds
        chosen = selector.select(inputs_of(values))
        assert expert_load(chosen.expert_ids, chosen.keep, 4).tolist() == [share] * 4
    assert selector.price is None


def test_quantiles_of_experts_rank_by_what_is_above_them():
    budget = TokenBudget(minimum=1, maximum=2, average=1.5)
    selector = QuantileSelector(budget, num_experts=3)
    selector.load_state_dict({"thresholds": torch.tensor([0.5, 0.25, 0.0])})
    values = torch.tensor([[0.6, 0.5, 0.2], [0.4, 0.1, -0.2], [0.4, 0.3, -torch.inf]])
    # Margins: (.1, .25, .2), (-.1, -.15, -.2), (-.1, .05, -inf).
    assert chosen_sets(selector.select(inputs_of(values))) == [{1, 2}, {0}, {1}]


def test_an_expert_that_no_token_may_use_keeps_its_threshold():
    budget = TokenBudget(minimum=0, maximum=3, average=1.5)
    selector = QuantileSelector(budget, num_experts=3, smoothing=0.0)
    closed = torch.rand(6, 3)
    closed[:, 1] = -torch.inf
    step(selector, (closed, None))
    assert torch.isfinite(selector.thresholds).all()
    assert not any(1 in held for held in chosen_sets(selector.select(inputs_of(closed))))
    step(selector, (torch.rand(6, 3), None))
    learned = selector.thresholds[1]
    step(selector, (closed, None))
    assert selector.thresholds[1] == learned
    assert learned != 0


def best_plan(values, budget, limit):
    """The largest worth of all plans of a sequence that spend what can be spent."""
    options = []
    for row in values.tolist():
        permitted = [value for value in row if value > -math.inf]
        least = min(budget.minimum, len(permitted))
        sets = [s for s in subsets(permitted) if least <= len(s) <= budget.maximum]
        options.append(sets)
    spend = min(limit, sum(max(map(len, sets)) for sets in options))
    plans = itertools.product(*options)
    return max(sum(map(sum, plan)) for plan in plans if sum(map(len, plan)) == spend)


@settings(deadline=None, derandomize=True, max_examples=40)
@given(
    seed=st.integers(0, 999),
    bounds=st.sampled_from([(0, 3, "0.7"), (1, 3, "1.5"), (1, 2, "1.3"), (2, 2, "2")]),
    closed=st.booleans(),
    padded=st.booleans(),
)
def test_each_sequence_has_the_best_of_its_plans(seed, bounds, closed, padded):
    minimum, maximum, average = bounds
    values = distinct(9, 3, seed)
    generator = torch.Generator().manual_seed(seed)
    if closed:
        values[torch.rand(9, 3, generator=generator) < 0.3] = -torch.inf
    valid = torch.rand(9, generator=generator) < 0.6 if padded else None
    budget = TokenBudget(minimum=minimum, maximum=maximum, average=float(average))
    chosen = SequenceSelector(budget).select(inputs_of(values, valid=valid, sequence_length=3))
    kept, limits = chosen_sets(chosen), []
    for start in range(0, 9, 3):
        rows = [t for t in range(start, start + 3) if valid is None or valid[t]]
        limits.append(math.floor(Fraction(average) * len(rows)))
        worth = sum(float(values[t, e]) for t in rows for e in kept[t])
        assert worth == best_plan(values[rows], budget, limits[-1])
    assert int(chosen.limit) == sum(limits)


def test_one_sequence_is_a_batch():
    budget = TokenBudget(minimum=1, maximum=4, average=2.3)
    values, valid = torch.rand(20, 6), torch.rand(20) < 0.8
    one = SequenceSelector(budget).select(inputs_of(values, valid=valid, sequence_length=20))
    other = select_exactly(values, budget, valid=valid)
    for field in ("expert_ids", "keep", "spend", "limit", "price"):
        torch.testing.assert_close(getattr(one, field), getattr(other, field))


def test_the_price_of_sequences_is_their_mean_over_tokens():
    budget = TokenBudget(minimum=1, maximum=3, average=1.5)
    values = torch.rand(12, 5)
    valid = torch.ones(12, dtype=torch.bool)
    valid[5:] = False
    valid[8:11] = True  # 4, 1 and 3 real tokens; one cannot have an extra expert
    chosen = SequenceSelector(budget).select(inputs_of(values, valid=valid, sequence_length=4))
    weighed = []
    for start, count in ((0, 4), (4, 1), (8, 3)):
        rows = slice(start, start + count)
        weighed.append((count, float(select_exactly(values[rows], budget).price)))
    expected = sum(count * price for count, price in weighed) / 8
    assert float(chosen.price) == pytest.approx(expected)


def test_sequences_without_a_choice_have_no_price():
    budget = TokenBudget(minimum=2, maximum=2, average=2)
    selector = SequenceSelector(budget)
    step(selector, (torch.rand(6, 4), None), sequence_length=3)
    assert selector.price is None


@pytest.mark.parametrize(
    ("length", "message"),
    [
        (None, "needs their length, got None; call the model with input_ids"),
        (4, "sequence_length must divide the number of tokens, got 4 for 6 tokens"),
    ],
)
def test_sequences_that_are_not_known(length, message):
    selector = SequenceSelector(TokenBudget(minimum=1, maximum=2, average=1.5))
    with pytest.raises(ValueError, match=message):
        selector.select(inputs_of(torch.rand(6, 4), sequence_length=length))
    selector.select(inputs_of(torch.rand(6, 4), sequence_length=length, exact=False))


def test_a_percentile_of_the_batch_is_its_best_worths_and_one_each():
    selector = batch_percentile(75, num_experts=4)
    values = distinct(16, 4, 3)
    kept = chosen_sets(selector.select(inputs_of(values)))
    assert sum(map(len, kept)) == 16
    assert min(map(len, kept)) == 1
    assert batch_percentile(50, num_experts=4).budget.average == 2
    assert batch_percentile(87.5, num_experts=8).budget.average == 1
    extras = chosen_sets(batch_percentile(50, num_experts=4).select(inputs_of(values)))
    best = [(row.max(), token) for token, row in enumerate(values)]
    rest = sorted(
        (
            (float(values[t, e]), t, e)
            for t in range(16)
            for e in range(4)
            if values[t, e] != best[t][0]
        ),
        reverse=True,
    )[:16]
    expected = [{int(row.argmax())} for row in values]
    for _, token, expert in rest:
        expected[token].add(expert)
    assert extras == expected


def test_a_percentile_in_decimals_is_exact():
    assert batch_percentile(83.2, num_experts=10).budget.rate == Fraction(168, 100)


@pytest.mark.parametrize("percentile", [-1, 90, 100])
def test_percentiles_out_of_range(percentile):
    message = rf"percentile must lie in \[0, 87.5\].*got {percentile}"
    with pytest.raises(ValueError, match=message):
        batch_percentile(percentile, num_experts=8)


def place(number, num_layers=3):
    return LayerPlace(
        number=number,
        num_layers=num_layers,
        num_experts=6,
        width=4,
        device=torch.device("cpu"),
    )


def test_each_layer_has_the_budget_of_its_number():
    budgets = [TokenBudget(minimum=1, maximum=4, average=average) for average in (3, 2.5, 1)]
    build = layer_budgets(budgets)
    values = torch.rand(20, 6)
    for number, spend in enumerate((60, 50, 20)):
        chosen = build(place(number)).select(inputs_of(values))
        assert int(chosen.spend) == int(chosen.limit) == spend
    message = "budgets must have one entry for each of the 4 MoE layers, got 3"
    with pytest.raises(ValueError, match=message):
        build(place(0, num_layers=4))


FIRST = TokenBudget(minimum=2, maximum=5, average=3.5)
TARGET = TokenBudget(minimum=1, maximum=2, average=1.5)


def progressive(**options):
    schedule = sparsification(FIRST, TARGET, switch_step=2)
    return ProgressiveSelector(schedule, **({"maximum": 5} | options))


def test_the_budget_follows_the_steps_and_evaluation_what_was_trained():
    selector, batches = progressive(smoothing=0.5), torch.rand(4, 20, 6)
    expected = None
    for number, values in enumerate(batches):
        budget = FIRST if number < 2 else TARGET
        exact = select_exactly(values, budget)
        chosen = selector.select(inputs_of(values))
        assert torch.equal(chosen.keep, exact.keep)
        assert int(chosen.limit) == int(exact.limit)
        step(selector, (values, None))
        price = float(exact.price)
        # The first price of a budget is taken whole.
        expected = price if number in (0, 2) else (expected + price) / 2
        assert float(selector.price) == pytest.approx(expected)
        alone = selector.select(inputs_of(values, exact=False))
        frozen = select_at_price(values, budget, price=torch.tensor(expected))
        assert torch.equal(alone.keep, frozen.keep)
        assert selector.num_steps == number + 1


def test_a_resumed_schedule_goes_on_where_it_was():
    selector, other = progressive(), progressive()
    for values in torch.rand(3, 20, 6):
        step(selector, (values, None))
    other.load_state_dict(selector.state_dict())
    assert other.num_steps == 3
    assert other.budget_at(other.num_steps) == TARGET


def test_a_step_that_showed_nothing_counts():
    selector = progressive()
    for _ in range(3):
        selector.update()
    assert selector.num_steps == 3
    assert selector.price is None


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: TopPSelector(0.0, maximum=2), r"p must lie in \(0, 1\], got 0.0"),
        (lambda: TopPSelector(1.5, maximum=2), r"p must lie in \(0, 1\], got 1.5"),
        (lambda: TopPSelector(0.5, maximum=0, minimum=0), "got minimum 0 and maximum 0"),
        (lambda: TopPSelector(0.5, maximum=1, minimum=2), "got minimum 2 and maximum 1"),
        (lambda: ThresholdSelector(math.inf, maximum=2), "threshold must be a finite number"),
        (lambda: ThresholdSelector(math.nan, maximum=2), "threshold must be a finite number"),
        (lambda: ThresholdSelector(0.1, maximum=2, minimum=-1), "got minimum -1 and maximum 2"),
        (lambda: QuantileSelector(TARGET, smoothing=1.0), r"smoothing must lie in \[0, 1\), got 1"),
        (lambda: SequenceSelector(TARGET, smoothing=-0.5), r"smoothing must lie in \[0, 1\)"),
        (lambda: sparsification(FIRST, TARGET, switch_step=-1), "switch_step must be at least 0"),
        (lambda: progressive(maximum=4).budget_at(0), "within maximum = 4 .* got 5 at step 0"),
        (
            lambda: QuantileSelector(TARGET, num_experts=3).load_state_dict(
                {"thresholds": torch.zeros(1)}
            ),
            "must hold 3 thresholds, got 1; build it with as many",
        ),
    ],
)
def test_refusals(build, message):
    with pytest.raises(ValueError, match=message):
        build()


def test_a_budget_that_no_plan_meets_is_refused_when_made():
    with pytest.raises(InfeasibleBudgetError, match=r"average must be at most budget\.maximum"):
        layer_budgets([TokenBudget(minimum=1, maximum=2, average=3)])
