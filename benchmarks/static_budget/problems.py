"""Sets to find: one that was planted, one under unequal costs, and experts of a trained model."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F


@dataclass(frozen=True, slots=True, kw_only=True)
class PruningProblem:
    """A loss of gates with costs, a limit, and what is known of the answer."""

    loss: Callable[[Tensor], Tensor]
    costs: Tensor
    limit: int
    magnitude: Tensor
    """What a method that only looks at size or use ranks by, in the shape of the costs."""
    planted: Tensor | None = None


def planted_sum(num_experts: int, num_planted: int, seed: int) -> PruningProblem:
    """The target is the sum of some experts; the loudest are decoys, and all share a part.

    The shared part makes experts stand in for each other, which misleads a greedy choice; the
    planted set alone has loss 0.
    """
    draw = torch.Generator().manual_seed(seed)
    own = torch.randn(num_experts, 256, generator=draw, dtype=torch.float64)
    common = torch.randn(4, 256, generator=draw, dtype=torch.float64)
    mixing = torch.randn(num_experts, 4, generator=draw, dtype=torch.float64)
    outputs = own + mixing @ common
    is_planted = torch.zeros(num_experts, dtype=torch.bool)
    is_planted[torch.randperm(num_experts, generator=draw)[:num_planted]] = True
    outputs[~is_planted] *= 1.5
    target = outputs[is_planted].sum(dim=0)
    return PruningProblem(
        loss=lambda gates: (gates.flatten() @ outputs - target).square().mean(),
        costs=torch.ones(1, num_experts, dtype=torch.int64),
        limit=num_planted,
        magnitude=outputs.norm(dim=1).view(1, -1),
        planted=is_planted.view(1, -1),
    )


def unequal_costs(num_experts: int, seed: int) -> PruningProblem:
    """Experts of sizes 1 to 8 approximate their own sum inside 40 % of the total size."""
    draw = torch.Generator().manual_seed(seed)
    costs = torch.randint(1, 9, (1, num_experts), generator=draw)
    outputs = torch.randn(num_experts, 64, generator=draw, dtype=torch.float64)
    outputs = outputs + torch.randn(64, generator=draw, dtype=torch.float64) / 2
    outputs *= costs[0].double().sqrt().unsqueeze(1)
    target = outputs.sum(dim=0)
    return PruningProblem(
        loss=lambda gates: (gates.flatten() @ outputs - target).square().mean(),
        costs=costs,
        limit=int(0.4 * int(costs.sum())),
        magnitude=outputs.norm(dim=1).view(1, -1),
    )


class TinyMoE(nn.Module):
    """Residual MoE layers for regression, every expert computed; gates scale what was routed."""

    def __init__(self, width: int, num_layers: int, num_experts: int, top_k: int) -> None:
        super().__init__()
        self.top_k = top_k
        shape = (num_layers, num_experts, width, width)
        self.routers = nn.Parameter(torch.randn(num_layers, width, num_experts).double())
        self.first = nn.Parameter(torch.randn(shape).double() / width**0.5)
        self.second = nn.Parameter(torch.randn(shape).double() / width**0.5)

    def forward(self, inputs: Tensor, gates: Tensor, kept: Tensor | None = None) -> Tensor:
        """Returns outputs ``(T, D)``; experts that are not ``kept`` are out before top-k."""
        hidden = inputs
        for layer, router in enumerate(self.routers):
            logits = hidden @ router
            if kept is not None:
                logits = logits.masked_fill(~kept[layer], -torch.inf)
            weights, ids = torch.softmax(logits, dim=1).topk(self.top_k, dim=1)
            weights = weights / weights.sum(dim=1, keepdim=True)
            dense = torch.zeros_like(logits).scatter(1, ids, weights) * gates[layer]
            inner = torch.einsum("td,edf->tef", hidden, self.first[layer])
            outputs = torch.einsum("tef,efd->ted", F.silu(inner), self.second[layer])
            hidden = hidden + torch.einsum("te,ted->td", dense, outputs)
        return hidden

    def use(self, inputs: Tensor) -> Tensor:
        """Returns how much weight each expert is given, shape ``(L, E)``."""
        gates = torch.ones(self.first.shape[:2], dtype=torch.float64, requires_grad=True)
        hidden, rows = inputs, []
        for layer, router in enumerate(self.routers):
            rows.append(torch.softmax(hidden @ router, dim=1).mean(dim=0))
            part = gates.detach().clone()
            part[layer + 1 :] = 0.0
            hidden = self(inputs, part)
        return torch.stack(rows).detach()


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainedModel:
    """A trained model with its pruning problem and a check on tokens it has not seen."""

    problem: PruningProblem
    deployed_loss: Callable[[Tensor], float]
    """Held-out loss of the model with experts masked out before top-k."""


def trained_moe(*, num_layers: int, num_experts: int, num_steps: int, seed: int) -> TrainedModel:
    """Trains on clusters of unequal frequency, one map each, and asks for half of the experts."""
    width, num_clusters = 16, 6
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = TinyMoE(width, num_layers, num_experts, top_k=2)
        centres = 2 * torch.randn(num_clusters, width).double()
        maps = torch.randn(num_clusters, width, width).double() / width**0.5
        frequency = 0.6 ** torch.arange(num_clusters).double()

        def batch(size: int) -> tuple[Tensor, Tensor]:
            cluster = frequency.multinomial(size, replacement=True)
            inputs = centres[cluster] + 0.5 * torch.randn(size, width).double()
            return inputs, torch.einsum("td,tdf->tf", inputs, maps[cluster]).tanh()

        whole = torch.ones(num_layers, num_experts, dtype=torch.float64)
        optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
        for _ in range(num_steps):
            inputs, targets = batch(256)
            optimizer.zero_grad()
            (model(inputs, whole) - targets).square().mean().backward()
            optimizer.step()
        seen, (unseen, answers) = batch(256)[0], batch(2048)
    model.requires_grad_(requires_grad=False)
    reference = model(seen, whole)

    def deployed_loss(kept: Tensor) -> float:
        if bool((kept.sum(dim=1) < model.top_k).any()):
            return float("inf")
        return float((model(unseen, whole, kept) - answers).square().mean())

    problem = PruningProblem(
        loss=lambda gates: (model(seen, gates) - reference).square().mean(),
        costs=torch.ones(num_layers, num_experts, dtype=torch.int64),
        limit=num_layers * num_experts // 2,
        magnitude=model.use(seen),
    )
    return TrainedModel(problem=problem, deployed_loss=deployed_loss)
