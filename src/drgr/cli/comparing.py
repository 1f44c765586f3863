"""What ``drgr compare`` does: run what is missing, then write down and show what there is."""

import signal
import sys
from pathlib import Path

import typer
from rich.console import Console
from rich.table import Table

from drgr.cli.display import Record, quiet_libraries
from drgr.cli.running import load_recipe
from drgr.experiments import (
    Comparison,
    Store,
    build_variants,
    check_source,
    export,
    read_experiment,
    run_comparison,
    summarize,
)
from drgr.report import write_experiment_report
from drgr.training import write_json


def open_comparison(path: Path, *, directory: Path | None, cache: Path | None) -> Comparison:
    """Reads an experiment file and builds its methods.

    Raises:
        ConfigError: If the file or a method in it is not valid.
    """
    experiment = read_experiment(path)
    return Comparison(
        experiment=experiment,
        variants=build_variants(experiment, load=load_recipe),
        directory=directory or Path("runs") / experiment.name,
        cache=cache,
    )


def compare_methods(
    comparison: Comparison, *, parallel: int, retry_failed: bool, allow_dirty: bool
) -> None:
    """Makes what is missing of an experiment, writes summary and report, and shows the table.

    Exits with 3 if a run failed, with 128 plus the signal if one stopped it.
    """
    quiet_libraries()
    check_source(allow_dirty=allow_dirty)
    errors = Console(stderr=True)
    stopped = run_comparison(
        comparison,
        parallel=parallel,
        retry_failed=retry_failed,
        report=lambda line: errors.print(line, highlight=False, markup=False, soft_wrap=True),
    )
    with Store.open(comparison.store, comparison.content) as store:
        summary = summarize(comparison, store)
    write_json(comparison.directory / "summary.json", summary)
    report = write_experiment_report(summary, output=comparison.directory / "report.html")
    if stopped:
        name = signal.Signals(stopped).name
        sys.stderr.write(f"drgr: stopped by {name}; the same command continues\n")
        raise typer.Exit(128 + stopped)
    console = Console()
    console.print(_results(summary))
    console.print(f"{'report':<22}{report}", highlight=False, soft_wrap=True)
    if not summary["complete"]:
        count = sum(run["status"] != "finished" for run in summary["runs"])
        sys.stderr.write(
            f"drgr: {count} of the final runs did not finish within their FLOPs, or were not "
            f"planned as every trial failed; see the report, then use --retry-failed\n"
        )
        raise typer.Exit(3)


def export_results(comparison: Comparison, *, form: str, output: Path | None) -> None:
    """Writes the results that there are as text."""
    with Store.read(comparison.store, comparison.content) as store:
        written = export(summarize(comparison, store), form)
    if output is None:
        sys.stdout.write(written)
        return
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(written, encoding="utf-8")


def _results(summary: Record) -> Table:
    """Returns the table of methods, best mean rank first."""
    ranks = summary["ranks"]["worst_bits_per_byte"]
    title = f"{summary['name']}: bits per byte on the test split"
    table = Table(title=title, title_justify="left")
    table.add_column("method")
    for head in ("worst domain", "mean", "rank", "steps", "FLOPs", "seeds"):
        table.add_column(head, justify="right")
    methods = sorted(summary["methods"], key=lambda one: ranks.get(one["name"], float("inf")))
    for one in methods:
        figures = one["figures"]
        table.add_row(
            f"{one['name']}{' (reference)' if one['name'] == summary['reference'] else ''}",
            _with_deviation(figures["worst_bits_per_byte"]),
            _with_deviation(figures["mean_bits_per_byte"]),
            f"{ranks[one['name']]:.2f}" if one["name"] in ranks else "-",
            ", ".join(map(str, one["steps"])),
            "-" if figures["flops"] is None else f"{figures['flops']['mean']:.3e}",
            f"{one['runs']['finished']} of {len(summary['seeds'])}",
        )
    return table


def _with_deviation(found: Record | None) -> str:
    if found is None:
        return "-"
    if found["sd"] is None:
        return f"{found['mean']:.3f}"
    return f"{found['mean']:.3f} ± {found['sd']:.3f}"
