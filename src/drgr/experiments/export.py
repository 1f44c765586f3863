"""Results for other programs and for papers: CSV of all runs, LaTeX and Markdown tables."""

import csv
import io
import json
from collections.abc import Callable, Mapping
from typing import Any

from drgr.errors import ConfigError
from drgr.experiments.experiment import FIGURES

Json = Mapping[str, Any]

_HEADS = ("method", "worst domain", "mean of domains", "mean rank", "steps", "FLOPs", "seeds")
_LATEX = {
    **{character: f"\\{character}" for character in "&%$#_{}"},
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
}


def export(summary: Json, form: str) -> str:
    """Returns results as text.

    Args:
        summary: What ``summary.json`` holds.
        form: ``csv`` has a line for every final run, failed ones too; the tables have a line for
            every method, bits per byte as mean and interval over seeds.

    Raises:
        ConfigError: If ``form`` is none of ``csv``, ``latex`` and ``markdown``.
    """
    writers: dict[str, Callable[[Json], str]] = {
        "csv": _csv,
        "latex": _latex,
        "markdown": _markdown,
    }
    if form not in writers:
        raise ConfigError(f"--export must be one of {', '.join(writers)}, got {form}")
    return writers[form](summary)


def _csv(summary: Json) -> str:
    domains = list(dict.fromkeys(name for run in summary["runs"] for name in run["bits_per_byte"]))
    found = {one["name"]: one for one in summary["methods"]}
    output = io.StringIO()
    writer = csv.writer(output, lineterminator="\n")
    writer.writerow(
        ["method", "seed", "status", "steps", "flops_limit", *FIGURES, "worst_domain"]
        + [f"bits_per_byte.{name}" for name in domains]
        + ["settings", "tuned", "error"]
    )
    for run in summary["runs"]:
        method = found[run["method"]]
        writer.writerow(
            [run[key] for key in ("method", "seed", "status", "steps", "flops_limit")]
            + [run["figures"][figure] for figure in FIGURES]
            + [run["worst_domain"]]
            + [run["bits_per_byte"].get(name) for name in domains]
            + [json.dumps(method["settings"]), json.dumps(method["tuned"]), run["error"]]
        )
    return output.getvalue()


def _markdown(summary: Json) -> str:
    rows = [list(_HEADS), ["---", *["--:"] * (len(_HEADS) - 1)]]
    rows += [[cell.replace("|", "\\|") for cell in row] for row in _rows(summary)]
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def _latex(summary: Json) -> str:
    rows = [[_escaped(cell) for cell in row] for row in _rows(summary)]
    lines = [
        rf"\begin{{tabular}}{{l{'r' * (len(_HEADS) - 1)}}}",
        r"\hline",
        " & ".join(_HEADS) + r" \\",
        r"\hline",
        *(" & ".join(row) + r" \\" for row in rows),
        r"\hline",
        r"\end{tabular}",
    ]
    return "\n".join(lines) + "\n"


def _escaped(cell: str) -> str:
    return "".join(_LATEX.get(character, character) for character in cell)


def _rows(summary: Json) -> list[list[str]]:
    ranks = summary["ranks"]["worst_bits_per_byte"]
    return [
        [
            one["name"],
            _interval(one["figures"]["worst_bits_per_byte"]),
            _interval(one["figures"]["mean_bits_per_byte"]),
            _number(ranks.get(one["name"]), ".2f"),
            ", ".join(map(str, one["steps"])),
            _number((one["figures"]["flops"] or {}).get("mean"), ".4g"),
            f"{one['runs']['finished']} of {len(summary['seeds'])}",
        ]
        for one in summary["methods"]
    ]


def _interval(found: Json | None) -> str:
    """Returns ``mean [low, high]``; a dash where there is no value."""
    if found is None:
        return "-"
    if found["low"] is None:
        return f"{found['mean']:.4f}"
    return f"{found['mean']:.4f} [{found['low']:.4f}, {found['high']:.4f}]"


def _number(value: float | None, form: str) -> str:
    """Returns a number; a dash where there is none."""
    return "-" if value is None else format(value, form)
