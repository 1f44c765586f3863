"""What is said of the MoE layer, of the cost of routing and of static budgets."""

from typing import Any


def moe_layer_lines(result: dict[str, Any], source: str) -> list[str]:
    """Describes the layer's speed beside the block of transformers."""
    rows = result["shapes"]
    lines = [
        f"`MoELayer`, forward and backward of {result['tokens']:,} tokens, float32, beside the "
        f"Mixtral block of transformers with `grouped_mm` experts, median of {result['rounds']} "
        f"rounds (lowest to highest); the bound is the experts' matrix products at the best rate "
        f"of `F.linear`; CPU seconds with one thread, wall time with more "
        f"([result.json]({source}), `python -m benchmarks.moe_layer.run`):",
        "",
        "| width, experts, per token, inner width | threads | throughput, times the block's | "
        "share of the bound | that of the block |",
        "| --- | --: | --: | --: | --: |",
    ]
    for row in rows:
        ratio, share = row["throughput_ratio"], row["share_of_bound"]
        sizes = [row[name] for name in ("width", "experts", "experts_per_token", "expert_width")]
        lines.append(
            f"| {', '.join(map(str, sizes))} | {row['threads']} | {ratio['median']:.2f} "
            f"({ratio['lowest']:.2f} to {ratio['highest']:.2f}) | {share['MoELayer']:.2f} | "
            f"{share['grouped_mm block']:.2f} |"
        )
    return lines


def routing_cost_lines(result: dict[str, Any], source: str) -> list[str]:
    """Describes the share of routing in a layer's step."""
    size, rows = result["size"], result["rows"]
    over = result["over_limit"]
    columns = list(dict.fromkeys(row["budget"] for row in rows))
    share = {
        (row["kind"], row["label"], row["budget"]): f"{row['share']['median']:.1%}" for row in rows
    }
    lines = [
        f"Router, prices, selection and their updates as a share of a training step of `MoELayer` "
        f"(T = {size['tokens']:,}, E = {size['experts']}, D = {size['width']}, inner width "
        f"{size['expert_width']}), one thread, median of {size['rounds']} rounds, by the experts "
        f"of a token; a score, controller or selection in place of softmax, no prices and a budget "
        f"({'none is' if not over else ', '.join(over) + (' are' if len(over) > 1 else ' is')} "
        f"over {result['limit']:.0%}; [result.json]({source}), "
        f"`python -m benchmarks.routing_cost.run`):",
        "",
        f"| part | method | {' | '.join(columns)} |",
        f"| --- | --- | {' | '.join('--:' for _ in columns)} |",
    ]
    for kind, label in dict.fromkeys((row["kind"], row["label"]) for row in rows):
        shares = " | ".join(share.get((kind, label, column), "") for column in columns)
        lines.append(f"| {kind} | {label} | {shares} |")
    return lines


def static_budget_lines(result: dict[str, Any], source: str) -> list[str]:
    """Describes the choice of experts under a static budget."""
    planted, unequal, trained = (
        result["summary"][part] for part in ("planted", "unequal", "trained")
    )
    lines = [
        f"Experts chosen under a static budget by loss alone: a planted set of "
        f"{next(iter(planted.values()))['seeds']} problems found or not, and the loss over the "
        f"best of all sets where experts cost unequally and in small trained models "
        f"([result.json]({source}), `python -m benchmarks.static_budget.run`):",
        "",
        "| method | planted set found | losses taken | unequal costs | trained models |",
        "| --- | --: | --: | --: | --: |",
    ]
    for method, row in planted.items():
        lines.append(
            f"| {method} | {row['recovered']:.0%} | {row['num_losses']:,.0f} | "
            f"{excess(unequal[method])} | {excess(trained[method])} |"
        )
    return lines


def excess(row: dict[str, Any]) -> str:
    """Returns the mean ratio of a method's loss to the best of all sets."""
    return f"{row['mean_ratio_to_best']:.3f}"
