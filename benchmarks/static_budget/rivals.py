"""Other ways to choose a set inside a budget; each sees the same loss of gates."""

from collections.abc import Callable

import torch
from torch import Tensor

from drgr.budgets.static import ChoiceKnapsack

Loss = Callable[[Tensor], Tensor]


class CountedLoss:
    """A loss of gates that counts its evaluations."""

    def __init__(self, loss: Loss) -> None:
        self.loss, self.count = loss, 0

    def __call__(self, gates: Tensor) -> Tensor:
        self.count += 1
        return self.loss(gates)


def largest(worth: Tensor, costs: Tensor, limit: int) -> Tensor:
    """Returns the set of most worth inside the budget, exactly; for magnitudes, use, slopes."""
    values = torch.stack([torch.zeros_like(worth.flatten()), worth.flatten()], dim=1)
    prices = torch.stack([torch.zeros_like(costs.flatten()), costs.flatten()], dim=1)
    options = ChoiceKnapsack(prices, limit).best(values).options
    return (options == 1).view(costs.shape)


def first_order(loss: Loss, costs: Tensor, limit: int) -> Tensor:
    """Keeps what the slope of the loss at the whole model says is worth most."""
    gates = torch.ones(costs.shape, dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(loss(gates), gates)
    return largest(-slope, costs, limit)


def greedy_removal(loss: Loss, costs: Tensor, limit: int) -> Tensor:
    """Drops, one by one, what raises the loss least for each unit of cost."""
    kept = torch.ones(costs.shape, dtype=torch.float64)
    while (kept * costs).sum() > limit:
        before = loss(kept).item()
        rises = {
            index: (_changed(loss, kept, index) - before) / costs[index].item()
            for index in map(tuple, kept.nonzero().tolist())
        }
        kept[min(rises, key=lambda index: rises[index])] = 0.0
    return kept.bool()


def greedy_addition(loss: Loss, costs: Tensor, limit: int) -> Tensor:
    """Adds, one by one, what lowers the loss most for each unit of cost, while the budget pays."""
    kept = torch.zeros(costs.shape, dtype=torch.float64)
    while True:
        room = limit - (kept * costs).sum()
        fitting = [tuple(i) for i in ((kept == 0) & (costs <= room)).nonzero().tolist()]
        if not fitting:
            return kept.bool()
        before = loss(kept).item()
        falls = {i: (before - _changed(loss, kept, i)) / costs[i].item() for i in fitting}
        best = max(falls, key=lambda index: falls[index])
        if falls[best] <= 0:
            return kept.bool()
        kept[best] = 1.0


def penalty(loss: Loss, costs: Tensor, limit: int, num_steps: int) -> Tensor:
    """Trains soft gates with a growing penalty on the budget, then keeps the best that fit."""
    logits = torch.zeros(costs.shape, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.Adam([logits], lr=0.05)
    scale = loss(torch.zeros(costs.shape, dtype=torch.float64)).abs().item()
    for step in range(num_steps):
        gates = torch.sigmoid(logits)
        over = (gates * costs).sum() / limit - 1
        weight = scale * 10.0 ** (-1 + 3 * step / num_steps)
        optimizer.zero_grad()
        (loss(gates) + weight * over.square()).backward()
        optimizer.step()
    return largest(logits.detach(), costs, limit)


def random_search(
    loss: Loss, costs: Tensor, limit: int, num_tries: int, generator: torch.Generator
) -> Tensor:
    """Keeps the best of random sets that fill the budget."""
    best, lowest = torch.zeros(costs.shape, dtype=torch.bool), float("inf")
    for _ in range(num_tries):
        worth = torch.rand(costs.shape, dtype=torch.float64, generator=generator)
        kept = largest(worth, costs, limit)
        value = loss(kept.double()).item()
        if value < lowest:
            best, lowest = kept, value
    return best


def _changed(loss: Loss, kept: Tensor, index: tuple[int, ...]) -> float:
    trial = kept.clone()
    trial[index] = 1.0 - trial[index]
    return loss(trial).item()
