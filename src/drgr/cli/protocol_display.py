"""The protocol's record as a person sees it in a terminal."""

from typing import Any

from rich.table import Table

from drgr.cli.display import Record


def protocol_table(record: Record) -> Table:
    """Returns the table of domains: losses with their standard errors, tails, compute."""
    data, subject = record["data"], record["subject"]
    table = Table(
        title=f"protocol: {subject['kind']} {subject['name']} on the {data['split']} split of "
        f"{data['corpus']}",
        title_justify="left",
    )
    tails = record["fairness"]["token_losses"]["by_domain"]
    excess = record["robustness"]["excess"]
    levels = [entry["level"] for entry in record["fairness"]["token_losses"]["pooled"]["cvar"]]
    headers = ["bits per byte", "loss"]
    headers += [f"worst {level:.0%} of tokens" for level in levels]
    headers += ["experts per token"] + (["excess"] if excess else [])
    table.add_column("domain")
    for header in headers:
        table.add_column(header, justify="right")
    worst = record["robustness"]["worst_domain"]
    for name, domain in record["domains"].items():
        cells = [
            _with_error(domain["bits_per_byte"], domain["bits_per_byte_standard_error"]),
            _with_error(domain["loss"], domain["loss_standard_error"]),
            *(f"{entry['value']:.2f}" for entry in tails[name]["cvar"]),
            f"{domain['experts_per_token']:.2f}",
        ]
        cells += [f"{excess['by_domain'][name]:+.3f}"] if excess else []
        label = f"{name} (worst)" if name == worst else name
        table.add_row(label, *cells, style="bold" if name == worst else None)
    return table


def protocol_summary(record: Record) -> str:
    """Returns the lines below the table."""
    return "\n".join([*_robustness(record), *_fairness(record), *_compute(record)])


def _robustness(record: Record) -> list[str]:
    robust = record["robustness"]
    curve, mixtures = robust["curve"], robust["mixtures"]
    tails = ", ".join(
        f"worst {entry['level']:.0%} {entry['value']:.3f}" for entry in robust["cvar"]
    )
    points = ", ".join(
        f"{value:.3f} at {radius:g}"
        for radius, value in zip(curve["radius"], curve["value"], strict=True)
    )
    low, *_, high = mixtures["quantiles"]
    lines = [
        f"bits per byte         mean {robust['mean']:.3f}, {tails}, worst {robust['worst']:.3f} "
        f"({robust['worst_domain']})",
        f"worst case in a ball  {points} ({curve['divergence']})",
        f"random mixtures       {low['value']:.3f} to {high['value']:.3f} "
        f"({low['share']:.0%} to {high['share']:.0%} of {mixtures['count']:,})",
    ]
    if not curve["converged"]:
        lines.append(f"{'':<22}not solved to tolerance: {curve['status']}")
    if robust["excess"] is not None:
        excess = robust["excess"]
        lines.append(
            f"excess                mean {excess['mean']:+.3f}, largest {excess['worst']:+.3f} "
            f"({excess['worst_domain']}), over {excess['reference']}"
        )
    if robust["held_out_domains"]:
        lines.append(f"held out of training  {', '.join(robust['held_out_domains'])}")
    return lines


def _fairness(record: Record) -> list[str]:
    fairness = record["fairness"]
    deciles = fairness["frequency_deciles"]["pooled"]["loss"]
    shown = " ".join("-" if loss is None else f"{loss:.2f}" for loss in deciles)
    tokens = fairness["token_losses"]
    lines = [
        f"domain inequality     Gini {fairness['gini']:.4f}, largest less smallest "
        f"{fairness['max_minus_min']:.3f} bits per byte",
        f"loss by frequency     {shown} (nats, rarest tenth first)",
    ]
    if not tokens["exact"]:
        lines.append(
            f"{'':<22}tails from {tokens['kept']:,} of {tokens['of']:,} token losses (sample)"
        )
    return lines


def _compute(record: Record) -> list[str]:
    compute = record["compute"]
    latency, memory, spend = compute["latency"], compute["peak_memory"], compute["spend"]
    budget = "no budget"
    if spend["budget"] is not None:
        budget = f"budget {spend['budget']:,}, {spend['layers_over']} layers and passes over"
    return [
        f"FLOPs a token         {_flops(compute['flops'])}",
        f"forward pass          p50 {latency['p50_seconds'] * 1e3:.1f} ms, p95 "
        f"{latency['p95_seconds'] * 1e3:.1f} ms of {latency['tokens']:,} tokens "
        f"({latency['repeats']} repeats), {latency['tokens_per_second']:,.0f} tokens/s",
        f"peak memory           {memory['bytes'] / 1e6:,.0f} MB ({memory['kind']})",
        f"assignments           {spend['assignments']:,}, {budget}",
        f"exchange a token      {compute['exchanged_bytes']['per_token']:,.0f} bytes forward",
    ]


def _flops(flops: dict[str, Any]) -> str:
    counted = f"{flops['counter'] / flops['tokens']:.4g} counted"
    if flops["formula"] is None:
        return f"{counted}; no formula: {flops['reason']}"
    verdict = "agree" if flops["agrees"] else "DISAGREE"
    return (
        f"{flops['formula_per_token']:.4g} by formula, {counted}: {verdict} "
        f"({flops['relative_difference']:+.2%}, tolerance {flops['tolerance']:.0%})"
    )


def _with_error(value: float, error: float | None) -> str:
    return f"{value:.3f}" if error is None else f"{value:.3f} ± {error:.3f}"
