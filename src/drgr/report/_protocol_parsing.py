"""From ``protocol.json`` to its records."""

from drgr.report._fields import Fields
from drgr.report._protocol_records import (
    Points,
    ProtocolCompute,
    ProtocolDomain,
    ProtocolFairness,
    ProtocolLayer,
    ProtocolRecord,
    ProtocolRobustness,
)

_SCHEMA = "drgr.protocol/1"


def parse_protocol(fields: Fields, notes: list[str]) -> ProtocolRecord | None:
    """Reads ``protocol.json``; ``None``, with a note, for a version that is not known."""
    schema = fields.text("schema")
    if schema != _SCHEMA:
        notes.append(f"protocol.json has the schema {schema!r}, not {_SCHEMA!r}; left out.")
        return None
    data, fairness = fields.child("data"), fields.child("fairness")
    domains = fields.child("domains")
    return ProtocolRecord(
        corpus=data.text("corpus"),
        split=data.text("split"),
        step=fields.child("subject").number("step"),
        max_windows=data.number("max_windows"),
        domains={name: _domain(domains.child(name), fairness, name) for name in domains.names()},
        robustness=_robustness(fields.child("robustness")),
        fairness=_fairness(fairness),
        compute=_compute(fields.child("compute")),
        layers=tuple(_layer(layer) for layer in fields.children("balance")),
    )


def _domain(fields: Fields, fairness: Fields, name: str) -> ProtocolDomain:
    tails = fairness.child("token_losses").child("by_domain").child(name)
    deciles = fairness.child("frequency_deciles").child("by_domain").child(name)
    experts = fairness.child("experts").child(name)
    return ProtocolDomain(
        windows=fields.number("windows"),
        loss=fields.number("loss"),
        loss_error=fields.number("loss_standard_error"),
        bits_per_byte=fields.number("bits_per_byte"),
        bits_per_byte_error=fields.number("bits_per_byte_standard_error"),
        held_out=fields.flag("held_out_of_training"),
        tails=_points(tails, "cvar", "level"),
        deciles=deciles.counts("loss"),
        experts_per_token=experts.number("per_token"),
        dropped_share=experts.number("dropped_share"),
    )


def _robustness(fields: Fields) -> ProtocolRobustness:
    curve, mixtures, excess = (fields.child(key) for key in ("curve", "mixtures", "excess"))
    return ProtocolRobustness(
        mean=fields.number("mean"),
        worst_domain=fields.text("worst_domain"),
        worst=fields.number("worst"),
        cvar=_points(fields, "cvar", "level"),
        divergence=curve.text("divergence"),
        radii=curve.counts("radius"),
        values=curve.counts("value"),
        converged=curve.flag("converged"),
        mixtures=_points(mixtures, "quantiles", "share"),
        num_mixtures=mixtures.number("count"),
        reference=excess.text("reference"),
        excess=excess.numbers("by_domain"),
    )


def _fairness(fields: Fields) -> ProtocolFairness:
    tokens = fields.child("token_losses")
    return ProtocolFairness(
        gini=fields.number("gini"),
        max_minus_min=fields.number("max_minus_min"),
        tails=_points(tokens.child("pooled"), "cvar", "level"),
        deciles=fields.child("frequency_deciles").child("pooled").counts("loss"),
        kept=tokens.number("kept"),
        of=tokens.number("of"),
    )


def _compute(fields: Fields) -> ProtocolCompute:
    flops, latency, spend = (fields.child(key) for key in ("flops", "latency", "spend"))
    return ProtocolCompute(
        device=fields.text("device"),
        flops_per_token=flops.number("formula_per_token"),
        flops_difference=flops.number("relative_difference"),
        flops_agree=flops.flag("agrees"),
        p50_seconds=latency.number("p50_seconds"),
        p95_seconds=latency.number("p95_seconds"),
        repeats=latency.number("repeats"),
        tokens_per_second=latency.number("tokens_per_second"),
        peak_bytes=fields.child("peak_memory").number("bytes"),
        peak_kind=fields.child("peak_memory").text("kind"),
        assignments=spend.number("assignments"),
        budget=spend.number("budget"),
        layers_over=spend.number("layers_over"),
        exchanged_per_token=fields.child("exchanged_bytes").number("per_token"),
    )


def _layer(fields: Fields) -> ProtocolLayer:
    return ProtocolLayer(
        name=fields.text("name") or "(unnamed layer)",
        routing_entropy=fields.number("routing_entropy"),
        dead_experts=fields.number("dead_experts"),
        overload=fields.number("overload"),
        congestion=fields.number("congestion"),
    )


def _points(fields: Fields, key: str, first: str) -> Points:
    return tuple((entry.number(first), entry.number("value")) for entry in fields.children(key))
