"""Part two: a student layer that learns to route clusters to planted experts."""

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, final

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from benchmarks.synthetic.problems import Clusters, draw_tokens, planted_clusters
from benchmarks.timing import interleaved
from drgr.budgets import TokenBudget
from drgr.models import GatedExperts, MoELayer
from drgr.routing import (
    LayerRouting,
    NoPrices,
    PriceController,
    QuantileBalancing,
    RoutingPolicy,
    SignBias,
    load_balancing_loss,
)
from drgr.routing.selection import BudgetedSelector

WIDTH, EXPERT_WIDTH = 32, 8
LEARNING_RATE = 1e-2
AUXILIARY = 0.01
TOP_K = TokenBudget(minimum=2, maximum=2, average=2)
BATCH_BUDGET = TokenBudget(minimum=1, maximum=4, average=2)
# Tokens of each cluster in the evaluation, at least so many in all.
EVALUATED_OF_CLUSTER, EVALUATED = 32, 4096
SHUFFLES = 4
UNTRAINED = "untrained layer, top 2"
AUXILIARY_LOSS = "auxiliary loss, top 2"
BUDGETED = "quantile prices, batch budget"
PLANTED = "quantile prices of planted loads, batch budget"

Maker = Callable[[Clusters], PriceController]


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Method:
    """One way to route: how prices move, what a batch may spend, and weight of the balance loss."""

    prices: Maker
    budget: TokenBudget
    auxiliary: float = 0.0


def _no_prices(clusters: Clusters) -> PriceController:
    return NoPrices(len(clusters.shares))


def _sign(clusters: Clusters) -> PriceController:
    # The step of the published rule is for scores near 1; those of a softmax are near 1 / E.
    num_experts = len(clusters.shares)
    return SignBias(num_experts, step_size=0.01 / num_experts)


def _quantile(clusters: Clusters) -> PriceController:
    return QuantileBalancing(len(clusters.shares), smoothing=0.9)


def _planted_loads(clusters: Clusters) -> PriceController:
    shares: list[float] = clusters.shares.tolist()
    return QuantileBalancing(len(shares), smoothing=0.9, target=shares)


METHODS = {
    AUXILIARY_LOSS: Method(prices=_no_prices, budget=TOP_K, auxiliary=AUXILIARY),
    "no balance, top 2": Method(prices=_no_prices, budget=TOP_K),
    "sign prices, batch budget": Method(prices=_sign, budget=BATCH_BUDGET),
    BUDGETED: Method(prices=_quantile, budget=BATCH_BUDGET),
    PLANTED: Method(prices=_planted_loads, budget=BATCH_BUDGET),
}


def student(method: Method, clusters: Clusters, seed: int) -> MoELayer:
    """Returns an untrained layer of as many experts as were planted, of their size."""
    torch.manual_seed(seed)
    return MoELayer(
        GatedExperts(len(clusters.shares), width=WIDTH, expert_width=EXPERT_WIDTH),
        policy=RoutingPolicy(
            selector=BudgetedSelector(method.budget), controller=method.prices(clusters)
        ),
    )


def train(
    layer: MoELayer,
    method: Method,
    clusters: Clusters,
    *,
    steps: int,
    num_tokens: int,
    generator: torch.Generator,
) -> int:
    """Trains on fresh tokens; returns the most assignments that a batch spent over its budget."""
    optimizer = torch.optim.Adam(layer.parameters(), lr=LEARNING_RATE)
    over = 0
    for step in range(steps):
        for settings in optimizer.param_groups:
            settings["lr"] = LEARNING_RATE * (1 - step / steps)
        cluster = clusters.shares.multinomial(num_tokens, replacement=True, generator=generator)
        tokens, outputs = draw_tokens(clusters, cluster, generator)
        noise = clusters.noise * torch.randn(outputs.shape, generator=generator)
        routing = train_step(layer, optimizer, tokens, outputs + noise, method.auxiliary)
        over = max(over, int(routing.selection.spend) - method.budget.total(num_tokens))
    return over


def train_step(
    layer: MoELayer,
    optimizer: torch.optim.Optimizer,
    tokens: Tensor,
    targets: Tensor,
    auxiliary: float,
) -> LayerRouting:
    """Takes one step and returns the record of its pass."""
    output, routing = layer(tokens)
    loss = (output - targets).square().mean()
    if auxiliary:
        load = routing.plan.expert_load
        loss = loss + auxiliary * load_balancing_loss(routing.scores, load)
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    optimizer.step()
    layer.observe(routing)
    layer.update()
    record: LayerRouting = routing
    return record


def table_of(cluster: Tensor, expert: Tensor, size: int) -> Tensor:
    """Returns how many tokens of each cluster chose each expert, float64, ``(size, size)``."""
    flat = (cluster * size + expert).bincount(minlength=size * size)
    return flat.view(size, size).double()


def mutual_information(table: Tensor) -> float:
    """Returns the mutual information of rows and columns over the mean of their entropies."""
    joint = table / table.sum()
    rows, columns = joint.sum(dim=1), joint.sum(dim=0)
    entropies = [float(-torch.special.xlogy(one, one).sum()) for one in (rows, columns)]
    together = float(-torch.special.xlogy(joint, joint).sum())
    mean = sum(entropies) / 2
    return (sum(entropies) - together) / mean if mean > 0 else 0.0


def recovery(cluster: Tensor, expert: Tensor, size: int) -> dict[str, float]:
    """Returns how well chosen experts tell the clusters apart, every measure at most 1.

    ``information`` is the normalised mutual information less what independent choices of the same
    counts would have, from random permutations; ``purity`` is the share of an expert's tokens that
    are of its most frequent cluster; ``matched`` is the share of tokens at the expert of their
    cluster under the best one-to-one matching.
    """
    table = table_of(cluster, expert, size)
    found = mutual_information(table)
    generator = torch.Generator().manual_seed(0)
    chance = statistics.mean(
        mutual_information(
            table_of(cluster, expert[torch.randperm(len(expert), generator=generator)], size)
        )
        for _ in range(SHUFFLES)
    )
    rows, columns = linear_sum_assignment(table.numpy(), maximize=True)
    matched = table[torch.as_tensor(rows), torch.as_tensor(columns)].sum()
    return {
        "information": (found - chance) / (1 - chance) if chance < 1 else 0.0,
        "purity": float(table.amax(dim=0).sum() / table.sum()),
        "matched": float(matched / table.sum()),
    }


@torch.no_grad()
def evaluate(layer: MoELayer, clusters: Clusters, generator: torch.Generator) -> dict[str, Any]:
    """Returns recovery and losses above the noise, on as many fresh tokens of every cluster.

    A loss is a cluster's mean square error to the noiseless target over the mean square of that
    target; 1 is that of an output of 0. ``mean_loss`` weights clusters by how often they occur.
    Prices are frozen, so that the spend is no longer exact.
    """
    size = len(clusters.shares)
    each = max(EVALUATED_OF_CLUSTER, EVALUATED // size)
    cluster = torch.arange(size).repeat_interleave(each)
    tokens, targets = draw_tokens(clusters, cluster, generator)
    layer.eval()
    output, routing = layer(tokens)
    layer.train()
    plan = routing.plan
    chosen = plan.combine_weights.masked_fill(~plan.keep, -1.0).argmax(dim=1, keepdim=True)
    expert = plan.expert_ids.gather(1, chosen).squeeze(1)
    losses, powers = (
        part.square().mean(dim=1).view(size, each).mean(dim=1)
        for part in (output - targets, targets)
    )
    losses = losses / powers
    rarest = losses[-max(1, size // 4) :]
    return {
        **recovery(cluster, expert, size),
        "mean_loss": float(clusters.shares @ losses),
        "worst_loss": float(losses.max()),
        "rare_loss": float(rarest.mean()),
        "experts_per_token": float(plan.keep.sum() / len(cluster)),
        "unused_experts": int((plan.expert_load == 0).sum()),
    }


def measure(
    num_experts: int, seed: int, *, steps: int, num_tokens: int, rounds: int
) -> list[dict[str, Any]]:
    """Returns a row for each method, on the same clusters and tokens from the same first layer.

    The first row is that layer's, without a cost: a linear router tells clusters apart by chance.
    """
    clusters = planted_clusters(num_experts, seed, width=WIDTH, expert_width=EXPERT_WIDTH)
    label = {"part": "routing", "experts": num_experts, "seed": seed}
    first = evaluate(
        student(METHODS[AUXILIARY_LOSS], clusters, seed),
        clusters,
        torch.Generator().manual_seed(2000 + seed),
    )
    rows: list[dict[str, Any]] = [label | {"method": UNTRAINED, "over_budget": 0} | first]
    layers = {}
    for name, method in METHODS.items():
        layer = layers[name] = student(method, clusters, seed)
        generator = torch.Generator().manual_seed(1000 + seed)
        over = train(
            layer, method, clusters, steps=steps, num_tokens=num_tokens, generator=generator
        )
        judged = evaluate(layer, clusters, torch.Generator().manual_seed(2000 + seed))
        rows.append(label | {"method": name, "over_budget": over} | judged)
    costs = cost(layers, clusters, num_tokens=num_tokens, rounds=rounds)
    return [row | costs.get(row["method"], {}) for row in rows]


def cost(
    layers: dict[str, MoELayer], clusters: Clusters, *, num_tokens: int, rounds: int
) -> dict[str, dict[str, float]]:
    """Times a training step of each layer, and routing alone: scores, selection, moving prices.

    Routing is timed without its backward pass.
    """
    generator = torch.Generator().manual_seed(0)
    cluster = clusters.shares.multinomial(num_tokens, replacement=True, generator=generator)
    tokens, targets = draw_tokens(clusters, cluster, generator)
    timed: dict[str, Callable[[], Any]] = {}
    for name, layer in layers.items():
        optimizer = torch.optim.Adam(layer.parameters(), lr=0.0)
        timed[f"{name}: step"] = partial(
            train_step, layer, optimizer, tokens, targets, METHODS[name].auxiliary
        )
        timed[f"{name}: routing"] = partial(_route, layer, tokens)
    seconds = interleaved(timed, rounds=rounds)
    base = seconds[f"{AUXILIARY_LOSS}: step"]["median"]
    found = {}
    for name in layers:
        step, routing = (seconds[f"{name}: {kind}"]["median"] for kind in ("step", "routing"))
        found[name] = {
            "seconds_per_step": step,
            "ratio_to_auxiliary_loss": step / base,
            "routing_share": routing / step,
        }
    return found


def _route(layer: MoELayer, tokens: Tensor) -> None:
    layer.observe(layer.route(tokens))
    layer.update()
