"""Selection under budgets: optimal, exact to one assignment, and causal at a frozen price."""

import itertools
import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import Bounds, LinearConstraint, milp

from drgr.budgets import TokenBudget, rank_experts, select_at_price, select_exactly
from drgr.collectives import rank

properties = settings(deadline=None, derandomize=True, max_examples=200)

# Averages above a whole number of experts, with what they mean exactly.
FRACTIONS = [
    (0.0, Fraction(0)),
    (0.3, Fraction(3, 10)),
    (0.7, Fraction(7, 10)),
    (1 / 3, Fraction(1, 3)),
    (0.9999999, Fraction(9999999, 10**7)),
    (1.0, Fraction(1)),
]


@st.composite
def problems(draw, values=("equal", "few", "distinct"), *, forbidden=True):
    """A batch of values, a budget, its meant average, and a padding mask or none."""
    num_tokens, num_experts = draw(st.integers(0, 14)), draw(st.integers(1, 8))
    maximum = draw(st.integers(1, num_experts))
    minimum = draw(st.integers(0, maximum))
    offset, meant = draw(st.sampled_from(FRACTIONS))
    whole = draw(st.integers(minimum, maximum))
    if whole + meant > maximum or whole + meant == 0:
        whole, offset, meant = maximum, 0.0, Fraction(0)
    budget = TokenBudget(minimum=minimum, maximum=maximum, average=whole + offset)
    batch = batch_of(
        draw(st.sampled_from(values)), num_tokens, num_experts, draw(st.integers(0, 99))
    )
    if forbidden and draw(st.booleans()):
        closed = torch.rand(batch.shape, generator=torch.Generator().manual_seed(7)) < 0.4
        batch = batch.masked_fill(closed, -torch.inf)
    mask = draw(st.none() | st.lists(st.booleans(), min_size=num_tokens, max_size=num_tokens))
    return batch, budget, whole + meant, None if mask is None else torch.tensor(mask).bool()


def batch_of(kind, num_tokens, num_experts, seed):
    """Values with ties everywhere, in many places, or nowhere; their sums are exact."""
    generator = torch.Generator().manual_seed(seed)
    size = num_tokens * num_experts
    if kind == "equal":
        flat = torch.full((size,), 0.25)
    elif kind == "few":
        flat = torch.randint(-2, 3, (size,), generator=generator) / 4
    else:
        flat = (torch.randperm(size, generator=generator) - size // 2) / 64
    return flat.float().reshape(num_tokens, num_experts)


def dense(selection, num_experts):
    """The plan as a mask (T, E)."""
    mask = torch.zeros(selection.keep.shape[0], num_experts, dtype=torch.bool)
    return mask.scatter_(1, selection.expert_ids, selection.keep)


def worth(values, mask):
    return float(values.double()[mask].sum())


def best_by_enumeration(values, budget, limit):
    """The largest total value over all plans that spend what can be spent."""
    options = []
    for row in values.tolist():
        permitted = [value for value in row if value > -math.inf]
        sizes = range(min(budget.minimum, len(permitted)), min(budget.maximum, len(permitted)) + 1)
        options.append([s for size in sizes for s in itertools.combinations(permitted, size)])
    spend = min(limit, sum(max(map(len, sets)) for sets in options))
    plans = itertools.product(*options)
    return max(sum(map(sum, plan)) for plan in plans if sum(map(len, plan)) == spend)


def best_by_integer_program(values, budget, limit):
    num_tokens, num_experts = values.shape
    per_token = np.kron(np.eye(num_tokens), np.ones(num_experts))
    spend = min(limit, budget.maximum * num_tokens)
    result = milp(
        -values.double().numpy().reshape(-1),
        constraints=[
            LinearConstraint(per_token, budget.minimum, budget.maximum),
            LinearConstraint(np.ones((1, values.numel())), spend, spend),
        ],
        integrality=np.ones(values.numel()),
        bounds=Bounds(0, 1),
    )
    assert result.success
    return -result.fun


class TestOptimum:
    @pytest.mark.parametrize("kind", ["equal", "few", "distinct", "forbidden"])
    @pytest.mark.parametrize(("minimum", "maximum"), [(0, 3), (1, 2), (1, 3), (2, 2), (0, 1)])
    @pytest.mark.parametrize("num_tokens", [1, 2, 4])
    def test_equals_the_best_of_all_plans(self, kind, minimum, maximum, num_tokens):
        for seed, offset in enumerate((0.1, 0.5, 0.75, 1.0)):
            average = minimum + offset * (maximum - minimum) if maximum > minimum else maximum
            budget = TokenBudget(minimum=minimum, maximum=maximum, average=average)
            values = batch_of("few" if kind == "forbidden" else kind, num_tokens, 3, seed)
            if kind == "forbidden":
                values = values.masked_fill(torch.rand(values.shape) < 0.4, -torch.inf)
            selection = select_exactly(values, budget)
            limit = math.floor(Fraction(str(average)) * num_tokens)
            assert int(selection.limit) == limit
            kept = dense(selection, 3)
            assert worth(values, kept) == best_by_enumeration(values, budget, limit)

    @pytest.mark.parametrize("kind", ["few", "distinct"])
    @pytest.mark.parametrize("average", [1.0, 1.3, 2.7, 4.0])
    def test_equals_an_integer_program(self, kind, average):
        budget = TokenBudget(minimum=1, maximum=4, average=average)
        for seed in range(3):
            values = batch_of(kind, 17, 6, seed)
            limit = math.floor(Fraction(str(average)) * 17)
            kept = dense(select_exactly(values, budget), 6)
            assert worth(values, kept) == pytest.approx(
                best_by_integer_program(values, budget, limit), abs=1e-9
            )


class TestExactSelection:
    @properties
    @given(problem=problems())
    def test_bounds_and_spend(self, problem):
        values, budget, meant, valid = problem
        selection = select_exactly(values, budget, valid=valid)
        real = torch.ones(values.shape[0], dtype=torch.bool) if valid is None else valid
        permitted = (values > -torch.inf).sum(dim=1) * real
        num_valid = int(real.sum())
        per_token = selection.keep.sum(dim=1)
        assert selection.keep.shape == (values.shape[0], budget.maximum)
        assert (per_token >= permitted.clamp_max(budget.minimum)).all()
        assert (per_token <= permitted.clamp_max(budget.maximum)).all()
        limit = num_valid * meant.numerator // meant.denominator
        assert int(selection.limit) == limit
        possible = int(permitted.clamp_max(budget.maximum).sum())
        assert int(selection.spend) == int(selection.keep.sum()) == min(limit, possible)

    @properties
    @given(problem=problems(forbidden=False))
    def test_without_forbidden_experts_all_is_spent(self, problem):
        values, budget, meant, _ = problem
        spend = int(select_exactly(values, budget).spend)
        assert spend == min(math.floor(meant * len(values)), budget.maximum * len(values))

    @properties
    @given(problem=problems())
    def test_rows_are_ranked_and_kept_from_the_front(self, problem):
        values, budget, _, valid = problem
        selection = select_exactly(values, budget, valid=valid)
        ranked = values.gather(1, selection.expert_ids)
        assert (ranked[:, :-1] >= ranked[:, 1:]).all()
        assert not (selection.keep[:, 1:] & ~selection.keep[:, :-1]).any()
        assert torch.isfinite(ranked[selection.keep]).all()
        if valid is not None:
            assert not selection.keep[~valid].any()
        for ids in selection.expert_ids.tolist():
            assert len(set(ids)) == len(ids)

    @properties
    @given(problem=problems(), seed=st.integers(0, 99))
    def test_padding_changes_nothing_for_the_others(self, problem, seed):
        values, budget, _, _ = problem
        order = torch.randperm(len(values) + 3, generator=torch.Generator().manual_seed(seed))
        place = order[: len(values)].sort().values
        padded = torch.full((len(values) + 3, values.shape[1]), 99.0)
        padded[place] = values
        valid = torch.zeros(len(padded), dtype=torch.bool)
        valid[place] = True
        plain, masked = select_exactly(values, budget), select_exactly(padded, budget, valid=valid)
        assert torch.equal(masked.keep[place], plain.keep)
        assert torch.equal(masked.expert_ids[place], plain.expert_ids)
        torch.testing.assert_close(masked.price, plain.price, rtol=0, atol=0, equal_nan=True)
        assert torch.equal(masked.limit, plain.limit)

    @properties
    @given(problem=problems(values=("distinct",)), seed=st.integers(0, 99))
    def test_the_order_of_tokens_is_irrelevant(self, problem, seed):
        values, budget, _, valid = problem
        order = torch.randperm(len(values), generator=torch.Generator().manual_seed(seed))
        plain = select_exactly(values, budget, valid=valid)
        moved = select_exactly(values[order], budget, valid=None if valid is None else valid[order])
        assert torch.equal(dense(moved, values.shape[1]), dense(plain, values.shape[1])[order])
        torch.testing.assert_close(moved.price, plain.price, rtol=0, atol=0, equal_nan=True)

    @properties
    @given(problem=problems(), more=st.integers(1, 40))
    def test_a_larger_budget_keeps_what_a_smaller_kept(self, problem, more):
        values, budget, _, valid = problem
        average = min(budget.maximum, budget.average + more / 10)
        larger = TokenBudget(minimum=budget.minimum, maximum=budget.maximum, average=average)
        small = select_exactly(values, budget, valid=valid).keep
        large = select_exactly(values, larger, valid=valid).keep
        assert not (small & ~large).any()

    @pytest.mark.parametrize("minimum", [1, 3])
    def test_an_average_at_the_maximum_is_plain_top_k(self, minimum):
        values = torch.randn(11, 7)
        budget = TokenBudget(minimum=minimum, maximum=3, average=3)
        top = torch.zeros_like(values).scatter_(1, values.topk(3).indices, 1.0).bool()
        assert torch.equal(dense(select_exactly(values, budget), 7), top)

    def test_an_average_at_the_minimum_is_plain_top_k(self):
        values = torch.randn(11, 7)
        budget = TokenBudget(minimum=2, maximum=5, average=2)
        top = torch.zeros_like(values).scatter_(1, values.topk(2).indices, 1.0).bool()
        assert torch.equal(dense(select_exactly(values, budget), 7), top)

    def test_ties_go_to_the_first_tokens_and_positions(self):
        budget = TokenBudget(minimum=1, maximum=3, average=1.75)
        keep = select_exactly(torch.full((4, 5), 0.5), budget).keep
        # Seven assignments: one each, then two extras for the first token and one for the second.
        assert keep.sum(dim=1).tolist() == [3, 2, 1, 1]

    def test_what_a_closed_token_cannot_use_goes_to_others(self):
        values = torch.tensor([[1.0, -torch.inf, -torch.inf], [0.3, 0.2, 0.1]])
        budget = TokenBudget(minimum=2, maximum=3, average=2)
        selection = select_exactly(values, budget)
        assert selection.keep.sum(dim=1).tolist() == [1, 3]

    def test_no_gradient_passes(self):
        values = torch.randn(5, 4, requires_grad=True)
        selection = select_exactly(values, TokenBudget(minimum=1, maximum=3, average=2))
        assert not selection.price.requires_grad

    def test_half_precision(self):
        values = torch.randn(40, 8).bfloat16()
        budget = TokenBudget(minimum=1, maximum=4, average=2.3)
        assert int(select_exactly(values, budget).spend) == 92


class TestPrice:
    @properties
    @given(problem=problems())
    def test_separates_kept_from_refused_extras(self, problem):
        values, budget, _, valid = problem
        selection = select_exactly(values, budget, valid=valid)
        extras = values.gather(1, selection.expert_ids)[:, budget.minimum :]
        keep = selection.keep[:, budget.minimum :]
        refused = torch.isfinite(extras) & ~keep
        if valid is not None:
            refused &= valid.unsqueeze(1)
        assert torch.isfinite(selection.price) == (keep.any() or refused.any())
        if keep.any():
            assert extras[keep].min() > selection.price or (
                refused.any() and extras[keep].min() == extras[refused].max() == selection.price
            )
        if refused.any():
            assert extras[refused].max() <= selection.price

    def test_is_the_middle_of_the_gap(self):
        values = torch.tensor([[4.0, 3.0], [2.0, 1.0]])
        budget = TokenBudget(minimum=0, maximum=2, average=1)
        assert float(select_exactly(values, budget).price) == 2.5

    def test_is_the_best_refused_where_nothing_is_kept(self):
        values = torch.tensor([[4.0, 3.0, 2.0], [2.0, 1.0, 0.0]])
        budget = TokenBudget(minimum=1, maximum=2, average=1.2)
        selection = select_exactly(values, budget)
        assert int(selection.spend) == 2
        assert float(selection.price) == 3.0

    def test_is_just_below_the_worst_kept_where_nothing_is_refused(self):
        values = torch.tensor([[4.0, 3.0, -torch.inf], [2.0, 1.0, -torch.inf]])
        budget = TokenBudget(minimum=1, maximum=3, average=2.5)
        exact = select_exactly(values, budget)
        below = torch.nextafter(torch.tensor(1.0), torch.tensor(0.0))
        assert torch.equal(exact.price, below)
        again = select_at_price(values, budget, price=exact.price)
        assert torch.equal(again.keep, exact.keep)

    @pytest.mark.parametrize("maximum", [1, 2])
    def test_is_not_a_number_where_there_is_nothing_to_choose(self, maximum):
        budget = TokenBudget(minimum=1, maximum=maximum, average=1)
        values = torch.full((3, 2), -torch.inf)
        assert torch.isnan(select_exactly(values, budget).price)

    def test_is_below_the_kept_value_between_neighbouring_floats(self):
        one = torch.tensor(1.0)
        low = torch.nextafter(one, torch.tensor(2.0))
        high = torch.nextafter(low, torch.tensor(2.0))
        for kept, refused in ((low, one), (high, low)):
            values = torch.stack([torch.stack([torch.tensor(5.0), v]) for v in (kept, refused)])
            budget = TokenBudget(minimum=1, maximum=2, average=1.5)
            selection = select_exactly(values, budget)
            assert selection.keep.tolist() == [[True, True], [True, False]]
            again = select_at_price(values, budget, price=selection.price)
            assert torch.equal(again.keep, selection.keep)


class TestFrozenPrice:
    @properties
    @given(problem=problems(values=("distinct",), forbidden=False))
    def test_its_own_price_reproduces_the_exact_plan(self, problem):
        values, budget, _, valid = problem
        exact = select_exactly(values, budget, valid=valid)
        frozen = select_at_price(values, budget, price=exact.price, valid=valid)
        assert torch.equal(frozen.keep, exact.keep)
        assert torch.equal(frozen.expert_ids, exact.expert_ids)
        assert torch.equal(frozen.spend, exact.spend)
        assert torch.equal(frozen.limit, exact.limit)

    @properties
    @given(problem=problems(), price=st.none() | st.floats(-1, 1, width=32))
    def test_a_token_decides_alone(self, problem, price):
        values, budget, _, valid = problem
        tensor = None if price is None else torch.tensor(price)
        together = select_at_price(values, budget, price=tensor, valid=valid)
        for token in range(len(values)):
            part = slice(token, token + 1)
            own = None if valid is None else valid[part]
            alone = select_at_price(values[part], budget, price=tensor, valid=own)
            assert torch.equal(alone.keep, together.keep[part])
            assert torch.equal(alone.expert_ids, together.expert_ids[part])

    @properties
    @given(problem=problems(), price=st.floats(-1, 1, width=32))
    def test_a_token_keeps_its_minimum_and_what_exceeds_the_price(self, problem, price):
        values, budget, _, valid = problem
        selection = select_at_price(values, budget, price=torch.tensor(price), valid=valid)
        rows = values.tolist()
        is_fixed = Fraction(budget.average) in (budget.minimum, budget.maximum)
        for token, row in enumerate(rows):
            ranked = sorted(row, reverse=True)[: budget.maximum]
            expected = [
                value > -math.inf and (place < budget.minimum or value > price)
                for place, value in enumerate(ranked)
            ]
            if is_fixed:
                expected = [
                    value > -math.inf and place < budget.average
                    for place, value in enumerate(ranked)
                ]
            if valid is not None and not valid[token]:
                expected = [False] * budget.maximum
            assert selection.keep[token].tolist() == expected
        assert int(selection.spend) == int(selection.keep.sum())
        num_valid = len(rows) if valid is None else int(valid.sum())
        assert int(selection.limit) == budget.total(num_valid)

    @pytest.mark.parametrize(("average", "expected"), [(1, 1), (2.3, 2), (3.999, 3), (4, 4)])
    def test_without_a_price_every_token_has_the_whole_part_of_the_average(self, average, expected):
        budget = TokenBudget(minimum=1, maximum=4, average=average)
        selection = select_at_price(torch.randn(9, 6), budget, price=None)
        assert (selection.keep.sum(dim=1) == expected).all()
        assert not selection.keep[:, expected:].any()
        assert torch.isnan(selection.price)

    def test_an_average_below_one_without_a_price_runs_nothing(self):
        budget = TokenBudget(minimum=0, maximum=4, average=0.7)
        assert int(select_at_price(torch.randn(9, 6), budget, price=None).spend) == 0

    @pytest.mark.parametrize("price", [-9.0, 9.0])
    def test_an_average_at_a_bound_is_kept_at_any_price(self, price):
        values = torch.randn(9, 6)
        for average in (2, 4):
            budget = TokenBudget(minimum=2, maximum=4, average=average)
            selection = select_at_price(values, budget, price=torch.tensor(price))
            assert (selection.keep.sum(dim=1) == average).all()

    def test_a_dear_batch_may_exceed_its_limit_and_says_so(self):
        budget = TokenBudget(minimum=1, maximum=4, average=2)
        selection = select_at_price(torch.ones(5, 6), budget, price=torch.tensor(0.5))
        assert int(selection.spend) == 20
        assert int(selection.limit) == 10
        assert float(selection.price) == 0.5


class TestRanking:
    def test_best_first(self):
        values, ids = rank_experts(torch.tensor([[0.1, 0.9, 0.5], [3.0, 2.0, 1.0]]), 2)
        assert ids.tolist() == [[1, 2], [0, 1]]
        torch.testing.assert_close(values, torch.tensor([[0.9, 0.5], [3.0, 2.0]]))

    @pytest.mark.parametrize("select", [select_exactly, select_at_price])
    def test_more_experts_than_there_are(self, select):
        budget = TokenBudget(minimum=1, maximum=4, average=2)
        options = {"price": None} if select is select_at_price else {}
        message = r"budget\.maximum must be at most the number of experts, got 4 for 3 experts"
        with pytest.raises(ValueError, match=message):
            select(torch.zeros(2, 3), budget, **options)


def shared_batches():
    """Batches with their budgets and masks, and the row at which rank 1 takes over."""
    cases = []
    for seed, kind in enumerate(["equal", "few", "distinct", "few", "distinct"]):
        values = batch_of(kind, 23, 6, seed)
        if seed == 3:
            values = values.masked_fill(batch_of("distinct", 23, 6, 9) > 0.4, -torch.inf)
        for average, minimum, maximum in (
            (2.3, 1, 4),
            (0.7, 0, 2),
            (2, 2, 2),
            (3, 1, 3),
            (1, 1, 2),
        ):
            budget = TokenBudget(minimum=minimum, maximum=maximum, average=average)
            mask = batch_of("distinct", 23, 1, seed)[:, 0] > 0.05
            cases += [(values, budget, None, 9), (values, budget, mask, 9 if seed % 2 else 23)]
    return cases


def select_own_share():
    results = []
    for values, budget, valid, cut in shared_batches():
        part = slice(0, cut) if rank() == 0 else slice(cut, None)
        own = None if valid is None else valid[part]
        selection = select_exactly(values[part], budget, valid=own)
        results.append(
            (
                selection.expert_ids,
                selection.keep,
                selection.spend,
                selection.limit,
                selection.price,
            )
        )
    return results


def test_two_processes_find_the_plan_of_one(run_processes):
    shares = run_processes(select_own_share, 2)
    for case, *own in zip(shared_batches(), *shares, strict=True):
        values, budget, valid, _ = case
        whole = select_exactly(values, budget, valid=valid)
        assert torch.equal(torch.cat([share[0] for share in own]), whole.expert_ids)
        assert torch.equal(torch.cat([share[1] for share in own]), whole.keep)
        for share in own:
            assert torch.equal(share[2], whole.spend)
            assert torch.equal(share[3], whole.limit)
            torch.testing.assert_close(share[4], whole.price, rtol=0, atol=0, equal_nan=True)
