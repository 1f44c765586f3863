"""From a loss of gates to a choice with its certificate."""

import itertools
import re

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from drgr.budgets.static import SearchSettings, allocate_experts
from drgr.budgets.static import allocation as module
from drgr.budgets.static.choices import ChoiceBudgets
from drgr.budgets.static.relaxation import relax
from drgr.budgets.static.search import mean_entropy
from drgr.errors import InfeasibleBudgetError, NonFiniteLossError
from drgr.numerics import Status

INF = torch.inf
SHORT = SearchSettings(num_steps=25, num_samples=2, learning_rate=0.3)
FAST = SearchSettings(num_steps=80, learning_rate=0.2)


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def linear(worth):
    return lambda gates: -(worth * gates).sum()


def choices_inside(costs, limits, exactly):
    """Every choice inside the budgets, as one-hot gates."""
    _, num_items, num_options = costs.shape
    for options in itertools.product(range(num_options), repeat=num_items):
        spend = costs[:, range(num_items), options].sum(dim=1)
        if bool((spend == limits).all() if exactly else (spend <= limits).all()):
            yield torch.nn.functional.one_hot(torch.tensor(options), num_options).double()


class TestPlanted:
    @pytest.mark.parametrize("exactly", [False, True])
    def test_a_linear_loss_ends_at_the_optimum_and_proves_it(self, exactly):
        worth = torch.rand(10, 3, generator=rng(1)).double().cumsum(dim=1)
        costs = torch.randint(0, 5, (10, 3), generator=rng(2)).cumsum(dim=1)
        found = allocate_experts(
            linear(worth), costs, 40, generator=rng(), exactly=exactly, settings=FAST
        )
        certificate = found.certificate
        assert certificate.status is Status.CONVERGED
        assert certificate.gap == pytest.approx(0, abs=1e-9)
        assert certificate.spend.item() == 40 if exactly else certificate.spend.item() <= 40
        picked = worth[range(10), found.options].sum().item()
        assert certificate.loss == pytest.approx(-picked)

    def test_items_that_only_work_together_are_found(self):
        """Worth of pairs: taken alone each item looks like any other."""
        partner = torch.tensor([5, 3, 7, 1, 6, 0, 4, 2])
        strength = torch.tensor([3.0, 1.0, 1.0, 1.0, 0.5, 3.0, 0.5, 1.0]).double()

        def loss(gates):
            kept = gates[:, 1]
            return -(strength * kept * kept[partner]).sum()

        costs = torch.tensor([[0, 1]]).expand(8, 2)
        found = allocate_experts(loss, costs, 2, generator=rng(), exactly=True, settings=FAST)
        assert found.options.nonzero().flatten().tolist() == [0, 5]

    def test_counts_of_layers(self):
        """Items are layers, options are counts; what a layer gains falls with its count."""
        gain = torch.tensor([4.0, 1.0, 9.0, 0.2]).double()
        counts = torch.arange(1, 7)
        worth = gain.unsqueeze(1) * (1 - 0.5 ** counts.double())
        costs = counts.expand(4, 6)
        found = allocate_experts(linear(worth), costs, 12, generator=rng(), settings=FAST)
        inside = choices_inside(costs.unsqueeze(0), torch.tensor([12]), exactly=False)
        best = max((worth * gates).sum().item() for gates in inside)
        assert -found.certificate.loss == pytest.approx(best)
        assert found.certificate.spend.item() == 12

    def test_several_budgets_at_once(self):
        worth = torch.rand(8, 3, generator=rng(3)).double().cumsum(dim=1)
        costs = torch.randint(0, 4, (2, 8, 3), generator=rng(4)).cumsum(dim=2)
        limits = costs.sum(dim=(1, 2)) // 4
        found = allocate_experts(linear(worth), costs, limits, generator=rng(), settings=FAST)
        best = max(
            (worth * gates).sum().item() for gates in choices_inside(costs, limits, exactly=False)
        )
        assert (found.certificate.spend <= limits).all()
        assert -found.certificate.loss >= 0.98 * best
        assert found.certificate.lower_bound == pytest.approx(-best)

    def test_what_a_limit_leaves_over_need_not_be_spent(self):
        """Three of six items do harm; the limit would pay for all but one."""
        worth = torch.tensor([1.0, -1.0, 2.0, -2.0, 0.5, -0.5]).double()
        worth = torch.stack([torch.zeros(6).double(), worth], dim=1)
        costs = torch.tensor([[0, 1]]).expand(6, 2)
        free = allocate_experts(linear(worth), costs, 5, generator=rng(), settings=FAST)
        assert free.options.tolist() == [1, 0, 1, 0, 1, 0]
        forced = allocate_experts(
            linear(worth), costs, 5, generator=rng(), exactly=True, settings=FAST
        )
        assert forced.options.tolist() == [1, 1, 1, 0, 1, 1]


class TestCertificate:
    @settings(deadline=None, derandomize=True, max_examples=12)
    @given(seed=st.integers(0, 10**6), exactly=st.booleans())
    def test_the_bound_holds_for_every_choice_of_a_convex_loss(self, seed, exactly):
        draw = np.random.default_rng(seed)
        matrix = torch.from_numpy(draw.normal(size=(6, 12)))
        target = torch.from_numpy(draw.normal(size=6))
        costs = torch.from_numpy(draw.integers(0, 4, (1, 4, 3)))
        rows = torch.from_numpy(draw.integers(0, 3, 4))
        limits = costs[0, range(4), rows].sum().view(1)

        def loss(gates):
            return (matrix @ gates.flatten() - target).square().sum()

        found = allocate_experts(
            loss, costs, limits, generator=rng(seed), exactly=exactly, settings=SHORT
        )
        certificate = found.certificate
        values = [loss(gates).item() for gates in choices_inside(costs, limits, exactly)]
        assert certificate.lower_bound <= min(values) + 1e-9
        assert certificate.loss >= min(values) - 1e-9
        assert certificate.gap == certificate.loss - certificate.lower_bound
        assert certificate.relaxed_loss == pytest.approx(loss(found.probabilities).item())
        assert certificate.residual <= 1e-10

    def test_every_sampled_gate_is_whole_and_inside(self):
        costs = torch.randint(0, 5, (6, 3), generator=rng(5))
        seen = []

        def loss(gates):
            seen.append(gates.detach().clone())
            return gates.square().sum() + gates[:, 0].sum()

        found = allocate_experts(loss, costs, 12, generator=rng(), settings=SHORT)
        assert len(found.losses) == 25
        assert len(seen) in (25 * 2 + 2, 25 * 2 + 3)
        for gates in seen[:-1]:
            assert set(gates.unique().tolist()) <= {0.0, 1.0}
            assert gates.sum(dim=1).eq(1).all()
            assert (gates * costs).sum() <= 12
        assert seen[-1].equal(found.probabilities)

    def test_repeats_with_its_generator(self):
        worth = torch.rand(6, 2).double()
        costs = torch.tensor([[0, 1]]).expand(6, 2)
        first, again, other = (
            allocate_experts(linear(worth), costs, 3, generator=rng(s), settings=SHORT)
            for s in (0, 0, 1)
        )
        assert first.probabilities.equal(again.probabilities)
        assert not first.probabilities.equal(other.probabilities)

    def test_a_retraction_that_fails_ends_the_search_and_is_reported(self, monkeypatch):
        from drgr.budgets.static import optimizer, retract

        calls = []

        def failing(logits, budgets):
            calls.append(logits)
            return retract(logits, budgets, max_steps=1 if len(calls) > 3 else 200)

        monkeypatch.setattr(optimizer, "retract", failing)
        costs = torch.randint(0, 5, (2, 6, 3), generator=rng(5))
        found = allocate_experts(
            lambda gates: gates[:, 2].sum(), costs, costs.sum(dim=(1, 2)) / 3, generator=rng()
        )
        assert found.certificate.status is Status.MAX_STEPS
        assert len(found.losses) == 3
        assert found.certificate.residual > 1e-9
        assert (found.certificate.spend <= found.certificate.limits).all()

    def test_any_learning_rate_ends_inside_and_says_how(self):
        costs = torch.randint(0, 5, (2, 6, 3), generator=rng(6))
        wild = SearchSettings(num_steps=20, learning_rate=1e3, num_samples=2)
        found = allocate_experts(
            lambda gates: gates[:, 2].sum(),
            costs,
            costs.sum(dim=(1, 2)) / 3,
            generator=rng(),
            settings=wild,
        )
        assert (found.certificate.spend <= found.certificate.limits).all()
        assert (found.certificate.residual <= 1e-10) == found.certificate.status.succeeded
        assert found.probabilities.isfinite().all()


class TestExtremes:
    WORTH = torch.tensor([[0.0, 1.0, 3.0], [0.0, 2.0, 2.5], [0.0, -1.0, 4.0]]).double()
    COSTS = torch.tensor([[0, 1, 2], [1, 2, 4], [0, 3, 3]])

    @pytest.mark.parametrize("exactly", [False, True])
    @pytest.mark.parametrize(("limit", "options"), [(1, [0, 0, 0]), (9, [2, 2, 2])])
    def test_limits_at_the_ends_decide_everything(self, exactly, limit, options):
        found = allocate_experts(
            linear(self.WORTH),
            self.COSTS,
            limit,
            generator=rng(),
            exactly=exactly,
            settings=SearchSettings(num_steps=60),
        )
        assert found.options.tolist() == options
        assert found.certificate.spend.item() == limit
        assert found.certificate.status is Status.CONVERGED
        assert found.certificate.residual == 0

    def test_a_limit_beyond_everything_is_no_limit(self):
        found = allocate_experts(
            linear(self.WORTH), self.COSTS, 1000, generator=rng(), settings=FAST
        )
        assert found.options.tolist() == [2, 2, 2]

    def test_one_item_of_one_option(self):
        def loss(gates):
            return gates.sum()

        found = allocate_experts(
            loss, torch.tensor([[3]]), 3, generator=rng(), exactly=True, settings=FAST
        )
        assert found.options.tolist() == [0]
        assert found.certificate.loss == found.certificate.lower_bound == 1.0

    def test_one_item_of_two_options(self):
        worth = torch.tensor([[0.0, 1.0]]).double()
        costs = torch.tensor([[0, 2]])
        for limit, option in ((1, 0), (2, 1)):
            found = allocate_experts(linear(worth), costs, limit, generator=rng(), settings=FAST)
            assert found.options.tolist() == [option]

    def test_equal_costs_leave_only_the_worth(self):
        found = allocate_experts(
            linear(self.WORTH), torch.full((3, 3), 7), 21, generator=rng(), exactly=True
        )
        assert found.options.tolist() == [2, 2, 2]
        assert found.certificate.spend.item() == 21

    def test_a_forbidden_option_is_never_taken(self):
        prior = torch.zeros(3, 3)
        prior[2, 2] = -INF
        found = allocate_experts(
            linear(self.WORTH), self.COSTS, 9, generator=rng(), prior=prior, settings=FAST
        )
        assert found.options.tolist() == [2, 2, 0]
        assert found.probabilities[2, 2] == 0
        assert found.certificate.gap == pytest.approx(0, abs=1e-9)

    def test_a_prior_is_where_the_search_begins(self):
        worth = torch.zeros(4, 2).double()
        prior = torch.tensor([[0.0, 9.0], [0.0, -9.0], [0.0, 9.0], [0.0, -9.0]])
        found = allocate_experts(
            lambda gates: (worth * gates).sum(),
            torch.tensor([[0, 1]]).expand(4, 2),
            2,
            generator=rng(),
            exactly=True,
            prior=prior,
            settings=SHORT,
        )
        assert found.options.tolist() == [1, 0, 1, 0]
        assert found.certificate.decided == 1.0


class TestRelaxation:
    def test_a_decided_budget_decides_others(self):
        """The first leaves item 0 one option, after which the second has nothing left to spend."""
        costs = torch.tensor([[[0, 1], [0, 0]], [[0, 2], [0, 3]]]).double()
        found = relax(
            torch.zeros(2, 2), ChoiceBudgets(costs, torch.tensor([1.0, 2.0])), exactly=True
        )
        assert found.budgets is None
        assert found.logits.tolist() == [[-INF, 0.0], [0.0, -INF]]

    def test_an_open_limit_gets_an_item_for_what_is_left(self):
        costs = torch.tensor([[[1, 2], [0, 4]], [[0, 1], [0, 1]]]).double()
        found = relax(
            torch.zeros(2, 2), ChoiceBudgets(costs, torch.tensor([3.0, 5.0])), exactly=False
        )
        assert found.kept == (0,)
        assert found.logits.shape == (3, 2)
        assert found.budgets.costs[0, 2].tolist() == [0.0, 2.0]
        assert found.budgets.limits.tolist() == [3.0]

    def test_an_exact_limit_does_not(self):
        costs = torch.tensor([[1.0, 2.0], [0.0, 4.0]])
        found = relax(torch.zeros(2, 2), ChoiceBudgets(costs, 3.0), exactly=True)
        assert found.logits.shape == (2, 2)


class TestSettings:
    def test_temperatures_fall_exponentially(self):
        found = [SearchSettings(num_steps=3).temperature(step) for step in range(3)]
        assert found == pytest.approx([1.0, 0.05**0.5, 0.05])
        assert SearchSettings(num_steps=1).temperature(0) == 1.0

    def test_entropy_is_that_of_the_definition(self):
        logits = torch.tensor([[0.0, 1.0, -INF], [0.3, 0.2, 0.1]], requires_grad=True)
        p = np.exp([0.0, 1.0]) / np.exp([0.0, 1.0]).sum()
        q = np.exp([0.3, 0.2, 0.1]) / np.exp([0.3, 0.2, 0.1]).sum()
        expected = -((p * np.log(p)).sum() + (q * np.log(q)).sum()) / 2
        entropy = mean_entropy(logits)
        assert entropy.item() == pytest.approx(expected, rel=1e-6)
        entropy.backward()
        assert logits.grad.isfinite().all()

    def test_a_weight_of_entropy_decides_sooner(self):
        costs = torch.tensor([[0, 1]]).expand(6, 2)
        found = [
            allocate_experts(
                linear(torch.linspace(0, 0.01, 12).view(6, 2).double()),
                costs,
                3,
                generator=rng(),
                settings=SearchSettings(num_steps=40, entropy_weight=weight),
            )
            for weight in (0.0, 10.0)
        ]
        soft, hard = (mean_entropy(f.probabilities.log()).item() for f in found)
        assert hard < 0.5 * soft

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"num_steps": 0}, "num_steps must be a finite number above 0, got 0"),
            ({"learning_rate": -1.0}, "learning_rate must be a finite number above 0, got -1"),
            ({"last_temperature": 0.0}, "last_temperature must be a finite number above 0"),
            ({"num_samples": 0}, "num_samples must be a finite number above 0, got 0"),
            ({"entropy_weight": -1.0}, "entropy_weight must be a finite number of at least 0"),
            ({"first_temperature": 0.01}, "at least last_temperature, 0.05, got 0.01; noise must"),
            ({"first_temperature": INF}, "first_temperature must be finite"),
            ({"num_samples": 3}, "num_samples must be even where antithetic, got 3; take 4"),
        ],
    )
    def test_refuse(self, change, message):
        with pytest.raises(ValueError, match=re.escape(message)):
            SearchSettings(**change)


class TestRefusals:
    COSTS = torch.tensor([[0, 1], [0, 1]])

    @pytest.mark.parametrize(
        ("loss", "error", "message"),
        [
            (lambda gates: gates, ValueError, "must return a scalar, got shape (2, 2); take the"),
            (lambda gates: gates.sum() * INF, NonFiniteLossError, "a finite loss, got inf; check"),
            (lambda gates: gates.detach().sum(), ValueError, "must be differentiable in the gates"),
            (
                lambda _: torch.ones(1, requires_grad=True).sum(),
                ValueError,
                "must depend on the gates, got a loss that uses other variables only",
            ),
        ],
    )
    def test_of_losses(self, loss, error, message):
        with pytest.raises(error, match=re.escape(message)):
            allocate_experts(loss, self.COSTS, 1, generator=rng(), settings=FAST)

    def test_of_budgets_before_any_loss_is_paid_for(self):
        def loss(gates):
            pytest.fail("the loss was evaluated")

        with pytest.raises(InfeasibleBudgetError, match="what some allowed choice costs"):
            allocate_experts(
                loss,
                torch.tensor([[0, 2], [0, 3]]),
                4,
                generator=rng(),
                exactly=True,
                settings=FAST,
            )

    def test_of_priors(self):
        with pytest.raises(ValueError, match=re.escape("logits must have the shape (N, K)")):
            allocate_experts(
                linear(torch.zeros(2, 2)), self.COSTS, 1, generator=rng(), prior=torch.zeros(3, 2)
            )

    def test_the_module_has_the_published_defaults(self):
        assert SearchSettings() == module._DEFAULT
        published = (200, 0.1, 1.0, 0.05, 4, True, 0.0)
        assert (
            tuple(getattr(SearchSettings(), name) for name in SearchSettings.__slots__) == published
        )
