"""What a comparison found, as one JSON record; ``docs/comparing-methods.md`` describes it."""

import itertools
import statistics
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from drgr.experiments.experiment import FIGURES
from drgr.experiments.planning import Comparison
from drgr.experiments.statistics import (
    frontier,
    holm,
    mean_interval,
    mean_ranks,
    sign_flip_p,
    student_p,
)
from drgr.experiments.store import Store, StoredRun

Json = dict[str, Any]

SCHEMA = 1
COMPARED = ("worst_bits_per_byte", "mean_bits_per_byte")
"""Figures whose differences are tested; lower is better."""


def summarize(comparison: Comparison, store: Store) -> Json:
    """Returns everything that the store says about an experiment.

    Figures are those of runs on the test split that finished within their FLOPs; every other run is
    named with what became of it.
    """
    runs, experiment = store.runs("final"), comparison.experiment
    finished = {
        variant.name: {
            run.seed: run for run in runs if run.method == variant.name and run.status == "finished"
        }
        for variant in comparison.variants
    }
    ranks = _ranks(finished)
    content: Json = {
        "schema": SCHEMA,
        "name": experiment.name,
        "reference": comparison.reference.name,
        "flops_rule": experiment.flops,
        "confidence": experiment.confidence,
        "seeds": list(experiment.seeds),
        "complete": len(runs) == len(comparison.variants) * len(experiment.seeds)
        and all(run.status == "finished" for run in runs),
        "environment": _environment(store.runs()),
        "methods": [
            _method(comparison, variant.name, runs, finished[variant.name])
            for variant in comparison.variants
        ],
        "ranks": ranks,
        "pairs": _pairs(finished, confidence=experiment.confidence),
        "failures": store.failures(),
        "trials": [_trial(run) for run in store.runs("tuning")],
        "runs": [_run(run) for run in runs],
    }
    _mark_frontiers(content["methods"])
    return content


def _method(
    comparison: Comparison, name: str, runs: Sequence[StoredRun], finished: dict[int, StoredRun]
) -> Json:
    variant = next(one for one in comparison.variants if one.name == name)
    mine = [run for run in runs if run.method == name]
    confidence = comparison.experiment.confidence
    evaluations = [run.evaluation for run in finished.values() if run.evaluation]
    return {
        "name": name,
        "settings": list(variant.settings),
        "tuned": mine[0].settings if mine else None,
        "steps": sorted({run.steps for run in mine}),
        "flops_limit": mine[0].flops_limit if mine else None,
        "runs": {
            status: sum(run.status == status for run in mine)
            for status in ("planned", "running", "finished", "failed", "over")
        },
        "figures": {
            figure: _spread([found[figure] for found in evaluations], confidence)
            for figure in FIGURES
        },
        "domains": {
            domain: _spread(
                [found["domains"][domain]["bits_per_byte"] for found in evaluations], confidence
            )
            for domain in (evaluations[0]["domains"] if evaluations else ())
        },
    }


def _spread(values: Sequence[float | None], confidence: float) -> Json | None:
    """Returns mean, deviation and interval over seeds; None where there is no value."""
    known = [value for value in values if value is not None]
    if not known:
        return None
    interval = asdict(mean_interval(known, confidence=confidence))
    return {**interval, "sd": statistics.stdev(known) if len(known) > 1 else None}


def _ranks(finished: dict[str, dict[int, StoredRun]]) -> Json:
    """Ranks methods on the seeds that every one of them finished, and names the others."""
    ran = {name: runs for name, runs in finished.items() if runs}
    everywhere = set.intersection(*(set(runs) for runs in ran.values())) if ran else set()
    seeds = sorted(everywhere)
    left_out = sorted({seed for runs in ran.values() for seed in runs} - everywhere)
    content: Json = {
        "seeds": seeds,
        "seeds_left_out": left_out,
        "methods_left_out": [name for name in finished if name not in ran],
    }
    for figure in COMPARED:
        values = {
            name: [_value(runs[seed], figure) for seed in seeds] for name, runs in ran.items()
        }
        content[figure] = mean_ranks(values) if seeds else {}
    return content


def _pairs(finished: dict[str, dict[int, StoredRun]], *, confidence: float) -> list[Json]:
    """Compares every two methods on the seeds that both finished, corrected within a figure."""
    found = []
    for figure in COMPARED:
        rows = []
        for first, second in itertools.combinations(finished, 2):
            seeds = sorted(set(finished[first]) & set(finished[second]))
            row: Json = {"figure": figure, "a": first, "b": second, "seeds": seeds}
            if seeds:
                differences = [
                    _value(finished[first][seed], figure) - _value(finished[second][seed], figure)
                    for seed in seeds
                ]
                row |= {
                    "difference": asdict(mean_interval(differences, confidence=confidence)),
                    "p_sign_flip": sign_flip_p(differences),
                    "p_student": student_p(differences),
                }
            else:
                row |= {"difference": None, "p_sign_flip": None, "p_student": None}
            rows.append(row)
        for test in ("p_sign_flip", "p_student"):
            known = [row for row in rows if row[test] is not None]
            for row in rows:
                row[f"{test}_holm"] = None
            for row, corrected in zip(known, holm([row[test] for row in known]), strict=True):
                row[f"{test}_holm"] = corrected
        found += rows
    return found


def _mark_frontiers(methods: Sequence[Json]) -> None:
    """Says of each method whether it is on the two frontiers; None where it has no figures."""
    worst, mean, flops = "worst_bits_per_byte", "mean_bits_per_byte", "flops"
    for key, other in (("on_worst_mean_frontier", mean), ("on_worst_flops_frontier", flops)):
        known = [one for one in methods if one["figures"][worst] is not None]
        marks = frontier(
            [(one["figures"][other]["mean"], one["figures"][worst]["mean"]) for one in known]
        )
        for one in methods:
            one[key] = None
        for one, mark in zip(known, marks, strict=True):
            one[key] = mark


def _environment(runs: Sequence[StoredRun]) -> Json:
    """Returns where results came from; more than one commit or machine shows."""
    found = [run.environment for run in runs if run.environment]
    return {
        "commits": _distinct([one["commit"] for one in found]),
        "dirty": any(one["dirty"] for one in found),
        "versions": _distinct([one["versions"] for one in found]),
        "hardware": _distinct([one["hardware"] for one in found]),
    }


def _distinct(values: Sequence[Any]) -> list[Any]:
    return [value for index, value in enumerate(values) if value not in values[:index]]


def _value(run: StoredRun, figure: str) -> float:
    assert run.evaluation is not None
    return float(run.evaluation[figure])


def _run(run: StoredRun) -> Json:
    evaluation = run.evaluation or {}
    return {
        "name": run.name,
        "method": run.method,
        "seed": run.seed,
        "status": run.status,
        "attempts": run.attempts,
        "error": run.error,
        "steps": run.steps,
        "flops_limit": run.flops_limit,
        "flops_predicted": run.flops_predicted,
        "worst_domain": evaluation.get("worst_domain"),
        "figures": {figure: evaluation.get(figure) for figure in FIGURES},
        "bits_per_byte": {
            domain: entries["bits_per_byte"]
            for domain, entries in evaluation.get("domains", {}).items()
        },
    }


def _trial(run: StoredRun) -> Json:
    return {
        "method": run.method,
        "trial": run.trial,
        "status": run.status,
        "settings": run.settings,
        "objective": run.objective,
        "error": run.error,
    }
