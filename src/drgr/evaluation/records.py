"""Evaluation results as the JSON records of a run directory (see ``docs/run-directory.md``)."""

import math
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from drgr.budgets import TokenBudget
from drgr.evaluation.domains import DomainScores
from drgr.routing import max_violation, min_violation

Json = dict[str, Any]


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
    }


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
    }


def evaluation_record(
    scores: DomainScores,
    *,
    split: str,
    step: int,
    layer_names: Sequence[str],
    budget: TokenBudget,
    training: Json,
) -> Json:
    """Describes a final evaluation.

    Args:
        scores: The evaluation.
        split: The split that was evaluated.
        step: Optimizer steps taken by then.
        layer_names: Names of the MoE layers.
        budget: The budget of each layer, in experts.
        training: What training leaves: ``train_tokens`` and ``adversarial_weight`` by domain,
            ``effective_domains``, ``flops``, ``seconds``, ``tokens_per_second``, ``budget`` with
            ``budget``, ``spend`` and ``batches_over``, ``exchanged_bytes`` of a step, and for each
            of the ``layers`` its ``congestion`` and ``domain_traffic``.
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
            "experts_per_token": experts[name],
        }
        for index, name in enumerate(scores.domains)
    }
    layers = [
        layer_record(name, load.sum(dim=0))
        | {"domain_load": dict(zip(scores.domains, load.tolist(), strict=True))}
        | trained
        for name, load, trained in zip(
            layer_names, scores.expert_load, training["layers"], strict=True
        )
    ]
    return {
        "split": split,
        "step": step,
        "flops": training["flops"],
        "seconds": training["seconds"],
        "tokens_per_second": training["tokens_per_second"],
        "domains": domains,
        **_summary(scores),
        "effective_domains": training["effective_domains"],
        "budget": {
            "unit": "experts",
            "minimum": budget.minimum,
            "maximum": budget.maximum,
            "average": float(budget.average),
            "training": training["budget"],
            "evaluation": {"budget": scores.limit, "spend": scores.spend},
        },
        "exchanged_bytes": training["exchanged_bytes"],
        "layers": layers,
    }


def _summary(scores: DomainScores) -> Json:
    bits = scores.bits_per_byte
    return {
        "mean_bits_per_byte": float(bits.mean()),
        "worst_domain": scores.domains[scores.worst],
        "worst_bits_per_byte": float(bits.max()),
    }
