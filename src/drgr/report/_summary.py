"""The numbers of a run's summary, from its evaluation or, if interrupted, from its last records."""

from collections.abc import Sequence
from dataclasses import dataclass

from drgr.report._records import (
    EvaluationRecord,
    Numbers,
    Repulsion,
    RunRecord,
    TrainRecord,
    ValidationRecord,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class DomainSummary:
    """One row of the domain table; ``is_worst`` marks the highest held-out bits per byte."""

    name: str
    train_tokens: float | None
    bits_per_byte: float | None
    adversarial_weight: float | None
    experts_per_token: float | None
    is_worst: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class BudgetSummary:
    """Spend against budget in assignments.

    ``over`` counts training steps over the budget, or, if ``over_is_windows``, log windows over it:
    all that an interrupted run can say.
    """

    unit: str | None
    minimum: float | None
    maximum: float | None
    average: float | None
    training_budget: float | None
    training_spend: float | None
    over: float | None
    over_is_windows: bool
    evaluation_budget: float | None
    evaluation_spend: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerBalance:
    """How a layer spreads its tokens; ``docs/run-directory.md`` says what each number is.

    Entropy, similarity and repulsion are measured in evaluations only.
    """

    name: str
    max_violation: float | None
    min_violation: float | None
    mean_violation: float | None
    dead_experts: float | None
    routing_entropy: float | None
    router_similarity: float | None
    repulsion: Repulsion
    congestion: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class RunSummary:
    """The table of a run; ``source`` says which split and step the held-out numbers are from.

    ``unseen`` has the bits per byte of domains that training had no part of; no other number does.
    """

    source: str
    domains: tuple[DomainSummary, ...]
    unseen: Numbers
    mean_bits_per_byte: float | None
    worst_domain: str | None
    worst_bits_per_byte: float | None
    effective_domains: float | None
    budget: BudgetSummary
    layers: tuple[LayerBalance, ...]
    exchanged_forward: float | None
    exchanged_backward: float | None
    flops: float | None
    outer_flops: float | None
    tokens_per_second: float | None
    seconds: float | None


def summarize(run: RunRecord) -> RunSummary:
    """Gathers a run's summary.

    Args:
        run: a loaded run.

    Returns:
        The numbers of ``evaluation.json`` unchanged; for a run without one, those of its last
        validation and its last training record. Domains come worst first.
    """
    if run.evaluation is not None:
        return _from_evaluation(run.evaluation)
    return _from_records(run)


def highest_violation(layers: Sequence[LayerBalance]) -> float | None:
    """Returns the largest MaxVio of any layer."""
    return max((v.max_violation for v in layers if v.max_violation is not None), default=None)


def lowest_violation(layers: Sequence[LayerBalance]) -> float | None:
    """Returns the smallest MinVio of any layer."""
    return min((v.min_violation for v in layers if v.min_violation is not None), default=None)


def highest_congestion(layers: Sequence[LayerBalance]) -> float | None:
    """Returns the largest congestion of any layer."""
    return max((v.congestion for v in layers if v.congestion is not None), default=None)


def domain_names(run: RunRecord) -> tuple[str, ...]:
    """Returns every domain that the run names, in the order of its files."""
    names: dict[str, None] = {}
    if run.evaluation is not None:
        names.update(dict.fromkeys(run.evaluation.domains))
    if run.train:
        names.update(dict.fromkeys(run.train[-1].domain_tokens))
        names.update(dict.fromkeys(run.train[-1].adversary))
    if run.validation:
        names.update(dict.fromkeys(run.validation[-1].bits_per_byte))
    if run.protocol is not None:
        names.update(dict.fromkeys(run.protocol.domains))
    return tuple(names)


def _from_evaluation(evaluation: EvaluationRecord) -> RunSummary:
    bits = {name: domain.bits_per_byte for name, domain in evaluation.domains.items()}
    worst = evaluation.worst_domain or _argmax(bits)
    domains = [
        DomainSummary(
            name=name,
            train_tokens=domain.train_tokens,
            bits_per_byte=domain.bits_per_byte,
            adversarial_weight=domain.adversarial_weight,
            experts_per_token=domain.experts_per_token,
            is_worst=name == worst,
        )
        for name, domain in evaluation.domains.items()
    ]
    budget = evaluation.budget
    return RunSummary(
        source=_source(f"{evaluation.split or 'held-out'} split", evaluation.step),
        domains=_worst_first(domains),
        unseen=evaluation.unseen,
        mean_bits_per_byte=evaluation.mean_bits_per_byte,
        worst_domain=worst,
        worst_bits_per_byte=evaluation.worst_bits_per_byte,
        effective_domains=evaluation.effective_domains,
        budget=BudgetSummary(
            unit=budget.unit,
            minimum=budget.minimum,
            maximum=budget.maximum,
            average=budget.average,
            training_budget=budget.training_budget,
            training_spend=budget.training_spend,
            over=budget.training_batches_over,
            over_is_windows=False,
            evaluation_budget=budget.evaluation_budget,
            evaluation_spend=budget.evaluation_spend,
        ),
        layers=tuple(
            LayerBalance(
                name=layer.name,
                max_violation=layer.max_violation,
                min_violation=layer.min_violation,
                mean_violation=layer.mean_violation,
                dead_experts=layer.dead_experts,
                routing_entropy=layer.routing_entropy,
                router_similarity=layer.router_similarity,
                repulsion=layer.repulsion,
                congestion=layer.congestion,
            )
            for layer in evaluation.layers
        ),
        exchanged_forward=evaluation.exchanged_forward,
        exchanged_backward=evaluation.exchanged_backward,
        flops=evaluation.flops,
        outer_flops=evaluation.outer_flops,
        tokens_per_second=evaluation.tokens_per_second,
        seconds=evaluation.seconds,
    )


def _from_records(run: RunRecord) -> RunSummary:
    train = run.train[-1] if run.train else None
    validation = run.validation[-1] if run.validation else None
    bits: Numbers = validation.bits_per_byte if validation else {}
    worst = (validation.worst_domain if validation else None) or _argmax(bits)
    return RunSummary(
        source=_source("validation split", validation.step) if validation else "no evaluation",
        domains=_domains_from_records(run, worst),
        unseen={},
        mean_bits_per_byte=validation.mean_bits_per_byte if validation else None,
        worst_domain=worst,
        worst_bits_per_byte=bits.get(worst) if worst else None,
        effective_domains=train.effective_domains if train else None,
        budget=_budget_from_records(run.train, validation),
        layers=_layers_from_record(train),
        exchanged_forward=train.exchanged_forward if train else None,
        exchanged_backward=train.exchanged_backward if train else None,
        flops=train.flops if train else None,
        outer_flops=train.outer_flops if train else None,
        tokens_per_second=train.tokens_per_second if train else None,
        seconds=train.seconds if train else None,
    )


def _domains_from_records(run: RunRecord, worst: str | None) -> tuple[DomainSummary, ...]:
    train = run.train[-1] if run.train else None
    validation = run.validation[-1] if run.validation else None
    return _worst_first(
        [
            DomainSummary(
                name=name,
                train_tokens=train.domain_tokens.get(name) if train else None,
                bits_per_byte=validation.bits_per_byte.get(name) if validation else None,
                adversarial_weight=train.adversary.get(name) if train else None,
                experts_per_token=validation.experts_per_token.get(name) if validation else None,
                is_worst=name == worst,
            )
            for name in domain_names(run)
        ]
    )


def _budget_from_records(
    train: Sequence[TrainRecord], validation: ValidationRecord | None
) -> BudgetSummary:
    both = [(r.budget, r.spend) for r in train if r.budget is not None and r.spend is not None]
    return BudgetSummary(
        unit=None,
        minimum=None,
        maximum=None,
        average=None,
        training_budget=sum(budget for budget, _ in both) if both else None,
        training_spend=sum(spend for _, spend in both) if both else None,
        over=sum(spend > budget for budget, spend in both) if both else None,
        over_is_windows=True,
        evaluation_budget=validation.budget if validation else None,
        evaluation_spend=validation.spend if validation else None,
    )


def _layers_from_record(train: TrainRecord | None) -> tuple[LayerBalance, ...]:
    if train is None:
        return ()
    return tuple(
        LayerBalance(
            name=layer.name,
            max_violation=layer.max_violation,
            min_violation=layer.min_violation,
            mean_violation=layer.mean_violation,
            dead_experts=layer.dead_experts,
            routing_entropy=None,
            router_similarity=None,
            repulsion=Repulsion(),
            congestion=layer.congestion,
        )
        for layer in train.layers
    )


def _source(split: str, step: float | None) -> str:
    return split if step is None else f"{split}, step {step:,.0f}"


def _argmax(values: Numbers) -> str | None:
    known = {name: value for name, value in values.items() if value is not None}
    return max(known, key=lambda name: known[name]) if known else None


def _worst_first(domains: Sequence[DomainSummary]) -> tuple[DomainSummary, ...]:
    def descending(domain: DomainSummary) -> float:
        return float("inf") if domain.bits_per_byte is None else -domain.bits_per_byte

    return tuple(sorted(domains, key=descending))
