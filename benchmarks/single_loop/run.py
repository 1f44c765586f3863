"""Stochastic single-loop methods: squared gradient of the value function against oracle calls.

Every method has the same number of trials of its step sizes on one seed with a share of the calls,
then runs on every seed. Two problems: the simulated quadratics of benchmark_bilevel, rebuilt from
their definition, and a quadratic of blocks of which each batch touches a few.

    python -m benchmarks.single_loop.run
"""

import argparse
import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.provenance import describe_source, write_result
from benchmarks.single_loop.problems import Instance, blocks, simulated
from drgr.bilevel import (
    F2SA,
    MASOBA,
    SABA,
    SOBA,
    SRBA,
    AmIGO,
    BlockWise,
    Estimator,
    FiniteSumProblem,
    GalerkinSOBA,
    SingleLoop,
    StocBiO,
    SubspaceSOBA,
)
from drgr.errors import NonFiniteLossError

SEEDS = (0, 1, 2)
STEPS = (0.01, 0.03, 0.1, 0.3)
RATIOS = (0.1, 1.0)
# Calls are cut into bins of equal length on a logarithmic scale.
BINS_PER_DECADE = 8
PENALTY = 10.0
MEMORY_BATCHES = 16
FALL_AFTER = 100
NOISY = (0.3, 1.0)
# Rates show when the start is forgotten.
LONGER = 3
GROWING = "F2SA, penalty like k^(6/7)"


@dataclass(frozen=True, slots=True)
class Method:
    """An estimator with the schedule that its theory asks for."""

    estimator: Estimator
    falling: bool = False
    """Whether the steps fall like ``(1 + t / 100)^(-1/2)``."""
    flat: bool = True
    """Whether the inner parameters are one tensor."""
    unscaled: bool = False
    """Whether the auxiliary direction of F2SA is not divided by its penalty."""

    def loop(self, step: float, ratio: float) -> SingleLoop:
        """Returns the method with given step sizes."""

        def factor(number: int) -> float:
            return (1 + number / FALL_AFTER) ** -0.5 if self.falling else 1.0

        def auxiliary_step(number: int) -> float:
            grown = PENALTY + 7 / 6 * (number + 1) ** (6 / 7) if self.unscaled else 1.0
            return step * factor(number) * grown

        return SingleLoop(
            estimator=self.estimator,
            inner_optimizer=lambda params: torch.optim.SGD(params, lr=step),
            inner_schedule=factor,
            auxiliary_step=auxiliary_step,
            outer_step=lambda number: step * ratio * factor(number),
        )


def methods(rank: int, num_batches: int) -> dict[str, Method]:
    """Returns the methods by name."""
    penalty = partial(F2SA, penalty=PENALTY)
    return {
        "SOBA": Method(SOBA(), falling=True),
        "MA-SOBA": Method(MASOBA(), falling=True),
        "SABA": Method(SABA()),
        "SRBA": Method(SRBA(period=num_batches)),
        "AmIGO": Method(AmIGO()),
        "StocBiO": Method(StocBiO()),
        "F2SA": Method(penalty(), falling=True),
        GROWING: Method(penalty(decay=1 / 7), falling=True, unscaled=True),
        "subspace, one-sided": Method(SubspaceSOBA(rank=rank), falling=True),
        "subspace, probe": Method(SubspaceSOBA(rank=rank, correction="probe"), falling=True),
        "subspace, independent": Method(
            SubspaceSOBA(rank=rank, correction="independent"), falling=True
        ),
        "Galerkin": Method(GalerkinSOBA(rank=rank, period=200, warmup=50), falling=True),
    }


def compared(
    methods: dict[str, Method], instance_of: Callable[[int], Instance], budget: int
) -> dict[str, dict[str, Any]]:
    """Returns for every method its tuned steps and its curves."""
    rows = {}
    instances = {seed: instance_of(seed) for seed in SEEDS}
    for name, method in methods.items():
        trials = []
        for step in STEPS:
            for ratio in RATIOS:
                curve = _curve(method, (step, ratio), instances[SEEDS[0]], SEEDS[0], budget // 3)
                trials.append({"step": step, "ratio": ratio, "last": curve["last"]})
        best = min(trials, key=lambda trial: math.inf if trial["last"] is None else trial["last"])
        curves = [
            _curve(method, (best["step"], best["ratio"]), instances[seed], seed, budget)
            for seed in SEEDS
        ]
        rows[name] = {
            "step": best["step"],
            "ratio": best["ratio"],
            "trials": trials,
            "falling_steps": method.falling,
            "last": _median([curve["last"] for curve in curves]),
            "slope": _median([curve["slope"] for curve in curves]),
            "curves": curves,
        }
        print(f"{name:<36}{rows[name]['last']} slope {rows[name]['slope']}", flush=True)
    return rows


def _curve(
    method: Method, steps: tuple[float, float], instance: Instance, seed: int, budget: int
) -> dict[str, Any]:
    """Runs a method until it spent its calls; ``last`` is None where it diverged."""
    inner: Any = (
        instance.inner if method.flat else list(instance.inner.split(_block_size(instance)))
    )
    start = instance.squared_gradient(instance.outer)
    run = method.loop(*steps).start(
        instance.problem, instance.outer, inner, generator=torch.Generator().manual_seed(seed)
    )
    bins: dict[int, list[tuple[int, float]]] = {}
    calls, found = 0, run.result()
    while calls < budget:
        try:
            run.advance()
            found = run.result()
        except NonFiniteLossError:
            return _diverged(start)
        calls, value = found.calls.total, instance.squared_gradient(found.outer_params)
        if value > 1e6 * start:
            return _diverged(start)
        bins.setdefault(round(BINS_PER_DECADE * math.log10(calls)), []).append((calls, value))
    points = [
        {"calls": round(_mean(calls)), "value": _mean(values)}
        for calls, values in (zip(*entries, strict=True) for entries in bins.values())
    ]
    return {
        "start": start,
        "points": points,
        "last": points[-1]["value"],
        "slope": _slope([point for point in points if point["calls"] >= budget / 10]),
        "steps": found.num_steps,
        "state_numel": found.state_numel,
        "negative_curvatures": found.num_negative_curvatures,
    }


def _diverged(start: float) -> dict[str, Any]:
    return {"start": start, "points": [], "last": None, "slope": None}


def _block_size(instance: Instance) -> int:
    return len(instance.inner) // len(instance.problem.inner_batches)


def _mean(values: Any) -> float:
    return statistics.fmean(values)


def _median(values: list[float | None]) -> float | None:
    kept = [value for value in values if value is not None]
    return statistics.median(kept) if len(kept) == len(values) else None


def _slope(points: list[dict[str, Any]]) -> float | None:
    """Returns the slope of the logarithm of the value against that of the calls."""
    if len(points) < 3 or any(point["value"] <= 0 for point in points):
        return None
    logs = [(math.log(point["calls"]), math.log(point["value"])) for point in points]
    return statistics.linear_regression(*zip(*logs, strict=True)).slope


def measure_rates(instance_of: Callable[[int], Instance], budget: int) -> dict[str, dict[str, Any]]:
    """Returns curves with steps so large that noise rules in the last decade, and their slopes."""
    chosen: dict[str, Estimator] = {"SOBA": SOBA(), "MA-SOBA": MASOBA()}
    rows = {}
    for name, estimator in chosen.items():
        method = Method(estimator, falling=True)
        curves = [_curve(method, NOISY, instance_of(seed), seed, budget) for seed in SEEDS]
        slope = _median([curve["slope"] for curve in curves])
        rows[name] = {"step": NOISY[0], "ratio": NOISY[1], "slope": slope, "curves": curves}
        print(f"{name} with steps {NOISY}: slope {slope}", flush=True)
    return rows


def measure_memory(dimension: int, rank: int) -> dict[str, int]:
    """Returns the entries kept between steps beside ``x`` and ``y``, with Adam on ``y``."""
    estimators: dict[str, Estimator] = {
        "SOBA": SOBA(),
        "MA-SOBA": MASOBA(),
        "SABA": SABA(),
        "SRBA": SRBA(period=4),
        "subspace": SubspaceSOBA(rank=rank),
        "Galerkin": GalerkinSOBA(rank=rank, period=10),
    }
    return {name: _kept(estimator, dimension) for name, estimator in estimators.items()}


def _kept(estimator: Estimator, dimension: int) -> int:
    problem = FiniteSumProblem(
        inner_loss=lambda x, y, batch: (y - x - batch).square().sum(),
        outer_loss=lambda x, y, batch: (y - batch).square().sum() + x.square(),
        inner_batches=range(MEMORY_BATCHES),
        outer_batches=range(MEMORY_BATCHES),
    )
    method = SingleLoop(
        estimator=estimator,
        inner_optimizer=lambda params: torch.optim.Adam(params, lr=1e-4),
        auxiliary_step=1e-4,
        outer_step=1e-6,
    )
    x, y = torch.zeros((), dtype=torch.float64), torch.zeros(dimension, dtype=torch.float64)
    return method.minimize(problem, x, y, num_steps=2).state_numel


def _falls(row: dict[str, Any], factor: float) -> bool:
    return all(
        curve["last"] is not None and curve["last"] <= factor * curve["start"]
        for curve in row["curves"]
    )


def _lower(rows: dict[str, dict[str, Any]], name: str, *others: str) -> bool:
    """Whether a method ends below others at the median, where one that diverged counts as above."""
    last = {key: math.inf if row["last"] is None else row["last"] for key, row in rows.items()}
    return all(last[name] < last[other] for other in others)


def _near(slope: float | None) -> bool:
    return slope is not None and -0.75 <= slope <= -0.25


def claims(
    rows: dict[str, dict[str, Any]],
    in_blocks: dict[str, dict[str, Any]],
    rates: dict[str, dict[str, Any]],
    memory: dict[str, int],
) -> dict[str, bool]:
    """Returns what must hold of the measurements."""
    plain = [row for name, row in rows.items() if name != GROWING]
    galerkin = rows["Galerkin"]["slope"]
    return {
        "SABA and SRBA, with constant steps, bring every seed below 1e-8 of its start": all(
            _falls(rows[name], 1e-8) for name in ("SABA", "SRBA")
        ),
        "SOBA and MA-SOBA, with large steps like t^(-1/2), have a slope within 0.25 of -1/2": all(
            _near(row["slope"]) for row in rates.values()
        ),
        "SOBA and MA-SOBA, with tuned steps like t^(-1/2), are not slower": all(
            row["slope"] is not None and row["slope"] <= -0.25
            for row in (rows["SOBA"], rows["MA-SOBA"])
        ),
        "every method of theory brings every seed below a tenth of its start": all(
            _falls(row, 0.1) for row in plain
        ),
        "AmIGO ends below StocBiO: a warm start pays": _lower(rows, "AmIGO", "StocBiO"),
        "F2SA ends lower with a penalty like k^(1/7) and steps divided by it than with one like "
        "k^(6/7) and steps that are not": _lower(rows, "F2SA", GROWING),
        "of the subspace methods the one-sided product ends lowest": _lower(
            rows, "subspace, one-sided", "subspace, probe", "subspace, independent"
        ),
        "Galerkin ends above SOBA: its bias shows": _lower(rows, "SOBA", "Galerkin"),
        "Galerkin is flat in the end, with a slope above -1/4": (
            galerkin is not None and galerkin > -0.25
        ),
        "block-wise SOBA ends within twice the value of SOBA": (
            in_blocks["block-wise SOBA"]["last"] <= 2 * in_blocks["SOBA"]["last"]
        ),
        "with Adam the subspace keeps under half of what SOBA keeps, Galerkin under a tenth": (
            2 * memory["subspace"] < memory["SOBA"] and 10 * memory["Galerkin"] < memory["SOBA"]
        ),
    }


def main() -> None:
    """Measures, prints and writes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--inner", type=int, default=100)
    parser.add_argument("--outer", type=int, default=10)
    parser.add_argument("--samples", type=int, default=1024)
    parser.add_argument("--batches", type=int, default=16)
    parser.add_argument("--rank", type=int, default=25)
    parser.add_argument("--budget", type=int, default=6000)
    parser.add_argument("--output", type=Path, default=Path(__file__).with_name("result.json"))
    parser.add_argument("--allow-dirty", action="store_true")
    arguments = parser.parse_args()
    environment = describe_source(allow_dirty=arguments.allow_dirty)
    torch.set_num_threads(1)
    sizes = {
        "inner_size": arguments.inner,
        "outer_size": arguments.outer,
        "num_samples": arguments.samples,
        "num_batches": arguments.batches,
    }
    instance_of = partial(simulated, **sizes)
    rates = measure_rates(lambda seed: instance_of(seed=seed), LONGER * arguments.budget)
    rows = compared(
        methods(arguments.rank, arguments.batches),
        lambda seed: instance_of(seed=seed),
        arguments.budget,
    )
    in_blocks = compared(*_block_problem(arguments.outer), arguments.budget)
    memory = measure_memory(10_000, 25)
    holds = claims(rows, in_blocks, rates, memory)
    content = {
        "claims": holds,
        "sizes": sizes | {"rank": arguments.rank, "budget": arguments.budget},
        "seeds": list(SEEDS),
        "threads": 1,
        "simulated": rows,
        "rates": rates,
        "blocks": in_blocks,
        "state_numel_with_adam": {
            "dimension": 10_000,
            "rank": 25,
            "batches": MEMORY_BATCHES,
            "entries": memory,
        },
    }
    write_result(arguments.output, environment, content)
    for claim, kept in holds.items():
        print("holds" if kept else "FAILS", claim)


def _block_problem(
    outer_size: int,
) -> tuple[dict[str, Method], Callable[[int], Instance]]:
    sizes = {"block_size": 10, "num_blocks": 8, "outer_size": outer_size, "num_touched": 2}
    _, touches = blocks(**sizes, seed=0)
    block_wise = BlockWise(touched=lambda batch: touches[batch])
    chosen = {
        "SOBA": Method(SOBA(), falling=True, flat=False),
        "block-wise SOBA": Method(block_wise, falling=True, flat=False),
    }
    return chosen, lambda seed: blocks(**sizes, seed=seed)[0]


if __name__ == "__main__":
    main()
