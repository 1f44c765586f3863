"""Every routing method of this package: what it is, where it comes from and what was derived here.

``drgr methods`` prints it, and the conformance tests run over it: a method that is missing here is
an error of the tests.
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, final

from drgr.routing import losses, scores, selection
from drgr.routing.bip import BipBalancing
from drgr.routing.congestion_price import CongestionPrice
from drgr.routing.controllers import NoPrices
from drgr.routing.quantile import QuantileBalancing
from drgr.routing.rms_bias import RmsBias
from drgr.routing.selective_sinkhorn import SelectiveSinkhorn
from drgr.routing.sign_bias import SignBias
from drgr.routing.sinkhorn import SinkhornPrices
from drgr.routing.subgradient import DecayingSubgradient

Kind = Literal["score", "price", "selection", "loss"]


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Method:
    """One method.

    Attributes:
        name: What settings call it, for a loss the function's name.
        kind: Which of the interfaces it has.
        implementation: The class, or the function of a loss.
        source: Where it was published.
        status: What of it is published and what was derived here.
        slow: Why routing by it takes more than a tenth of the time of a layer's forward and
            backward pass, as ``benchmarks/routing_cost`` measures it; ``None`` where it does not.
    """

    name: str
    kind: Kind
    implementation: Callable[..., Any]
    source: str
    status: str
    slow: str | None = None

    @property
    def summary(self) -> str:
        """The first sentence of its documentation, without markup."""
        first = (inspect.getdoc(self.implementation) or "").split("\n\n")[0]
        return " ".join(first.replace("``", "").split())


def _method(
    kind: Kind,
    name: str,
    implementation: Callable[..., Any],
    source: str,
    status: str = "published",
    *,
    slow: str | None = None,
) -> Method:
    return Method(
        name=name,
        kind=kind,
        implementation=implementation,
        source=source,
        status=status,
        slow=slow,
    )


_score = partial(_method, "score")
_price = partial(_method, "price")
_selection = partial(_method, "selection")


def _loss(implementation: Callable[..., Any], source: str, status: str = "published") -> Method:
    name = getattr(implementation, "__name__", "").removesuffix("_loss")
    return _method("loss", name, implementation, source, status)


SCORES = (
    _score("softmax", scores.SoftmaxScores, "arXiv 1701.06538, 2101.03961"),
    _score("sigmoid", scores.SigmoidScores, "arXiv 2412.19437"),
    _score("cosine", scores.CosineScores, "arXiv 2204.09179"),
    _score(
        "k-means",
        scores.KMeansScores,
        "arXiv 2605.12476",
        "as reported; gate, centring and re-seeding derived",
    ),
    _score(
        "norm",
        scores.NormScores,
        "arXiv 2605.06665",
        "published; constant conditioned on two positive entries, fallback derived",
    ),
    _score("relu-rms", scores.ReluRmsScores, "arXiv 2507.08771", "published; guard derived"),
    _score("tsallis-hybrid", scores.TsallisHybridScores, "arXiv 2504.00661"),
    _score("noisy", scores.NoisyScores, "arXiv 1701.06538"),
    _score(
        "gaussian",
        scores.GaussianScores,
        "after DynaMoE",
        "as reported: noise of one size; where the temperature enters is derived",
    ),
    _score(
        "stochastic",
        scores.StochasticGates,
        "arXiv 1308.3432",
        "published estimators; as gates of experts derived",
    ),
)

PRICES = (
    _price("none", NoPrices, "no prices: balance, if any, comes from a loss", "baseline"),
    _price("sign-bias", SignBias, "arXiv 2408.15664"),
    _price("rms-bias", RmsBias, "after arXiv 2408.15664", "derived: the error over its RMS"),
    _price(
        "subgradient",
        DecayingSubgradient,
        "after arXiv 2512.03915",
        "derived from the dual; published are the rates",
    ),
    _price(
        "quantile",
        QuantileBalancing,
        "after arXiv 2502.15451",
        "derived: equalities, so no clip; exact over processes",
    ),
    _price(
        "bip",
        BipBalancing,
        "arXiv 2502.15451",
        "published; here prices serve the next step",
        slow="eight passes over all scores in each step",
    ),
    _price(
        "sinkhorn",
        SinkhornPrices,
        "arXiv 2511.08972, 1306.0895",
        "derived: the plan's prices instead of the plan",
    ),
    _price(
        "selective-sinkhorn",
        SelectiveSinkhorn,
        "arXiv 2511.08972",
        "published at random steps; gradient path and coin by layer derived",
    ),
    _price(
        "congestion",
        CongestionPrice,
        "after arXiv 2604.04230",
        "derived: proportional control of the congestion game",
    ),
)

SELECTIONS = (
    _selection(
        "budget",
        selection.BudgetedSelector,
        "this package",
        "derived: optimal in a laminar matroid; frozen price at evaluation",
    ),
    _selection(
        "top-p",
        selection.TopPSelector,
        "arXiv 2403.07652",
        "published; bounds of a token derived",
    ),
    _selection(
        "threshold",
        selection.ThresholdSelector,
        "after DynaMoE",
        "derived: a token's own percentile would fix the number of experts",
    ),
    _selection(
        "learned-threshold",
        selection.QuantileSelector,
        "kexue.fm 11619",
        "as reported: one-shot quantiles; smoothing over processes derived",
    ),
    _selection(
        "sequence",
        selection.SequenceSelector,
        "this package",
        "derived: the exact budget, in each sequence",
    ),
    _selection(
        "progressive",
        selection.ProgressiveSelector,
        "arXiv 2512.16248",
        "published by restarts; a schedule within one run derived",
    ),
    _selection(
        "open",
        selection.OpenExperts,
        "arXiv 2504.00661, 2507.08771",
        "published with their scorers; bounds derived",
    ),
)

LOSSES = (
    _loss(losses.load_balancing_loss, "JMLR 2022 (Switch); arXiv 2501.11873 (global scope)"),
    _loss(losses.micro_balancing_loss, "JMLR 2022 (Switch)"),
    _loss(losses.sequence_balancing_loss, "arXiv 2412.19437"),
    _loss(losses.top1_balancing_loss, "arXiv 2512.16248", "published; scope and mask derived"),
    _loss(losses.router_z_loss, "arXiv 2202.08906"),
    _loss(
        losses.expert_router_coupling_loss,
        "arXiv 2512.23447",
        "as reported; gradient path derived",
    ),
    _loss(losses.expert_specialisation_loss, "arXiv 2602.14159", "published; normaliser derived"),
    _loss(losses.layer_coupling_loss, "arXiv 2602.14159", "published; product form derived"),
    _loss(losses.tsallis_entropy_loss, "arXiv 2504.00661", "published; padding mask derived"),
    _loss(
        losses.specialisation_balance_loss,
        "arXiv 2507.00029",
        "as reported, with either sign of the entropy",
    ),
    _loss(losses.routing_information_loss, "NeurIPS 1991 (Bridle et al.)", "derived for routers"),
    _loss(losses.activation_locality_loss, "arXiv 2507.08771"),
    _loss(losses.chunk_sparsity_loss, "arXiv 2507.08771"),
    _loss(losses.pool_balancing_loss, "arXiv 2605.06665"),
)

METHODS: tuple[Method, ...] = (*SCORES, *PRICES, *SELECTIONS, *LOSSES)
"""All of them, by kind."""
