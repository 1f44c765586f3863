"""The kit finds what it promises to find: each check fails on a method that breaks its promise."""

from dataclasses import replace

import pytest
import torch

from drgr.budgets import TokenBudget
from drgr.routing import SignBias
from drgr.routing.losses.terms import router_z_term
from drgr.routing.scores import RouterScores, Scorer, SoftmaxScores
from drgr.routing.selection import BudgetedSelector
from drgr.testing import (
    ConformanceError,
    check_controller,
    check_loss,
    check_scorer,
    check_selector,
)

BUDGET = TokenBudget(minimum=1, maximum=4, average=2.3)


class Broken:
    """Hands everything on to a controller or a selector, for a subclass to break one thing."""

    def __init__(self, whole):
        self.whole = whole

    def __getattr__(self, name):
        return getattr(self.whole, name)


class NotCentred(Broken):
    @property
    def prices(self):
        return self.whole.prices + 0.1


class CountsPadding(Broken):
    def observe(self, routing):
        scores = routing.scores
        load = scores.topk(2, dim=1).indices.flatten().bincount(minlength=scores.shape[1])
        self.load = getattr(self, "load", 0) + load
        self.whole.observe(routing)

    def update(self, group=None):
        self.whole._prices = self.whole._prices + 1e-3 * (self.load - self.load.float().mean())
        self.load = 0
        self.whole.update(group)


class ForgetsMicroBatches(Broken):
    def observe(self, routing):
        self.last = routing

    def update(self, group=None):
        if hasattr(self, "last"):
            self.whole.observe(self.last)
        self.whole.update(group)


class PrefersTheFirst(Broken):
    def update(self, group=None):
        self.whole.update(group)
        self.whole._prices = self.whole._prices - torch.linspace(0.1, -0.1, 8)


class Backwards(Broken):
    def update(self, group=None):
        before = self.whole._prices
        self.whole.update(group)
        self.whole._prices = 2 * before - self.whole._prices


class TakesAnyState(Broken):
    def load_state_dict(self, state):
        if "prices" in state:
            self.whole.load_state_dict(state)


@pytest.mark.parametrize(
    ("broken", "promise"),
    [
        (NotCentred, "with mean zero"),
        (CountsPadding, "padding moves no price"),
        (ForgetsMicroBatches, "a step in micro-batches"),
        (PrefersTheFirst, "experts in another order"),
        (Backwards, "more even"),
        (TakesAnyState, "the state of another kind is refused"),
    ],
)
def test_broken_controllers_are_found(broken, promise):
    with pytest.raises(ConformanceError, match=promise):
        check_controller(lambda n, device: broken(SignBias(n, device=device)))


def scaled(layer):
    return 2 * router_z_term(layer)


def with_padding(layer):
    return layer.logits.nan_to_num().logsumexp(dim=1).square().mean()


def without_gradient(layer):
    return router_z_term(layer).detach() + 0 * layer.logits.nan_to_num().sum()


def first_expert(layer):
    rows = layer.logits if layer.valid is None else layer.logits[layer.valid]
    return rows[:, 0].double().square().sum() / max(len(rows), 1)


def wrong_gradient(layer):
    value = router_z_term(layer)
    return value.detach() + 0.5 * (value - value.detach())


def in_half(layer):
    return router_z_term(layer).to(layer.logits.dtype)


@pytest.mark.parametrize(
    ("broken", "promise"),
    [
        (with_padding, "padding"),
        (without_gradient, "it is zero"),
        (wrong_gradient, "the gradient with respect to the logits"),
        (first_expert, "experts in another order"),
        (in_half, "float32 at least"),
    ],
)
def test_broken_losses_are_found(broken, promise):
    check_loss(scaled)
    with pytest.raises(ConformanceError, match=promise):
        check_loss(broken)


class Negative(Scorer):
    def forward(self, hidden, weight):
        logits = hidden.float() @ weight.float().T
        return RouterScores(scores=logits, logits=logits, selectable=logits.detach())


class Noisy(Scorer):
    def forward(self, hidden, weight):
        logits = hidden @ weight.T + torch.randn(len(hidden), len(weight))
        scores = logits.float().softmax(dim=1)
        return RouterScores(scores=scores, logits=logits.float(), selectable=scores.detach())


class Detached(Scorer):
    def forward(self, hidden, weight):
        logits = (hidden.detach() @ weight.T).to(torch.promote_types(hidden.dtype, torch.float32))
        scores = logits.softmax(dim=1)
        return RouterScores(scores=scores, logits=logits, selectable=scores.detach())


class OverTheBatch(Scorer):
    def forward(self, hidden, weight):
        logits = (hidden @ weight.T).to(torch.promote_types(hidden.dtype, torch.float32))
        scores = logits.softmax(dim=0)
        return RouterScores(scores=scores, logits=logits, selectable=scores.detach())


class WithBias(Scorer):
    def forward(self, hidden, weight):
        logits = (hidden @ weight.T).to(torch.promote_types(hidden.dtype, torch.float32))
        scores = (logits + torch.arange(len(weight))).softmax(dim=1)
        return RouterScores(scores=scores, logits=logits, selectable=scores.detach())


@pytest.mark.parametrize(
    ("broken", "promise"),
    [
        (Negative, "not negative"),
        (Noisy, "draws no random number|gradients"),
        (Detached, "gradients of the combine weights"),
        (OverTheBatch, "depend on no other token"),
        (WithBias, "experts in another order"),
    ],
)
def test_broken_scorers_are_found(broken, promise):
    check_scorer(lambda _: SoftmaxScores())
    with pytest.raises(ConformanceError, match=promise):
        check_scorer(lambda _: broken())


class ExactAtEvaluation(Broken):
    def select(self, inputs):
        return self.whole.select(replace(inputs, exact=True))


class KeepsPadding(Broken):
    def select(self, inputs):
        return self.whole.select(replace(inputs, valid=None))


class IgnoresWorth(Broken):
    def select(self, inputs):
        return self.whole.select(replace(inputs, values=inputs.scores))


class NoRefusal(Broken):
    def load_state_dict(self, state):
        if "price" in state:
            self.whole.load_state_dict(state)


@pytest.mark.parametrize(
    ("broken", "promise"),
    [
        (ExactAtEvaluation, "depend on no other token"),
        (KeepsPadding, "padding gets no expert"),
        (IgnoresWorth, "worth -inf never runs"),
        (NoRefusal, "the state of another kind is refused"),
    ],
)
def test_broken_selectors_are_found(broken, promise):
    check_selector(lambda _: BudgetedSelector(BUDGET))
    with pytest.raises(ConformanceError, match=promise):
        check_selector(lambda _: broken(BudgetedSelector(BUDGET)))
