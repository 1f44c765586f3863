"""A small classifier with one layer of experts inside an exact budget, and how it is trained."""

from dataclasses import dataclass, field
from typing import Protocol, final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.real_groups.data import Samples
from drgr.budgets import TokenBudget
from drgr.budgets.flops import FlopModel, forward_flops, training_flops
from drgr.models import GatedExperts, MoELayer
from drgr.routing import LayerRouting, QuantileBalancing, RoutingPolicy
from drgr.routing.selection import BudgetedSelector

WIDTH, EXPERTS, EXPERT_WIDTH = 32, 8, 32
BUDGET = TokenBudget(minimum=1, maximum=4, average=2)
PRICE_SMOOTHING = 0.9
LEARNING_RATE = 4e-3
# Of the last step, as a share of the first.
FINAL_RATE = 0.1


@final
class Classifier(nn.Module):
    """Projection, one layer of experts beside a shortcut, head."""

    def __init__(self, num_features: int, num_classes: int) -> None:
        super().__init__()
        self.projection = nn.Linear(num_features, WIDTH)
        self.norm = nn.LayerNorm(WIDTH)
        self.moe = MoELayer(
            GatedExperts(EXPERTS, width=WIDTH, expert_width=EXPERT_WIDTH),
            policy=RoutingPolicy(
                selector=BudgetedSelector(BUDGET, smoothing=PRICE_SMOOTHING),
                controller=QuantileBalancing(EXPERTS, smoothing=PRICE_SMOOTHING),
            ),
        )
        self.head = nn.Linear(WIDTH, num_classes)

    def forward(self, features: Tensor) -> tuple[Tensor, LayerRouting]:
        """Returns logits ``(N, C)`` and who processed which sample."""
        hidden = F.silu(self.projection(features))
        added, routing = self.moe(self.norm(hidden))
        return self.head(hidden + added), routing

    def costs(self) -> FlopModel:
        """Returns the FLOPs of a sample and of an assignment: two for each weight of a product."""
        experts = self.moe.experts
        dense = (self.projection, self.moe.router, self.head)
        return FlopModel(
            dense_per_token=2.0 * sum(part.weight.numel() for part in dense),
            per_assignment=2.0 * (experts.gate_up[0].numel() + experts.down[0].numel()),
            attention_per_pair=0.0,
        )


class Rule(Protocol):
    """What a method decides at each step: what is drawn, and what the drawn losses count."""

    def shares(self, step: int) -> Tensor:
        """Returns how often each training sample is drawn, up to a factor, shape ``(N,)``."""

    def objective(self, losses: Tensor, rows: Tensor) -> Tensor:
        """Returns the scalar to descend on, from the losses of the drawn ``rows``, ``(B,)``."""


@final
@dataclass(slots=True)
class Ledger:
    """What training has cost so far."""

    steps: int = 0
    flops: float = 0.0
    assignments: int = 0
    batches_over_budget: int = 0
    assignments_over_budget: int = 0

    def enter(self, routing: LayerRouting, flops: float) -> None:
        """Adds a pass that had to keep to the budget."""
        spend, limit = int(routing.plan.keep.sum()), BUDGET.total(len(routing.plan.keep))
        self.flops += flops
        self.assignments += spend
        self.assignments_over_budget += max(0, spend - limit)
        self.batches_over_budget += spend > limit


@final
@dataclass(frozen=True, slots=True)
class Training:
    """How long and by what draws a model is trained; the same for all methods.

    Attributes:
        steps: Steps that the whole method has, passes without gradients counted as steps.
        batch_size: Samples of a step.
        seed: Of the first weights and of the draws.
        weight_decay: Of AdamW.
    """

    steps: int
    batch_size: int
    seed: int
    weight_decay: float = 0.01


@final
@dataclass(slots=True)
class Fit:
    """A trained model with what it cost."""

    model: Classifier
    ledger: Ledger = field(default_factory=Ledger)


def fresh_model(samples: Samples, seed: int) -> Classifier:
    """Returns a new model for two classes."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return Classifier(samples.features.shape[1], 2)


def fit(samples: Samples, rule: Rule, training: Training, *, ledger: Ledger | None = None) -> Fit:
    """Trains a fresh model for ``training.steps`` steps by a rule."""
    model = fresh_model(samples, training.seed)
    result = Fit(model) if ledger is None else Fit(model, ledger)
    costs = model.costs()
    generator = torch.Generator().manual_seed(training.seed)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=LEARNING_RATE, weight_decay=training.weight_decay, fused=True
    )
    slope = (1 - FINAL_RATE) / max(training.steps - 1, 1)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - slope * step)
    model.train()
    for step in range(training.steps):
        rows = torch.multinomial(
            rule.shares(step), training.batch_size, replacement=True, generator=generator
        )
        logits, routing = model(samples.features[rows])
        losses = F.cross_entropy(logits, samples.labels[rows], reduction="none")
        optimizer.zero_grad()
        rule.objective(losses, rows).backward()
        optimizer.step()
        schedule.step()
        model.moe.observe(routing)
        model.moe.update()
        spent = training_flops(
            costs,
            tokens=len(rows),
            sequence_length=1,
            assignments=float(routing.plan.keep.sum()),
        )
        result.ledger.enter(routing, spent)
        result.ledger.steps += 1
    return result


@torch.no_grad()
def errors(fitted: Fit, samples: Samples) -> Tensor:
    """Returns which samples the model gets wrong, in one pass inside the exact budget."""
    model = fitted.model.train()
    logits, routing = model(samples.features)
    costs = model.costs()
    spend = float(routing.plan.keep.sum())
    spent = forward_flops(costs, tokens=len(logits), sequence_length=1, assignments=spend)
    fitted.ledger.enter(routing, spent)
    wrong: Tensor = logits.argmax(dim=1) != samples.labels
    return wrong


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Scores:
    """What a model is worth on a split.

    Attributes:
        groups: Accuracy of each group.
        average: Accuracy over all samples, groups as frequent as they are.
        assignments_per_sample: Experts of a sample at the frozen price.
    """

    groups: list[float]
    average: float
    assignments_per_sample: float

    @property
    def worst(self) -> float:
        return min(self.groups)


@torch.no_grad()
def evaluate(model: Classifier, samples: Samples, num_groups: int) -> Scores:
    """Judges a model, each sample routed by itself at the price learned in training."""
    logits, routing = model.eval()(samples.features)
    is_right = (logits.argmax(dim=1) == samples.labels).double()
    counts = samples.counts(num_groups).double()
    sums = torch.zeros(num_groups, dtype=torch.float64).index_add(0, samples.groups, is_right)
    return Scores(
        groups=(sums / counts).tolist(),
        average=is_right.mean().item(),
        assignments_per_sample=routing.plan.keep.double().sum().item() / len(logits),
    )
