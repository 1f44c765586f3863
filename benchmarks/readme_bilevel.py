"""The paragraphs of README.md on bilevel methods and on the outer loop."""

from typing import Any


def frontier_lines(result: dict[str, Any], source: str) -> list[str]:
    """Describes the mixtures chosen in different ways, worst domain against mean."""
    setting = " ".join(result["setting"]["further"])
    seeds = max(row["seeds"] for row in result["summary"].values())
    lines = [
        f"Mixtures chosen in training, from very unequal sampling, no more FLOPs than uniform "
        f"sampling takes in {result['steps_of_first']} steps, outer steps included, "
        f"{seeds} seed{'s' if seeds > 1 else ''}, `{setting}` "
        f"([{source.rsplit('/', 1)[-1]}]({source}), "
        f"`python -m benchmarks.frontier.run`):",
        "",
        "| mixture | worst domain, bits per byte | mean of domains, bits per byte | steps | share "
        "of FLOPs in the outer loop |",
        "| --- | --: | --: | --: | --: |",
    ]
    for name, row in result["summary"].items():
        worst, mean = (
            f"{figure['mean']:.3f}" + (f" ± {figure['sd']:.3f}" if seeds > 1 else "")
            for figure in (row["worst_bits_per_byte"], row["mean_bits_per_byte"])
        )
        share = row["outer_flops"]["mean"] / row["flops"]["mean"]
        lines.append(f"| {name} | {worst} | {mean} | {row['steps']['mean']:.0f} | {share:.0%} |")
    return lines


def outer_overhead_lines(result: dict[str, Any], source: str) -> list[str]:
    """Describes what the outer loop costs in time."""
    ratios = result["ratio_to_no_outer_loop"]
    every = result["config"]["outer"]["every"]
    costs = ", ".join(
        f"{name} {row['median']:.2f} ({row['lowest']:.2f} to {row['highest']:.2f})"
        for name, row in ratios.items()
        if name != "no outer loop"
    )
    return [
        f"CPU time with an outer step every {every} steps, in units of the same steps without: "
        f"{costs} ([result.json]({source}), `python -m benchmarks.outer_overhead.run`)."
    ]


def cleaning_lines(result: dict[str, Any], source: str) -> list[str]:
    """Describes the cleaning of labels."""
    rows = {(row["corruption"], row["method"]): row for row in result["summary"]}
    corruptions = sorted({corruption for corruption, _ in rows})
    heads = " | ".join(f"{corruption:.0%} of labels drawn anew" for corruption in corruptions)
    lines = [
        f"Data cleaning on the digits of scikit-learn, test error, {result['setting']['seeds']} "
        f"seeds ([result.json]({source}), `python -m benchmarks.data_cleaning.run`):",
        "",
        f"| weights of the samples | {heads} |",
        f"| --- |{' --: |' * len(corruptions)}",
    ]
    methods = list(dict.fromkeys(method for _, method in rows))
    for method in methods:
        errors = [rows[corruption, method]["test_error"] for corruption in corruptions]
        shown = " | ".join(f"{e['mean']:.1%} ± {e['deviation']:.1%}" for e in errors)
        lines.append(f"| {method} | {shown} |")
    return lines


def rival_lines(result: dict[str, Any], source: str) -> list[str]:
    """Describes hypergradients of other libraries on one ridge regression."""
    ridge = max(
        (row for row in result["problems"] if row["problem"] == "ridge"),
        key=lambda row: row["condition"],
    )
    versions = ", ".join(f"{name} {version}" for name, version in result["libraries"].items())
    return [
        f"Beside other libraries ({versions}) on a ridge of condition {ridge['condition']:.0f}, "
        f"one thread ([rivals.json]({source})):",
        "",
        "| solver | relative error | time |",
        "| --- | --: | --: |",
        *(
            f"| {row['solver']} | {row['error']:.0e} | {1e3 * row['seconds']['median']:.0f} ms |"
            for row in ridge["rows"]
        ),
    ]


def single_loop_lines(result: dict[str, Any], source: str) -> list[str]:
    """Describes the stochastic methods on simulated quadratics."""
    values = sorted((row["last"], name) for name, row in result["simulated"].items())
    kept = [claim for claim, holds in result["claims"].items() if not holds]
    missed = "; ".join(kept) or "none"
    shown = ", ".join(f"{name} {value:.0e}" for value, name in values)
    return [
        f"Single-loop methods on simulated quadratics, squared gradient norm after "
        f"{result['sizes']['budget']:,} oracle calls, median of {len(result['seeds'])} seeds, step "
        f"sizes tuned with equal trials: {shown}. Expectations that did not hold: {missed} "
        f"([result.json]({source}), `python -m benchmarks.single_loop.run`)."
    ]


def traffic_lines(result: dict[str, Any], source: str) -> list[str]:
    """Describes what measuring and pricing gradient traffic costs and does."""
    ratio = result["cost"]["ratio"]
    effects = [row for row in result["effect"] if row["controller"] == "none"]
    congestion = ", ".join(f"{row['congestion']:.1f}" for row in effects)
    means = ", ".join(f"{row['mean_bits_per_byte']:.3f}" for row in effects)
    coefficients = ", ".join(f"{row['coefficient']:g}" for row in effects)
    return [
        f"Measuring gradient traffic takes {ratio['measured']['median']:.2f} of the time without "
        f"(quartiles {ratio['measured']['lower_quartile']:.2f} to "
        f"{ratio['measured']['upper_quartile']:.2f}); at coefficients {coefficients} the busiest "
        f"link carries {congestion} times the mean, at {means} bits per byte in the mean, without "
        f"a controller ([result.json]({source}), `python -m benchmarks.traffic.run`)."
    ]


def subspace_lines(result: dict[str, Any], source: str) -> list[str]:
    """Describes what subspace methods keep in memory, and at what quality."""
    memory = {row["method"]: row for row in result["memory"]}
    missed = [claim for claim, holds in result["claims"].items() if not holds]
    lines = [
        f"Memory of single-loop methods on data cleaning with a hidden layer, "
        f"{result['setting']['seeds']} seeds; bytes kept between steps beside the outer variables, "
        f"inner parameters included ([result.json]({source}), "
        "`python -m benchmarks.subspace.run`):",
        "",
        "| method | test error | above full space | kept | less than full space | less at the peak "
        "of a step |",
        "| --- | --: | --: | --: | --: | --: |",
    ]
    for row in result["quality"]:
        kept = memory.get(row["method"])
        if kept is None:
            continue
        error, above, saved = row["test_error"], row["above_full"], kept["reduction"]
        lines.append(
            f"| {row['method']} | {error['mean']:.1%} ± {error['deviation']:.1%} | "
            f"{above['mean']:+.1%} ± {above['standard_error']:.1%} | "
            f"{kept['bytes_with_inner'] / 1e3:.0f} kB | {saved['with_inner']:.0%} | "
            f"{saved['peak, batches of 20 and 10']:.0%} |"
        )
    return [*lines, "", f"Expectations that did not hold: {'; '.join(missed) or 'none'}."]
