"""What is timed: every score, controller and selection, in place of that of a plain layer.

The plain layer has softmax scores, no prices and a fixed number of experts.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from benchmarks.skew.run import CONTROLLERS
from drgr.budgets import TokenBudget
from drgr.models import GatedExperts, MoELayer
from drgr.routing import LayerPlace, NoPrices, PriceController, RoutingPolicy
from drgr.routing.methods import METHODS, Kind, Method
from drgr.routing.scores import (
    CosineScores,
    GaussianScores,
    KMeansScores,
    NoisyScores,
    NormScores,
    ReluRmsScores,
    Scorer,
    SigmoidScores,
    SoftmaxScores,
    StochasticGates,
    TsallisHybridScores,
)
from drgr.routing.selection import (
    BudgetedSelector,
    OpenExperts,
    ProgressiveSelector,
    QuantileSelector,
    Selector,
    SequenceSelector,
    ThresholdSelector,
    TopPSelector,
    layer_budgets,
    sparsification,
)


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Size:
    """Sizes of the layer and its batch."""

    tokens: int
    experts: int
    top_k: int
    width: int
    expert_width: int
    sequence_length: int

    @property
    def each(self) -> TokenBudget:
        """A fixed number of experts."""
        return TokenBudget(minimum=self.top_k, maximum=self.top_k, average=self.top_k)

    @property
    def varying(self) -> TokenBudget:
        """A number of experts that differs from token to token."""
        most = min(2 * self.top_k, self.experts)
        return TokenBudget(minimum=self.top_k // 2, maximum=most, average=self.top_k)

    @property
    def budgets(self) -> dict[str, TokenBudget]:
        """Both, by the words for them."""
        low, high = self.varying.minimum, self.varying.maximum
        return {
            f"{self.top_k} each": self.each,
            f"{low} to {high}, {self.top_k} on average": self.varying,
        }


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One layer that is timed.

    Attributes:
        kind: Which part of the plain layer is replaced.
        label: What replaces it, with settings.
        budget: Experts of a token, in words.
        build: Builds the layer.
    """

    kind: Kind
    label: str
    budget: str
    build: Callable[[], MoELayer]

    def method_of(self, layer: MoELayer) -> Method:
        """Returns the entry in the table of methods of what is replaced in the layer."""
        parts = {
            "score": layer.scorer,
            "price": layer.policy.controller,
            "selection": layer.policy.selector,
        }
        (found,) = (one for one in METHODS if one.implementation is type(parts[self.kind]))
        return found


def scorers(size: Size) -> dict[str, Callable[[], Scorer]]:
    """Returns what builds each scorer, by its label."""
    experts, width = size.experts, size.width
    return {
        "softmax": SoftmaxScores,
        "sigmoid": SigmoidScores,
        "cosine": CosineScores,
        "k-means": lambda: KMeansScores(experts, width),
        "norm": lambda: NormScores(experts, experts_per_token=size.top_k),
        "ReLU with RMS norm": lambda: ReluRmsScores(experts),
        "Tsallis hybrid": TsallisHybridScores,
        "noisy": lambda: NoisyScores(experts, width),
        "Gaussian noise": GaussianScores,
        "stochastic gates, straight through": lambda: StochasticGates(experts),
        "stochastic gates, REINFORCE": lambda: StochasticGates(experts, estimator="reinforce"),
    }


def selectors(size: Size) -> dict[str, Callable[[Tensor], Selector]]:
    """Returns what builds each selection from a batch's scores, by its label.

    Thresholds are set so that tokens have ``top_k`` experts on average.
    """
    budget, most = size.varying, size.varying.maximum
    place = LayerPlace(
        number=0,
        num_layers=1,
        num_experts=size.experts,
        width=size.width,
        device=torch.device("cpu"),
    )
    return {
        "budget": lambda _: BudgetedSelector(budget),
        "budget by layer": lambda _: layer_budgets([budget])(place),
        "budget by sequence": lambda _: SequenceSelector(budget),
        "progressive budget": lambda _: ProgressiveSelector(
            sparsification(size.each, budget, switch_step=1), maximum=most
        ),
        "top-p": lambda scores: TopPSelector(_share_of_best(scores, size.top_k), maximum=most),
        "threshold": lambda scores: ThresholdSelector(
            float(scores.flatten().topk(size.top_k * len(scores)).values[-1]), maximum=most
        ),
        "learned threshold": lambda _: QuantileSelector(budget),
        "learned threshold of each expert": lambda _: QuantileSelector(
            budget, num_experts=size.experts
        ),
    }


def cases(size: Size) -> Iterator[Case]:
    """Yields every case."""
    for label, budget in size.budgets.items():
        for name, scorer in scorers(size).items():
            yield _case(size, "score", name, label, scorer=scorer, selector=_fixed(budget))
        for name in CONTROLLERS:
            controller = _controller(name, size)
            yield _case(size, "price", name, label, controller=controller, selector=_fixed(budget))
    for name, selector in selectors(size).items():
        yield _case(size, "selection", name, list(size.budgets)[1], selector=selector)
    yield _case(
        size,
        "selection",
        "open experts of ReLU with RMS norm",
        f"at most {size.top_k}",
        scorer=lambda: ReluRmsScores(size.experts),
        selector=lambda _: OpenExperts(size.top_k),
    )


def _controller(name: str, size: Size) -> Callable[[], PriceController]:
    return lambda: CONTROLLERS[name](size.experts)


def _fixed(budget: TokenBudget) -> Callable[[Tensor], Selector]:
    return lambda _: BudgetedSelector(budget)


def _case(
    size: Size,
    kind: Kind,
    label: str,
    budget: str,
    *,
    selector: Callable[[Tensor], Selector],
    scorer: Callable[[], Scorer] = SoftmaxScores,
    controller: Callable[[], PriceController] | None = None,
) -> Case:
    def build() -> MoELayer:
        torch.manual_seed(0)
        made = NoPrices(size.experts) if controller is None else controller()
        layer = MoELayer(
            GatedExperts(size.experts, width=size.width, expert_width=size.expert_width),
            policy=RoutingPolicy(selector=_fixed(size.each)(torch.empty(0)), controller=made),
            scorer=scorer(),
        )
        with torch.no_grad():
            hidden = torch.randn(size.tokens, size.width)
            found = selector(layer.scorer(hidden, layer.router.weight).selectable)
        layer.policy = RoutingPolicy(selector=found, controller=made)
        return layer

    return Case(kind=kind, label=label, budget=budget, build=build)


def _share_of_best(scores: Tensor, top_k: int) -> float:
    """Returns the share of a token's scores that its ``top_k`` best have, on average."""
    return float((scores.topk(top_k, dim=1).values.sum(dim=1) / scores.sum(dim=1)).mean())
