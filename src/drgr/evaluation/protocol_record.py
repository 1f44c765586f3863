"""The protocol's measurements as one JSON record, see ``docs/evaluation.md``."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from drgr.evaluation.compute import FLOP_TOLERANCE
from drgr.evaluation.fairness import gini
from drgr.evaluation.protocol import ComputeScores, ProtocolSettings
from drgr.evaluation.records import Json, layer_record, named
from drgr.evaluation.reference import Reference
from drgr.evaluation.robustness import (
    leave_one_out,
    mixture_losses,
    robust_curve,
    standard_error,
    tail_mean,
)
from drgr.evaluation.token_pass import TokenScores
from drgr.routing import congestion, exchanged_bytes
from drgr.routing.diagnostics import overload_factor, specialisation_histogram

SCHEMA = "drgr.protocol/1"
"""Name and version of the record; the version grows with every change that is not an addition."""

_MIXTURE_QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
_TOKEN_QUANTILES = (0.5, 0.9, 0.99)


def protocol_record(
    scores: TokenScores,
    compute: ComputeScores,
    settings: ProtocolSettings,
    *,
    subject: Json,
    corpus: Json,
    layer_names: tuple[str, ...],
    reference: Reference | None = None,
    training: Json | None = None,
) -> Json:
    """Describes a model by the whole protocol.

    Args:
        scores: The pass over the split.
        compute: The probe.
        settings: What was measured.
        subject: What was evaluated: ``kind``, ``name``, ``step``.
        corpus: ``name`` and ``fingerprint`` of the corpus.
        layer_names: Names of the MoE layers.
        reference: Another evaluation to compare with.
        training: What training of a run leaves, see :func:`evaluation_record`; ``None`` for a model
            whose training is not known, or of another corpus.

    Returns:
        A record of plain JSON types without numbers that are not finite.
    """
    held_out = None
    if training is not None:
        held_out = {name: tokens == 0 for name, tokens in training["train_tokens"].items()}
    return {
        "schema": SCHEMA,
        "subject": subject,
        "data": corpus
        | {
            "split": settings.split,
            "sequence_length": settings.sequence_length,
            "batch_size": settings.batch_size,
            "max_windows": settings.max_windows,
        },
        "domains": _domains(scores, held_out),
        "robustness": _robustness(scores, settings, reference, held_out),
        "fairness": _fairness(scores, settings),
        "compute": _compute(scores, compute, settings),
        "balance": _balance(scores, layer_names),
        "training": None if training is None else _training(training),
    }


def _domains(scores: TokenScores, held_out: Mapping[str, bool] | None) -> Json:
    sums = scores.domains
    errors = torch.tensor(
        [standard_error(windows) for windows in scores.window_losses], dtype=torch.float64
    )
    columns = {
        "loss": named(sums.domains, sums.losses),
        "loss_standard_error": named(sums.domains, errors),
        "bits_per_byte": named(sums.domains, sums.bits_per_byte),
        "bits_per_byte_standard_error": named(
            sums.domains, errors / math.log(2) / sums.bytes_per_token
        ),
        "experts_per_token": named(sums.domains, sums.experts_per_token),
    }
    return {
        name: {
            "tokens": int(sums.num_tokens[index]),
            "windows": len(scores.window_losses[index]),
            **{key: values[name] for key, values in columns.items()},
            "held_out_of_training": None if held_out is None else held_out[name],
        }
        for index, name in enumerate(sums.domains)
    }


def _robustness(
    scores: TokenScores,
    settings: ProtocolSettings,
    reference: Reference | None,
    held_out: Mapping[str, bool] | None,
) -> Json:
    names, bits = scores.domains.domains, scores.domains.bits_per_byte
    curve = robust_curve(bits, radii=settings.radii, divergence=settings.divergence)
    worst = int(bits.argmax())
    excluded = [name for name in names if held_out is not None and held_out[name]]
    return {
        "unit": "bits-per-byte",
        "mean": float(bits.mean()),
        "worst_domain": names[worst],
        "worst": float(bits[worst]),
        "cvar": [
            {"level": level, "value": float(tail_mean(bits, level=level))}
            for level in settings.domain_levels
        ],
        "excess": None if reference is None else _excess(names, bits, reference),
        "curve": {
            "divergence": type(settings.divergence).__name__,
            "radius": curve.radii.tolist(),
            "value": curve.values.tolist(),
            "effective_domains": curve.effective_domains.tolist(),
            "largest_gap": float(curve.gaps.max()),
            "converged": curve.converged,
            "status": curve.status,
        },
        "mixtures": _mixtures(bits, settings),
        "leave_one_out": _leave_one_out(names, bits),
        "held_out_domains": None if held_out is None else excluded,
    }


def _excess(names: tuple[str, ...], bits: Tensor, reference: Reference) -> Json:
    excess = bits - reference.bits_per_byte
    worst = int(excess.argmax())
    return {
        "reference": str(reference.path),
        "by_domain": named(names, excess),
        "mean": float(excess.mean()),
        "worst_domain": names[worst],
        "worst": float(excess[worst]),
    }


def _mixtures(bits: Tensor, settings: ProtocolSettings) -> Json:
    losses = mixture_losses(
        bits,
        num_mixtures=settings.num_mixtures,
        concentration=settings.concentration,
        seed=settings.mixture_seed,
    )
    return {
        "count": settings.num_mixtures,
        "concentration": settings.concentration,
        "seed": settings.mixture_seed,
        "mean": float(losses.mean()),
        "quantiles": _quantiles(losses, _MIXTURE_QUANTILES),
        "worst": float(losses.max()),
    }


def _leave_one_out(names: tuple[str, ...], bits: Tensor) -> Json:
    left = leave_one_out(bits)
    mean, worst = named(names, left.mean), named(names, left.worst)
    return {
        name: {
            "mean": mean[name],
            "worst_domain": None if index < 0 else names[index],
            "worst": worst[name],
        }
        for name, index in zip(names, left.worst_domain.tolist(), strict=True)
    }


def _fairness(scores: TokenScores, settings: ProtocolSettings) -> Json:
    names, bits = scores.domains.domains, scores.domains.bits_per_byte
    kept = sum(len(losses) for losses in scores.token_losses)
    by_domain = dict(zip(names, scores.token_losses, strict=True))
    return {
        "token_losses": {
            "unit": "nats",
            "kept": kept,
            "of": int(scores.domains.num_tokens.sum()),
            "kept_per_window": scores.kept_per_window,
            "exact": scores.kept_per_window == scores.sequence_length,
            "pooled": _tail(torch.cat(scores.token_losses), settings),
            "by_domain": {name: _tail(losses, settings) for name, losses in by_domain.items()},
        },
        "frequency_deciles": _deciles(scores),
        "gini": gini(bits),
        "max_minus_min": float(bits.max() - bits.min()),
        "max_over_min": float(bits.max() / bits.min()),
        "experts": _experts(scores),
    }


def _tail(losses: Tensor, settings: ProtocolSettings) -> Json:
    exact = losses.double()
    return {
        "mean": float(exact.mean()),
        "cvar": [
            {"level": level, "value": float(tail_mean(exact, level=level))}
            for level in settings.token_levels
        ],
        "quantiles": _quantiles(exact, _TOKEN_QUANTILES),
    }


def _quantiles(values: Tensor, shares: tuple[float, ...]) -> list[Json]:
    found = torch.quantile(values, torch.tensor(shares, dtype=values.dtype))
    return [
        {"share": share, "value": float(value)} for share, value in zip(shares, found, strict=True)
    ]


def _deciles(scores: TokenScores) -> Json:
    sums, tokens = scores.decile_loss_sums, scores.decile_tokens
    pooled_sums, pooled_tokens = sums.sum(dim=0), tokens.sum(dim=0)
    return {
        "order": "rarest first, by the training split",
        "pooled": {
            "loss": _or_null(pooled_sums / pooled_tokens),
            "tokens": pooled_tokens.tolist(),
        },
        "by_domain": {
            name: {
                "loss": _or_null(sums[index] / tokens[index]),
                "tokens": tokens[index].tolist(),
            }
            for index, name in enumerate(scores.domains.domains)
        },
    }


def _or_null(values: Tensor) -> list[float | None]:
    return [value if math.isfinite(value) else None for value in values.tolist()]


def _experts(scores: TokenScores) -> Json:
    """What compute each domain receives: shares are of pairs (token, layer), or of candidates."""
    counts = scores.expert_counts.double()
    pairs = counts.sum(dim=1)
    most = counts.shape[1] - 1
    mean = counts @ torch.arange(most + 1, dtype=torch.float64) / pairs
    return {
        name: {
            "per_token": float(mean[index]),
            "histogram": scores.expert_counts[index].tolist(),
            "dropped_share": float(counts[index, 0] / pairs[index]),
            "unused_candidate_share": float(1 - mean[index] / most),
        }
        for index, name in enumerate(scores.domains.domains)
    }


def _compute(scores: TokenScores, compute: ComputeScores, settings: ProtocolSettings) -> Json:
    flops, latency = compute.flops, compute.latency
    spend, tokens = scores.domains.spend, int(scores.domains.num_tokens.sum())
    forward, _ = exchanged_bytes(
        spend, width=compute.width, bytes_per_value=compute.bytes_per_value
    )
    return {
        "device": compute.device,
        "flops": {
            "tokens": flops.tokens,
            "assignments": flops.assignments,
            "formula": flops.formula,
            "counter": flops.counter,
            "relative_difference": flops.difference,
            "tolerance": FLOP_TOLERANCE,
            "agrees": flops.agrees,
            "reason": flops.reason,
            "formula_per_token": None if flops.formula is None else flops.formula / flops.tokens,
        },
        "latency": {
            "tokens": latency.tokens,
            "warmup": settings.warmup,
            "repeats": len(latency.seconds),
            "p50_seconds": latency.percentile(50),
            "p95_seconds": latency.percentile(95),
            "tokens_per_second": latency.tokens_per_second,
        },
        "peak_memory": {"bytes": compute.memory.num_bytes, "kind": compute.memory.kind},
        "spend": {
            "assignments": spend,
            "budget": scores.domains.limit if scores.has_budget else None,
            "layers_over": scores.layers_over if scores.has_budget else None,
            "per_token": spend / tokens,
        },
        "exchanged_bytes": {"forward": forward, "per_token": forward / tokens},
    }


def _balance(scores: TokenScores, layer_names: tuple[str, ...]) -> list[Json]:
    names, loads = scores.domains.domains, scores.domains.expert_load
    histogram = specialisation_histogram(loads)
    share = scores.domains.num_tokens.double() / scores.domains.num_tokens.sum()
    entropy = (scores.entropy * share).sum(dim=1)
    # Per token, so that a domain with more windows does not count as a busier link.
    busiest = congestion(loads / scores.domains.num_tokens.unsqueeze(1).double())
    layers = []
    for index, name in enumerate(layer_names):
        load = loads[index].sum(dim=0)
        layers.append(
            layer_record(name, load)
            | {
                "routing_entropy": _number(entropy[index]),
                "routing_entropy_by_domain": named(names, scores.entropy[index]),
                "overload": float(overload_factor(load)),
                "congestion": float(busiest[index]),
                "specialisation": dict(zip(names, histogram[index].tolist(), strict=True)),
            }
        )
    return layers


def _number(value: Tensor) -> float | None:
    return float(value) if math.isfinite(float(value)) else None


def _training(training: Mapping[str, Any]) -> Json:
    """The part of what training left that the protocol compares with."""
    kept = ("train_tokens", "average_share", "flops", "outer_flops", "budget", "exchanged_bytes")
    return {key: training[key] for key in kept}
