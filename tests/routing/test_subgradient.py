"""Decaying subgradient steps by hand, and against the optimum of the assignment by HiGHS."""

import numpy as np
import pytest
import torch
from scipy.optimize import linprog

from drgr.routing import DecayingSubgradient


def record_with_load(route, load):
    experts = [expert for expert, count in enumerate(load) for _ in range(count)]
    scores = torch.nn.functional.one_hot(torch.tensor(experts), len(load)).float()
    return route(scores, budget=1)


@pytest.mark.parametrize("decay", [0, 0.5, 1])
def test_steps_by_hand(route, decay):
    controller = DecayingSubgradient(3, step_size=0.3, decay=decay)
    controller.observe(record_with_load(route, [3, 1, 2]))
    controller.update()
    first = torch.tensor([0.15, -0.15, 0.0])
    torch.testing.assert_close(controller.prices, first)
    # A step that saw nothing does not count.
    controller.update()
    controller.observe(record_with_load(route, [4, 1, 1]))
    controller.update()
    second = torch.tensor([0.3, -0.15, -0.15]) * 2**-decay
    torch.testing.assert_close(controller.prices, first + second)


def test_a_target_by_hand(route):
    controller = DecayingSubgradient(3, step_size=0.1, target=[1, 1, 2])
    controller.observe(record_with_load(route, [4, 0, 4]))
    controller.update()
    # Shares 1/2, 0, 1/2 against 1/4, 1/4, 1/2, in units of the mean load.
    torch.testing.assert_close(controller.prices, torch.tensor([0.075, -0.075, 0.0]))


def optimum(scores, top_k, loads):
    """Value of the best assignment with exact rows and columns, by HiGHS."""
    tokens, experts = scores.shape
    by_token = np.kron(np.eye(tokens), np.ones(experts))
    by_expert = np.kron(np.ones(tokens), np.eye(experts))
    solution = linprog(
        -scores.numpy().ravel(),
        A_eq=np.vstack([by_token, by_expert]),
        b_eq=np.concatenate([np.full(tokens, top_k), loads]),
        bounds=(0, 1),
        method="highs",
    )
    assert solution.status == 0
    return -solution.fun


@pytest.mark.parametrize("target", [None, [1, 2, 1, 4]])
@pytest.mark.parametrize("decay", [0.5, 1])
def test_reaches_the_dual_optimum(route, skewed_scores, decay, target):
    scores = skewed_scores(64, 4, skew=1.0)
    shares = np.array(target or [1, 1, 1, 1])
    loads = 64 * 2 * shares / shares.sum() if target is None else 64 * shares / shares.sum()
    top_k = 2 if target is None else 1
    best = optimum(scores.double(), top_k, loads)
    controller = DecayingSubgradient(4, step_size=0.2, decay=decay, target=target)
    values = []
    for _ in range(300):
        record = route(scores, budget=top_k, prices=controller.prices)
        worth = (scores - controller.prices).double().topk(top_k, dim=1).values.sum()
        values.append(float(worth + (controller.prices.double() * torch.tensor(loads)).sum()))
        controller.observe(record)
        controller.update()
    # Weak duality: the dual is never below the optimum of the assignment.
    assert min(values) >= best - 1e-4
    assert values[0] > best + 0.5
    assert values[-1] <= best + 0.02


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"step_size": 0}, "step_size must be a finite number above 0"),
        ({"decay": 1.5}, r"decay must lie in \[0, 1\], got 1.5"),
        ({"decay": float("nan")}, r"decay must lie in \[0, 1\]"),
    ],
)
def test_refusals(settings, message):
    with pytest.raises(ValueError, match=message):
        DecayingSubgradient(4, **settings)
