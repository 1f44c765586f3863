"""Writes docs/measurements.md and a part of README.md from committed results; --check compares."""

import argparse
import json
from pathlib import Path
from typing import Any

from benchmarks.readme_bilevel import (
    cleaning_lines,
    frontier_lines,
    outer_overhead_lines,
    rival_lines,
    single_loop_lines,
    subspace_lines,
    traffic_lines,
)
from benchmarks.readme_layers import moe_layer_lines, routing_cost_lines, static_budget_lines
from benchmarks.results import HEADLINE, claims, common_seeds
from benchmarks.results.comparison import MEAN, OURS, SIMPLE, WORST, average
from benchmarks.results.headline import SMALL_FIGURE, best_rival
from benchmarks.results.medium import second_expert

SMALL = "benchmarks/headline/small.json"
MEDIUM = "benchmarks/headline/medium.json"
SMALL_EXPERIMENT = "benchmarks/headline/small.yaml"
ROOT = Path(__file__).resolve().parent.parent
QUICKSTART = "benchmarks/quickstart/result.json"
OVERHEAD = "benchmarks/overhead/result.json"
WORST_CASE = "benchmarks/worst_case/result.json"
HYPERGRADIENT = "benchmarks/hypergradient/result.json"
BUDGETS = "benchmarks/budgets/result.json"
FRONTIER = "benchmarks/frontier/result.json"
SCAN = "benchmarks/frontier/scan.json"
OUTER_OVERHEAD = "benchmarks/outer_overhead/result.json"
TRAFFIC = "benchmarks/traffic/result.json"
RIVALS = "benchmarks/hypergradient/rivals.json"
SINGLE_LOOP = "benchmarks/single_loop/result.json"
SUBSPACE = "benchmarks/subspace/result.json"
CLEANING = "benchmarks/data_cleaning/result.json"
STATIC_BUDGET = "benchmarks/static_budget/result.json"
MOE_LAYER = "benchmarks/moe_layer/result.json"
ROUTING_COST = "benchmarks/routing_cost/result.json"
MORE = (
    "All results, the unfavourable ones too: [docs/measurements.md](docs/measurements.md), written "
    "from the result files by `python -m benchmarks.readme`."
)
GENERATED = (
    "Written by `python -m benchmarks.readme` from the result files, each of which names its "
    "command, commit, versions and hardware. Small models and few seeds show that the parts work; "
    "they do not rank methods that are close."
)
START = "<!-- results: written by benchmarks/readme.py -->\n"
END = "<!-- end of results -->\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="fail if a document differs")
    arguments = parser.parse_args()
    readme = ROOT / "README.md"
    before, _, rest = readme.read_text().partition(START)
    _, _, after = rest.partition(END)
    documents = {
        readme: before + START + summary() + END + after,
        ROOT / "docs" / "measurements.md": measurements(),
    }
    for path, written in documents.items():
        if arguments.check and (not path.exists() or written != path.read_text()):
            raise SystemExit(
                f"{path.name} differs from the results; run python -m benchmarks.readme"
            )
        path.write_text(written)


def read(source: str) -> dict[str, Any]:
    """Returns a committed result."""
    result: dict[str, Any] = json.loads((ROOT / source).read_text())
    return result


def summary() -> str:
    """Returns the section of the README in Markdown."""
    parts = [
        ["## What it measured so far"],
        headline_lines(read(SMALL), read(MEDIUM), read(HEADLINE)),
        [MORE],
    ]
    return "\n".join(line for part in parts for line in [*part, ""])


def headline_lines(
    result: dict[str, Any], medium: dict[str, Any], former: dict[str, Any]
) -> list[str]:
    """Describes the headline comparison: its figure, what it was meant to show, a larger size."""
    seeds = common_seeds(result)
    return [
        f"{len(result['methods'])} methods at equal total FLOPs, equally many trials each, "
        f"{len(seeds)} seeds, eight domains of text of very unequal share, test split "
        f"([docs/results.md](docs/results.md); two CPU cores, `drgr compare {SMALL_EXPERIMENT}`):",
        "",
        f"![Worst domain against mean of domains, by method](docs/{SMALL_FIGURE.name})",
        "",
        *claims(result, seeds),
        "",
        larger_line(medium, former),
        "",
        *second_expert(medium),
    ]


def larger_line(medium: dict[str, Any], former: dict[str, Any]) -> str:
    """Says what the comparisons of a larger model found, of DRGR as it is and as it was."""
    seeds = common_seeds(medium)
    best = best_rival(medium, seeds)
    ours, theirs = (average(medium, name, WORST, seeds) for name in (OURS, best))
    return (
        f"With the larger model and batches of `benchmarks/headline/medium.yaml`, nothing tuned "
        f"again, {len(medium['methods'])} methods, {len(seeds)} seeds: {against_uniform(medium)}; "
        f"the best baseline, {best}, has {theirs:.3f} ({ours - theirs:+.3f}). DRGR before it had a "
        f"price on traffic and a growing budget, at the same size on a GPU, "
        f"{len(common_seeds(former))} seeds: {against_uniform(former)}."
    )


def against_uniform(result: dict[str, Any]) -> str:
    """Says how DRGR compares with uniform sampling."""
    seeds = common_seeds(result)
    ours, simple = (
        {figure: average(result, name, figure, seeds) for figure in (WORST, MEAN)}
        for name in (OURS, SIMPLE)
    )
    return (
        f"worst domain {ours[WORST]:.3f} against {simple[WORST]:.3f} of uniform sampling, mean "
        f"{ours[MEAN] / simple[MEAN] - 1:+.1%}"
    )


def measurements() -> str:
    """Returns the document with every result."""
    parts = [
        ["# Measurements"],
        [GENERATED],
        ["## Training"],
        quickstart_lines(read(QUICKSTART)),
        frontier_lines(read(FRONTIER), FRONTIER),
        frontier_lines(read(SCAN), SCAN),
        overhead_lines(read(OVERHEAD)),
        outer_overhead_lines(read(OUTER_OVERHEAD), OUTER_OVERHEAD),
        traffic_lines(read(TRAFFIC), TRAFFIC),
        ["## Worst cases and budgets"],
        worst_case_lines(read(WORST_CASE)),
        budget_lines(read(BUDGETS)),
        static_budget_lines(read(STATIC_BUDGET), STATIC_BUDGET),
        ["## Layers and routing"],
        moe_layer_lines(read(MOE_LAYER), MOE_LAYER),
        routing_cost_lines(read(ROUTING_COST), ROUTING_COST),
        ["## Hypergradients and bilevel methods"],
        hypergradient_lines(read(HYPERGRADIENT)),
        rival_lines(read(RIVALS), RIVALS),
        single_loop_lines(read(SINGLE_LOOP), SINGLE_LOOP),
        cleaning_lines(read(CLEANING), CLEANING),
        subspace_lines(read(SUBSPACE), SUBSPACE),
    ]
    lines = [line for part in parts for line in [*part, ""]]
    # Links are relative to where a document stands.
    return "\n".join(lines[:-1]).replace("](benchmarks/", "](../benchmarks/") + "\n"


def quickstart_lines(result: dict[str, Any]) -> list[str]:
    """Describes the comparison of the quick start."""
    runs = result["runs"]
    seeds = len({run["seed"] for run in runs})
    over = sum(run.get("batches_over_budget", 0) for run in runs)
    spends = [
        run["evaluation_spend"]["spend"] / run["evaluation_spend"]["budget"]
        for run in runs
        if "failed" not in run
    ]
    config = result["setting"]
    lines = [
        f"Test split of `{config['corpus']}`, tiny OLMoE, {config['tokens_per_step']:,} tokens a "
        f"step, {result['steps_of_first']} steps for the first row, no more FLOPs for any other, "
        f"{seeds} seeds, mean and standard deviation "
        f"([result.json]({QUICKSTART}), `python -m benchmarks.quickstart.run`):",
        "",
        "| method | worst domain, bits per byte | mean of domains, bits per byte | FLOPs |",
        "| --- | --: | --: | --: |",
    ]
    for method, summary in result["summary"].items():
        worst, mean = summary["worst_bits_per_byte"], summary["mean_bits_per_byte"]
        lines.append(
            f"| {method} | {worst['mean']:.3f} ± {worst['sd']:.3f} | "
            f"{mean['mean']:.3f} ± {mean['sd']:.3f} | {summary['flops']['mean']:.3e} |"
        )
    lines += [
        "",
        f"Batches over their budget in training, in all {len(runs)} runs together: {over}. At "
        f"evaluation the frozen price spent {min(spends):.1%} to {max(spends):.1%} of the budget. "
        f"Three seeds of a "
        f"small model show that the parts work; they do not rank methods that are close.",
    ]
    return lines


def overhead_lines(result: dict[str, Any]) -> list[str]:
    """Describes the cost of attaching."""
    ratios = result["ratio_to_unattached"]
    attached, alone = ratios["attached"], ratios["attached, no held-out passes"]
    return [
        f"A training step with router, budget, prices, adversary and records attached takes "
        f"{attached['median']:.3f} times ({attached['lowest']:.3f} to {attached['highest']:.3f}) "
        f"the step of the same transformers model with `grouped_mm` experts unattached; "
        f"{alone['median']:.3f} times without the adversary's held-out passes "
        f"([result.json]({OVERHEAD}), `python -m benchmarks.overhead.run`).",
    ]


def worst_case_lines(result: dict[str, Any]) -> list[str]:
    """Describes the speed of the adversary."""
    lines = [
        f"Worst-case weights, float64, one CPU thread, n = {result['atoms']:,}; a sort of the same "
        f"vector takes {1e3 * result['sort']['median']:.0f} ms; last column: "
        f"{result['problems_of_22']:,} problems of n = 22 in one call against a loop over the same "
        f"function ([result.json]({WORST_CASE}), `python -m benchmarks.worst_case.run`):",
        "",
        "| divergence | time | faster than CVXPY with Clarabel | gap / range | batched |",
        "| --- | --: | --: | --: | --: |",
    ]
    for name, row in result["divergences"].items():
        rival = row["cvxpy"]
        faster = f"{rival['ratio']:,.0f}x" if "ratio" in rival else "the solver fails"
        lines.append(
            f"| {name} | {1e3 * row['seconds']['median']:.0f} ms | {faster} | "
            f"{row['relative_gap']:.0e} | {result['batched'][name]['ratio']:,.0f}x |"
        )
    return lines


def hypergradient_lines(result: dict[str, Any]) -> list[str]:
    """Describes how right hypergradients are, and the step sizes of the method that uses them."""
    honest, *_ = result["claims"].values()
    lines = [
        f"Hypergradients of ridge regressions with {result['dimension']} penalties, float64, "
        "conjugate gradients, against a dense solve; of all results in both precisions and of all "
        f"solvers, {'none' if honest else 'some'} that counts as converged is off by more than 10 "
        "times its tolerance "
        f"([result.json]({HYPERGRADIENT}), `python -m benchmarks.hypergradient.run`):",
        "",
        "| condition number | tolerance | relative error | products | time |",
        "| --: | --: | --: | --: | --: |",
    ]
    shown = [
        row for row in result["exactness"] if row["solver"] == "CG" and row["dtype"] == "float64"
    ]
    lines += [
        f"| {row['condition']:,.0f} | {row['rtol']:.0e} | {row['error']:.0e} | "
        f"{row['num_hvps']:,} | {1e3 * row['seconds']['median']:.0f} ms |"
        for row in shown
    ]
    sizes = [row["step_size"] for row in result["robustness"]]
    failed = [row["step_size"] for row in result["robustness"] if row["plain_value"] is None]
    reached = result["claims"]["every first step size reaches the same value"]
    return [
        *lines,
        "",
        f"Proximal alternating minimisation from first step sizes {min(sizes):g} to {max(sizes):g} "
        f"{'reaches' if reached else 'does not reach'} one and the same value; the plain single "
        f"loop, with as many Hessian products, diverges from {min(failed):g} on.",
    ]


def budget_lines(result: dict[str, Any]) -> list[str]:
    """Describes the speed of projection and selection."""
    ratios = result["ratio_to_topk"]
    topk = 1e3 * result["seconds"]["topk"]["median"]
    return [
        f"Budgets at T = {result['tokens']:,} and E = {result['experts']}, float32, one CPU "
        f"thread, in units of one `torch.topk(k=8)` of the same matrix ({topk:.1f} ms): exact "
        f"projection onto token and batch bounds at unequal costs "
        f"{ratios['project, unequal costs']:.1f} "
        f"({ratios['project and backward, unequal costs']:.1f} with its backward pass), optimal "
        f"selection at equal costs {ratios['select, equal costs']:.1f}, selection at unequal costs "
        f"{ratios['select, unequal costs']:,.0f} with a certified gap of "
        f"{result['quality']['select_unequal_relative_gap']:.2%} "
        f"([result.json]({BUDGETS}), `python -m benchmarks.budgets.run`).",
    ]


if __name__ == "__main__":
    main()
