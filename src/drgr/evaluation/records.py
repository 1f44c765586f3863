"""Evaluation results as the JSON records of a run directory (see ``docs/run-directory.md``)."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

import torch
from torch import Tensor

from drgr.errors import ConfigError
from drgr.evaluation.congestion import congestion_record
from drgr.evaluation.domains import DomainScores
from drgr.routing import (
    dead_experts,
    load_percentiles,
    max_violation,
    mean_violation,
    min_violation,
    overload_factor,
)

Json = dict[str, Any]

_PERCENTILES = (5, 25, 50, 75, 95)


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertBounds:
    """Experts that a token may have, in any MoE layer.

    Attributes:
        minimum: Fewest.
        maximum: Most.
        average: Mean over layers of their average; ``None`` where nothing holds one.
    """

    minimum: int
    maximum: int
    average: float | None


def named(domains: Sequence[str], values: Tensor) -> dict[str, float | None]:
    """Pairs names with values; what is not a number becomes ``None``, which JSON calls null."""
    floats = [float(value) for value in values]
    return {
        domain: value if math.isfinite(value) else None
        for domain, value in zip(domains, floats, strict=True)
    }


def layer_record(name: str, load: Tensor) -> Json:
    """Describes the load of one layer, shape ``(E,)``."""
    return {
        "name": name,
        "load": load.tolist(),
        "max_violation": float(max_violation(load)),
        "min_violation": float(min_violation(load)),
        "mean_violation": float(mean_violation(load)),
        "dead_experts": int(dead_experts(load)),
    }


def evaluated_layers(scores: DomainScores) -> list[Json]:
    """Describes what every layer did with the evaluated tokens, and how alike its rows are."""
    layers = []
    for number, name in enumerate(scores.layer_names):
        load = scores.expert_load[number].sum(dim=0)
        percentiles = load_percentiles(load, _PERCENTILES).tolist()
        layers.append(
            layer_record(name, load)
            | {
                "overload_factor": float(overload_factor(load)),
                "load_percentiles": {
                    str(rank): value for rank, value in zip(_PERCENTILES, percentiles, strict=True)
                },
                "routing_entropy": float(scores.routing_entropy[number]),
                "router_similarity": float(scores.router_similarity[number]),
                "congestion_coefficient": congestion_record(scores.samples, number),
            }
        )
    return layers


def validation_record(scores: DomainScores, *, step: int) -> Json:
    """Describes an evaluation during training."""
    return {
        "kind": "validation",
        "step": step,
        "loss": named(scores.domains, scores.losses),
        "bits_per_byte": named(scores.domains, scores.bits_per_byte),
        "experts_per_token": named(scores.domains, scores.experts_per_token),
        **_summary(scores),
        "budget": scores.limit,
        "spend": scores.spend,
        "layers": evaluated_layers(scores),
    }


def evaluation_record(
    scores: DomainScores,
    *,
    split: str,
    step: int,
    bounds: ExpertBounds,
    training: Json,
    unseen: DomainScores | None = None,
) -> Json:
    """Describes a final evaluation.

    Args:
        scores: The evaluation.
        split: The split that was evaluated.
        step: Optimizer steps taken by then.
        bounds: Experts that a token may have.
        training: What training leaves: ``train_tokens``, ``adversarial_weight`` and
            ``average_share`` by domain, ``effective_domains``, ``flops``, ``outer_flops``,
            ``seconds``, ``tokens_per_second``, ``budget`` with ``budget``, ``spend`` and
            ``batches_over``, ``exchanged_bytes`` of a step, and for each of the ``layers`` its
            ``training_budget``, ``training_spend``, ``congestion``, ``congestion_track`` and
            ``domain_traffic``.
        unseen: The same evaluation of domains that training had no part of. They are in no other
            number of the record: the mean and the worst are over the domains of training.
    """
    losses = named(scores.domains, scores.losses)
    bits = named(scores.domains, scores.bits_per_byte)
    experts = named(scores.domains, scores.experts_per_token)
    domains = {
        name: {
            "train_tokens": training["train_tokens"][name],
            f"{split}_tokens": int(scores.num_tokens[index]),
            "loss": losses[name],
            "bits_per_byte": bits[name],
            "adversarial_weight": training["adversarial_weight"][name],
            "average_share": training["average_share"][name],
            "experts_per_token": experts[name],
        }
        for index, name in enumerate(scores.domains)
    }
    layers = [
        layer | {"domain_load": dict(zip(scores.domains, load.tolist(), strict=True))} | trained
        for layer, load, trained in zip(
            evaluated_layers(scores), scores.expert_load, training["layers"], strict=True
        )
    ]
    return {
        "split": split,
        "step": step,
        "flops": training["flops"],
        "outer_flops": training["outer_flops"],
        "seconds": training["seconds"],
        "tokens_per_second": training["tokens_per_second"],
        "domains": domains,
        "unseen": {} if unseen is None else _unseen_domains(unseen, split),
        **_summary(scores),
        "effective_domains": training["effective_domains"],
        "budget": {
            "unit": "experts",
            "minimum": bounds.minimum,
            "maximum": bounds.maximum,
            "average": None if bounds.average is None else float(bounds.average),
            "training": training["budget"],
            "evaluation": {"budget": scores.limit, "spend": scores.spend},
        },
        "exchanged_bytes": training["exchanged_bytes"],
        "layers": layers,
    }


def _unseen_domains(scores: DomainScores, split: str) -> Json:
    losses = named(scores.domains, scores.losses)
    bits = named(scores.domains, scores.bits_per_byte)
    experts = named(scores.domains, scores.experts_per_token)
    return {
        name: {
            f"{split}_tokens": int(scores.num_tokens[index]),
            "loss": losses[name],
            "bits_per_byte": bits[name],
            "experts_per_token": experts[name],
        }
        for index, name in enumerate(scores.domains)
    }


def average_mixture(path: Path, domains: Sequence[str]) -> Tensor:
    """Reads the average share of each domain in a run's objective, from its ``evaluation.json``.

    Returns:
        Shares that sum to 1, float64, shape ``(len(domains),)``.

    Raises:
        ConfigError: If the file cannot be read, or has no usable share of a domain.
    """
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))["domains"]
        shares = torch.tensor(
            [float(entries[name]["average_share"]) for name in domains], dtype=torch.float64
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"data.sampling names {path}, which is not the evaluation.json of a run on the domains "
            f"{list(domains)}: {type(error).__name__}: {error}"
        ) from error
    if not (bool((shares >= 0).all()) and 0 < float(shares.sum()) < torch.inf):
        raise ConfigError(
            f"data.sampling names {path}, whose average shares must be finite, not negative and "
            f"not all 0, got {shares.tolist()}"
        )
    return shares / shares.sum()


def _summary(scores: DomainScores) -> Json:
    bits = scores.bits_per_byte
    return {
        "mean_bits_per_byte": float(bits.mean()),
        "worst_domain": scores.domains[scores.worst],
        "worst_bits_per_byte": float(bits.max()),
    }
