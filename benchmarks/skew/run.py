"""Every balance controller on skewed routers: how soon, how near, at what cost.

Fresh tokens in every step; prices of a step come from the steps before it. Six kinds of skew,
sigmoid and softmax scores, then unequal targets, cost a step, and what is known of the methods.

    python -m benchmarks.skew.run
"""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.provenance import describe_source, write_result
from benchmarks.skew import known
from benchmarks.skew.routers import ACTIVATIONS, KINDS, Router, route
from benchmarks.timing import interleaved
from drgr.routing import (
    BipBalancing,
    CongestionPrice,
    DecayingSubgradient,
    NoPrices,
    PriceController,
    QuantileBalancing,
    RmsBias,
    SelectiveSinkhorn,
    SignBias,
    SinkhornPrices,
    max_violation,
    min_violation,
)

TOP_K = 2
BALANCED = 0.3
WINDOW = 10
# Experts of four sizes, as on devices of four speeds.
SIZES = (1.0, 2.0, 3.0, 4.0)

Maker = Callable[..., PriceController]
CONTROLLERS: dict[str, Maker] = {
    "none": lambda experts, **_: NoPrices(experts),
    "sign, u 0.001": SignBias,
    "sign, u 0.01": lambda experts, **target: SignBias(experts, step_size=0.01, **target),
    "RMS, u 0.01": lambda experts, **target: RmsBias(experts, step_size=0.01, **target),
    "subgradient, 1/sqrt(n)": DecayingSubgradient,
    "subgradient, 1/n": lambda experts, **target: DecayingSubgradient(experts, decay=1, **target),
    "congestion, 0.2": lambda experts, **target: CongestionPrice(experts, strength=0.2, **target),
    "quantile": QuantileBalancing,
    "quantile, smoothed 0.9": lambda experts, **target: QuantileBalancing(
        experts, smoothing=0.9, **target
    ),
    "BIP, 8 iterations": BipBalancing,
    "Sinkhorn, scores": SinkhornPrices,
    "Sinkhorn, log scores": lambda experts, **target: SinkhornPrices(
        experts, cost="log-scores", regularization=0.5, **target
    ),
    "Selective Sinkhorn": SelectiveSinkhorn,
}


def simulate(
    controller: PriceController, router: Router, activation: str, num_steps: int
) -> Tensor:
    """Returns the loads of all steps, shape ``(steps, E)``."""
    loads = []
    for step in range(num_steps):
        scores = ACTIVATIONS[activation](router.draw(step, controller.prices))
        record = route(scores, controller.prices, TOP_K)
        loads.append(record.plan.expert_load)
        controller.observe(record)
        controller.update()
    return torch.stack(loads)


def measure_skew(num_tokens: int, num_experts: int, num_steps: int) -> list[dict[str, Any]]:
    """Returns a row per kind of skew, activation and controller."""
    rows = []
    for kind in KINDS:
        for activation in ACTIVATIONS:
            for name, make in CONTROLLERS.items():
                router = Router(kind, num_tokens=num_tokens, num_experts=num_experts, seed=0)
                loads = simulate(make(num_experts), router, activation, num_steps)
                label = {"skew": kind, "activation": activation, "controller": name}
                rows.append(label | _summary(loads))
    return rows


def _summary(loads: Tensor) -> dict[str, Any]:
    highest, lowest = max_violation(loads), min_violation(loads)
    num_steps = len(loads)
    last = slice(num_steps - max(1, num_steps // 4), None)
    curve = range(0, num_steps, max(1, num_steps // 10))
    return {
        "steps_to_balance": _steps_to_balance(highest),
        "max_violation": {
            "mean": float(highest.mean()),
            "highest": float(highest.max()),
            "last_quarter": float(highest[last].mean()),
            "curve": {str(step): float(highest[step]) for step in curve},
        },
        "min_violation": {
            "mean": float(lowest.mean()),
            "last_quarter": float(lowest[last].mean()),
        },
    }


def _steps_to_balance(highest: Tensor) -> int | None:
    """Returns the first step of a window whose mean violation is low; None without one."""
    if len(highest) < WINDOW:
        return None
    low = (highest.unfold(0, WINDOW, 1).mean(dim=1) <= BALANCED).nonzero()
    return int(low[0]) if len(low) else None


def measure_targets(num_tokens: int, num_experts: int, num_steps: int) -> list[dict[str, Any]]:
    """Returns how far each controller ends from loads in proportion to sizes."""
    target = [SIZES[expert % len(SIZES)] for expert in range(num_experts)]
    due = torch.tensor(target).double()
    due = due / due.sum() * num_tokens * TOP_K
    rows = []
    for name, make in CONTROLLERS.items():
        router = Router("Zipf", num_tokens=num_tokens, num_experts=num_experts, seed=0)
        loads = simulate(make(num_experts, target=target), router, "sigmoid", num_steps)
        error = (loads[num_steps - max(1, num_steps // 4) :] / due - 1).mean(dim=0).abs()
        rows.append({"controller": name, "largest_relative_error_of_mean_load": float(error.max())})
    return rows


def measure_cost(num_tokens: int, num_experts: int, rounds: int) -> dict[str, Any]:
    """Returns the time of one step of each controller over that of routing the same batch."""
    router = Router("Zipf", num_tokens=num_tokens, num_experts=num_experts, seed=0)
    batches = [router.draw(step, torch.zeros(num_experts)).sigmoid() for step in range(8)]
    controllers = {name: make(num_experts) for name, make in CONTROLLERS.items()}
    state = dict.fromkeys(controllers, 0)

    def step(name: str) -> None:
        controller, state[name] = controllers[name], state[name] + 1
        record = route(batches[state[name] % len(batches)], controller.prices, TOP_K)
        controller.observe(record)
        controller.update()

    timed = {name: (lambda name=name: step(name)) for name in controllers}
    seconds = interleaved(timed, rounds=rounds)
    base = seconds["none"]["median"]
    return {
        "seconds": seconds,
        "ratio_to_none": {name: times["median"] / base for name, times in seconds.items()},
    }


def claims(rows: list[dict[str, Any]], targets: list[dict[str, Any]]) -> dict[str, bool]:
    """Returns what must hold of the suite."""
    last = {
        (row["skew"], row["activation"], row["controller"]): row["max_violation"]["last_quarter"]
        for row in rows
    }
    least = {
        (row["skew"], row["activation"], row["controller"]): row["min_violation"]["last_quarter"]
        for row in rows
    }
    standing = [(kind, activation) for kind in KINDS[:3] for activation in ACTIVATIONS]
    skewed = [(kind, activation) for kind in KINDS[1:5] for activation in ACTIVATIONS]
    error = {row["controller"]: row["largest_relative_error_of_mean_load"] for row in targets}
    return {
        "without prices no skewed router ends balanced": all(
            last[*place, "none"] > BALANCED for place in skewed
        ),
        "quantile balancing ends below 0.4 on every standing skew": all(
            last[*place, "quantile"] < 0.4 for place in standing
        ),
        "quantile balancing follows a moving hot spot better than every sign or decaying step": all(
            last["moving hot spot", activation, "quantile"]
            < last["moving hot spot", activation, name]
            for activation in ACTIVATIONS
            for name in CONTROLLERS
            if name.startswith(("sign", "RMS", "subgradient"))
        ),
        "a step of 1/n ends above 3 behind a moving hot spot": all(
            last["moving hot spot", activation, "subgradient, 1/n"] > 3
            for activation in ACTIVATIONS
        ),
        "Sinkhorn prices of scores leave no expert below half its share on a standing skew": all(
            least[*place, "Sinkhorn, scores"] > -0.5 for place in standing
        ),
        known.LOG_SCORES: all(least[*place, "Sinkhorn, log scores"] > -0.5 for place in standing),
        "proportional control ends above the subgradient on every standing skew, sigmoid": all(
            last[kind, "sigmoid", "congestion, 0.2"] > last[kind, "sigmoid", "subgradient, 1/n"]
            for kind in KINDS[1:3]
        ),
        "Selective Sinkhorn ends within a tenth of no prices": all(
            last[*place, "Selective Sinkhorn"] > 0.9 * last[*place, "none"] for place in skewed[:4]
        ),
        "unequal targets: sign 0.01, subgradient and quantile are within 0.15": all(
            error[name] < 0.15
            for name in ("sign, u 0.01", "subgradient, 1/sqrt(n)", "quantile, smoothed 0.9")
        ),
    }


def main() -> None:
    """Measures, prints and writes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--experts", type=int, default=16)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--known-tokens", type=int, default=4096)
    parser.add_argument("--known-updates", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--output", type=Path, default=Path(__file__).with_name("result.json"))
    parser.add_argument("--allow-dirty", action="store_true")
    arguments = parser.parse_args()
    environment = describe_source(allow_dirty=arguments.allow_dirty)
    torch.set_num_threads(1)
    size = (arguments.tokens, arguments.experts)
    rows = measure_skew(*size, arguments.steps)
    targets = measure_targets(*size, arguments.steps)
    cost = measure_cost(*size, arguments.rounds)
    signs = known.measure_sign_rule(arguments.known_tokens, arguments.known_updates)
    transports = known.measure_transport(arguments.known_tokens)
    clips = known.measure_clip(4 * arguments.known_tokens)
    batches = known.measure_batches(arguments.known_tokens)
    logs = known.measure_log_scores(*size)
    holds = claims(rows, targets) | known.claims(signs, transports, clips)
    reasons = known.reasons(batches, logs)
    content = {
        "claims": holds,
        # Of what does not hold; a claim that fails without a reason is to be looked into.
        "reasons": {name: reasons.get(name) for name, kept in holds.items() if not kept},
        "tokens": arguments.tokens,
        "experts": arguments.experts,
        "top_k": TOP_K,
        "steps": arguments.steps,
        "balanced_below": BALANCED,
        "balance_window": WINDOW,
        "seed": 0,
        "threads": 1,
        "skews": rows,
        "targets": targets,
        "cost": cost,
        "known": {
            "sign_rule": signs,
            "transport": transports,
            "clip": clips,
            "batches": batches,
            "log_scores": logs,
        },
    }
    write_result(arguments.output, environment, content)
    for row in rows:
        print(
            f"{row['skew']:<18}{row['activation']:<8}{row['controller']:<24}"
            f"last MaxVio {row['max_violation']['last_quarter']:6.2f} "
            f"MinVio {row['min_violation']['last_quarter']:6.2f} "
            f"balanced from {row['steps_to_balance']}"
        )
    for name, ratio in cost["ratio_to_none"].items():
        print(f"{name:<24}{ratio:6.2f} times a step without prices")
    for claim, kept in holds.items():
        print("holds" if kept else f"FAILS ({reasons.get(claim)})", claim)


if __name__ == "__main__":
    main()
