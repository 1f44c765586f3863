"""Problems with known truth: regret to the optimal mixture, recovery of planted routing, and cost.

*Mixture.* Linear regression in ``G`` domains, with a spurious feature whose sign is turned around
in rare domains and noise that differs by domain. Population risks are quadratics in closed form, so
the minimax predictor, the mixture that it is optimal for and every regret are exact. All methods
descend on as many samples, held-out ones of the bilevel mixture included.

*Routing.* Clusters of tokens, each with a planted expert; a ``MoELayer`` of as many experts learns
from tokens whose clusters it is not told. All methods spend two experts a token in training; at
evaluation, where every cluster is as frequent, frozen prices decide, and the spend is recorded.

    python -m benchmarks.synthetic.run

(Settings are the same for all sizes and were not tuned by method. Times are CPU seconds of the
process with one thread; only their ratios within one run mean something.)
"""

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from benchmarks.provenance import describe_source, write_result
from benchmarks.spread import mean_and_deviation
from benchmarks.synthetic import mixtures, routing

SIZE = {"mixture": "domains", "routing": "experts"}
FIELDS = {
    "mixture": (
        *("regret_excess", "mixture_regret_excess", "mixture_distance_excess"),
        *("regret_raw", "mixture_regret_raw", "mixture_distance_raw"),
        *("mean_excess", "ratio_to_uniform", "seconds_per_step"),
    ),
    "routing": (
        *("information", "purity", "matched", "mean_loss", "worst_loss", "rare_loss"),
        *("experts_per_token", "ratio_to_auxiliary_loss", "routing_share", "seconds_per_step"),
    ),
}
LARGEST_GAP = 1e-6
LARGEST_REGRET = 0.1

Row = dict[str, Any]


def summary(rows: list[Row]) -> list[Row]:
    """Returns a row for each part, size and method: means and deviations over seeds."""
    groups: dict[tuple[str, int, str], list[Row]] = {}
    for row in rows:
        key = (row["part"], row[SIZE[row["part"]]], row["method"])
        groups.setdefault(key, []).append(row)
    return [
        {
            "part": part,
            SIZE[part]: size,
            "method": method,
            "seeds": len(group),
            **{
                field: mean_and_deviation(row[field] for row in group)
                for field in FIELDS[part]
                if field in group[0]
            },
        }
        for (part, size, method), group in groups.items()
    ]


def claims(rows: list[Row], tested: list[Row]) -> dict[str, bool]:
    """Returns what must hold of the measurements."""
    mixture = [row for row in rows if row["part"] == "mixture"]
    oracles = {
        (target, row["domains"]): row[f"regret_{target}"]["mean"]
        for row in tested
        for target in ("excess", "raw")
        if row["method"] == f"{mixtures.ORACLE} ({target})"
    }
    return {
        f"the oracle's duality gap is at most {LARGEST_GAP:g} everywhere": all(
            row["oracle_gap"] <= LARGEST_GAP for row in mixture
        ),
        "no predictor is better than the oracle": all(
            row[field] >= -LARGEST_GAP
            for row in mixture
            for field in ("regret_excess", "regret_raw", "mixture_regret_excess")
        ),
        f"sampling the optimal mixture ends within {LARGEST_REGRET:g} of its value": all(
            regret <= LARGEST_REGRET for regret in oracles.values()
        ),
        "no batch spends more than its budget": all(
            row["over_budget"] == 0 for row in rows if row["part"] == "routing"
        ),
    }


def observations(tested: list[Row]) -> dict[str, bool]:
    """Returns what is worth knowing, whichever way it comes out."""
    regrets = {
        (row["domains"], row["method"]): row["regret_excess"]["mean"]
        for row in tested
        if row["part"] == "mixture"
    }
    sizes = sorted({size for size, _ in regrets})
    routed = {(row["experts"], row["method"]): row for row in tested if row["part"] == "routing"}
    seen = {}
    for name in (mixtures.GROUP_DRO, mixtures.SAMPLING) if sizes else ():
        excess, raw = f"{name} (excess)", f"{name} (raw)"
        seen[f"{name} has less regret than uniform sampling at every size"] = all(
            regrets[size, excess] < regrets[size, mixtures.UNIFORM] for size in sizes
        )
        seen[f"{name} has less excess regret on excess than on raw losses at every size"] = all(
            regrets[size, excess] < regrets[size, raw] for size in sizes
        )
    for field, better in (("information", "more"), ("worst_loss", "less")):
        sign = 1 if better == "more" else -1
        for method in (routing.BUDGETED, routing.PLANTED) if routed else ():
            seen[f"{method}: {better} {field} than the auxiliary loss at every size"] = all(
                sign * (row[field]["mean"] - routed[size, routing.AUXILIARY_LOSS][field]["mean"])
                > 0
                for (size, name), row in routed.items()
                if name == method
            )
    return seen


def measure(arguments: argparse.Namespace) -> Iterator[list[Row]]:
    """Yields the rows of one size after the other; large layers have fewer seeds."""
    for num_domains in arguments.domains:
        rows: list[Row] = []
        for seed in range(arguments.seeds):
            rows += mixtures.measure(num_domains, seed, samples=arguments.samples)
        yield rows
    for num_experts in arguments.experts:
        rows = []
        is_large = num_experts >= arguments.large
        for seed in range(arguments.large_seeds if is_large else arguments.routing_seeds):
            rows += routing.measure(
                num_experts,
                seed,
                steps=arguments.steps,
                num_tokens=arguments.tokens,
                rounds=arguments.rounds,
            )
        yield rows


def content_of(rows: list[Row], setting: dict[str, Any]) -> dict[str, Any]:
    """Returns what is written of the rows so far."""
    tested = summary(rows)
    return {
        "claims": claims(rows, tested),
        "observations": observations(tested),
        "setting": setting,
        "summary": tested,
        "runs": rows,
    }


def main() -> None:
    """Measures, prints and writes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--domains", type=int, nargs="+", default=[4, 16, 64, 256])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--samples", type=int, default=38_400)
    parser.add_argument("--experts", type=int, nargs="+", default=[8, 32, 128, 512])
    parser.add_argument("--routing-seeds", type=int, default=2)
    parser.add_argument("--large", type=int, default=128, help="experts that count as many")
    parser.add_argument("--large-seeds", type=int, default=1)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", type=Path, default=Path(__file__).with_name("result.json"))
    parser.add_argument("--allow-dirty", action="store_true")
    arguments = parser.parse_args()
    environment = describe_source(allow_dirty=arguments.allow_dirty)
    torch.set_num_threads(1)
    setting = {
        name: value
        for name, value in vars(arguments).items()
        if name not in ("output", "allow_dirty")
    }
    rows: list[Row] = []
    content: dict[str, Any] = {}
    for found in measure(arguments):
        rows += found
        content = content_of(rows, setting)
        # After each size, so that a run that is cut short leaves what it measured.
        write_result(arguments.output, environment, content)
        print(f"{found[0]['part']}: {found[0][SIZE[found[0]['part']]]}", flush=True)
    for row in content["summary"]:
        size = row[SIZE[row["part"]]]
        first, second = FIELDS[row["part"]][0], FIELDS[row["part"]][3]
        print(
            f"{row['part']:<8}{size:>4} {row['method']:<48}{first} {row[first]['mean']:.3f}  "
            f"{second} {row[second]['mean']:.3f}"
        )
    for claim, kept in content["claims"].items():
        print("holds" if kept else "FAILS", claim)
    for observation, is_so in content["observations"].items():
        print("yes" if is_so else "no", observation)


if __name__ == "__main__":
    main()
