"""Made-up comparisons in the form that ``benchmarks.headline.collect`` writes."""

import math
from collections.abc import Callable, Mapping
from typing import Any

import pytest
from scipy import stats

BITS = Mapping[str, Mapping[int, Mapping[str, float]]]
"""Method, seed, domain: bits per byte."""


def difference(first: list[float], second: list[float]) -> dict[str, Any]:
    """A paired difference as the summary of a comparison has it, without the bootstrap."""
    values = [mine - theirs for mine, theirs in zip(first, second, strict=True)]
    count = len(values)
    mean = sum(values) / count
    if count == 1:
        return {"mean": mean, "count": 1, "student_low": None, "student_high": None}
    deviation = math.sqrt(sum((value - mean) ** 2 for value in values) / (count - 1))
    half = float(stats.t.ppf(0.975, count - 1)) * deviation / math.sqrt(count)
    return {
        "mean": mean,
        "count": count,
        "student_low": mean - half,
        "student_high": mean + half,
    }


def run(method: str, seed: int, bits: Mapping[str, float], extra: Any) -> dict[str, Any]:
    return {
        "method": method,
        "seed": seed,
        "status": "finished",
        "steps": 240,
        "worst_bits_per_byte": max(bits.values()),
        "mean_bits_per_byte": sum(bits.values()) / len(bits),
        "flops": 1e12,
        "outer_flops": 0.0,
        "worst_domain": max(bits, key=bits.__getitem__),
        "bits_per_byte": dict(bits),
        "congestion": 5.0,
        "batches_over_budget": 0,
        **extra,
    }


def pairs(bits: BITS, name: str) -> list[dict[str, Any]]:
    found = []
    for figure in ("worst_bits_per_byte", "mean_bits_per_byte"):
        for other in bits:
            if other == name or name not in bits:
                continue
            seeds = sorted(set(bits[name]) & set(bits[other]))
            rows = [
                [run(one, seed, bits[one][seed], {})[figure] for seed in seeds]
                for one in (other, name)
            ]
            pair = {"figure": figure, "a": other, "b": name, "seeds": seeds}
            found.append(pair | {"difference": difference(*rows), "p_student_holm": 0.25})
    return found


@pytest.fixture(scope="session")
def made_up() -> Callable[..., dict[str, Any]]:
    """Builds a result from bits per byte; ``extra`` has more figures of a method's runs."""

    def build(
        bits: BITS,
        *,
        name: str = "made-up",
        reference: str | None = None,
        of_interest: str = "DRGR",
        extra: Mapping[str, Mapping[str, Any]] = {},
        failed: tuple[str, ...] = (),
    ) -> dict[str, Any]:
        return {
            "name": name,
            "reference": reference or next(iter(bits)),
            "flops_rule": "cut",
            "confidence": 0.95,
            "seeds": sorted({seed for rows in bits.values() for seed in rows}),
            "complete": not failed,
            "environment": {
                "commits": ["0123456789abcdef"],
                "hardware": [{"processor": "AMD", "cores": 2, "accelerator": None}],
            },
            "methods": [
                {
                    "name": method,
                    "settings": ["robustness.losses=train"],
                    "tuned": {},
                    "steps": [240],
                    "runs": {},
                }
                for method in (*bits, *failed)
            ],
            "pairs": pairs(bits, of_interest),
            "trials": [],
            "runs": [
                run(method, seed, by_domain, extra.get(method, {}))
                for method, rows in bits.items()
                for seed, by_domain in rows.items()
            ]
            + [run(method, 1, {"a": 9.0}, {}) | {"status": "failed"} for method in failed],
            "setting": {
                "num_layers": 2,
                "hidden_size": 96,
                "expert_size": 96,
                "num_experts": 8,
                "batch_size": 8,
                "sequence_length": 128,
                "steps": 240,
            },
        }

    return build
