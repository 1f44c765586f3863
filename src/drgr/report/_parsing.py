"""From JSON objects to records."""

from drgr.report._fields import Fields
from drgr.report._records import (
    AlarmRecord,
    BudgetEvaluation,
    DomainEvaluation,
    Environment,
    EvaluationRecord,
    LayerEvaluation,
    LayerWindow,
    LossWindow,
    Repulsion,
    TrainRecord,
    ValidationRecord,
)


def parse_environment(fields: Fields) -> Environment:
    """Reads ``environment.json``."""
    return Environment(
        command=fields.text("command"),
        started=fields.text("started"),
        commit=fields.text("commit"),
        dirty=fields.flag("dirty"),
        versions=fields.texts("versions"),
        hardware=fields.texts("hardware"),
        processes=fields.number("processes"),
    )


def parse_train(fields: Fields, *, step: int) -> TrainRecord:
    """Reads a line of kind ``train``."""
    losses = fields.child("routing_losses")
    return TrainRecord(
        step=step,
        tokens=fields.number("tokens"),
        flops=fields.number("flops"),
        outer_flops=fields.number("outer_flops"),
        seconds=fields.number("seconds"),
        tokens_per_second=fields.number("tokens_per_second"),
        loss=fields.number("loss"),
        objective=fields.number("objective"),
        effective_domains=fields.number("effective_domains"),
        near_one_hot=bool(fields.flag("near_one_hot")),
        budget=fields.number("budget"),
        spend=fields.number("spend"),
        exchanged_forward=fields.child("exchanged_bytes").number("forward"),
        exchanged_backward=fields.child("exchanged_bytes").number("backward"),
        routing_losses={name: _loss_window(losses.child(name)) for name in losses.names()},
        domain_loss=fields.numbers("domain_loss"),
        domain_tokens=fields.numbers("domain_tokens"),
        sampling=fields.numbers("sampling"),
        adversary=fields.numbers("adversary"),
        experts_per_token=fields.numbers("experts_per_token"),
        layers=tuple(_layer_window(layer) for layer in fields.children("layers")),
    )


def parse_validation(fields: Fields, *, step: int) -> ValidationRecord:
    """Reads a line of kind ``validation``."""
    return ValidationRecord(
        step=step,
        loss=fields.numbers("loss"),
        bits_per_byte=fields.numbers("bits_per_byte"),
        experts_per_token=fields.numbers("experts_per_token"),
        mean_bits_per_byte=fields.number("mean_bits_per_byte"),
        worst_domain=fields.text("worst_domain"),
        worst_bits_per_byte=fields.number("worst_bits_per_byte"),
        budget=fields.number("budget"),
        spend=fields.number("spend"),
    )


def parse_alarm(fields: Fields, *, step: int) -> AlarmRecord:
    """Reads a line of kind ``alarm``."""
    return AlarmRecord(step=step, message=fields.text("message") or "(no message)")


def parse_evaluation(fields: Fields) -> EvaluationRecord:
    """Reads ``evaluation.json``."""
    domains, unseen = fields.child("domains"), fields.child("unseen")
    return EvaluationRecord(
        split=fields.text("split"),
        step=fields.number("step"),
        flops=fields.number("flops"),
        outer_flops=fields.number("outer_flops"),
        tokens_per_second=fields.number("tokens_per_second"),
        seconds=fields.number("seconds"),
        domains={name: _domain_evaluation(domains.child(name)) for name in domains.names()},
        unseen={name: unseen.child(name).number("bits_per_byte") for name in unseen.names()},
        mean_bits_per_byte=fields.number("mean_bits_per_byte"),
        worst_domain=fields.text("worst_domain"),
        worst_bits_per_byte=fields.number("worst_bits_per_byte"),
        effective_domains=fields.number("effective_domains"),
        budget=_budget_evaluation(fields.child("budget")),
        exchanged_forward=fields.child("exchanged_bytes").number("forward"),
        exchanged_backward=fields.child("exchanged_bytes").number("backward"),
        layers=tuple(_layer_evaluation(layer) for layer in fields.children("layers")),
    )


def _layer_window(fields: Fields) -> LayerWindow:
    return LayerWindow(
        name=fields.text("name") or "(unnamed layer)",
        load=fields.counts("load"),
        max_violation=fields.number("max_violation"),
        min_violation=fields.number("min_violation"),
        mean_violation=fields.number("mean_violation"),
        dead_experts=fields.number("dead_experts"),
        price=fields.number("price"),
        congestion=fields.number("congestion"),
    )


def _loss_window(fields: Fields) -> LossWindow:
    return LossWindow(value=fields.number("value"), coefficient=fields.number("coefficient"))


def _domain_evaluation(fields: Fields) -> DomainEvaluation:
    return DomainEvaluation(
        train_tokens=fields.number("train_tokens"),
        test_tokens=fields.number("test_tokens"),
        loss=fields.number("loss"),
        bits_per_byte=fields.number("bits_per_byte"),
        adversarial_weight=fields.number("adversarial_weight"),
        experts_per_token=fields.number("experts_per_token"),
    )


def _layer_evaluation(fields: Fields) -> LayerEvaluation:
    domain_load, domain_traffic = fields.child("domain_load"), fields.child("domain_traffic")
    return LayerEvaluation(
        name=fields.text("name") or "(unnamed layer)",
        max_violation=fields.number("max_violation"),
        min_violation=fields.number("min_violation"),
        mean_violation=fields.number("mean_violation"),
        dead_experts=fields.number("dead_experts"),
        routing_entropy=fields.number("routing_entropy"),
        router_similarity=fields.number("router_similarity"),
        repulsion=_repulsion(
            fields.child("congestion_coefficient"), fields.child("congestion_track")
        ),
        load=fields.counts("load"),
        domain_load={name: domain_load.counts(name) for name in domain_load.names()},
        congestion=fields.number("congestion"),
        domain_traffic={name: domain_traffic.counts(name) for name in domain_traffic.names()},
    )


def _repulsion(coefficient: Fields, track: Fields) -> Repulsion:
    return Repulsion(
        estimate=coefficient.number("estimate"),
        lower=coefficient.number("lower"),
        upper=coefficient.number("upper"),
        kinks=(track.number("first_kink"), track.number("second_kink")),
        has_phases=track.flag("three_phases"),
    )


def _budget_evaluation(fields: Fields) -> BudgetEvaluation:
    training, evaluation = fields.child("training"), fields.child("evaluation")
    return BudgetEvaluation(
        unit=fields.text("unit"),
        minimum=fields.number("minimum"),
        maximum=fields.number("maximum"),
        average=fields.number("average"),
        training_budget=training.number("budget"),
        training_spend=training.number("spend"),
        training_batches_over=training.number("batches_over"),
        evaluation_budget=evaluation.number("budget"),
        evaluation_spend=evaluation.number("spend"),
    )
