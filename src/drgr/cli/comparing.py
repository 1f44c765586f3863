"""What ``drgr compare`` does: run what is missing, then write down and show what there is."""

import importlib.util
import signal
import sys
from pathlib import Path

import typer
from rich.console import Console

from drgr.cli.display import quiet_libraries
from drgr.cli.running import load_recipe
from drgr.errors import ConfigError
from drgr.training import write_json


def compare_methods(
    path: Path,
    *,
    directory: Path | None,
    parallel: int,
    cache: Path | None,
    retry_failed: bool,
    allow_dirty: bool,
) -> None:
    """Runs an experiment and writes its summary; exits with 3 if a run failed."""
    if importlib.util.find_spec("scipy") is None:
        raise ConfigError("drgr compare needs scipy; install it with pip install 'drgr[compare]'")
    from drgr.experiments import (  # noqa: PLC0415 - an optional part
        Comparison,
        Store,
        build_variants,
        check_source,
        read_experiment,
        run_comparison,
        summarize,
    )

    quiet_libraries()
    experiment = read_experiment(path)
    comparison = Comparison(
        experiment=experiment,
        variants=build_variants(experiment, load=load_recipe),
        directory=directory or Path("runs") / experiment.name,
        cache=cache,
    )
    check_source(allow_dirty=allow_dirty)
    console = Console(stderr=True)
    stopped = run_comparison(
        comparison,
        parallel=parallel,
        retry_failed=retry_failed,
        report=lambda line: console.print(line, highlight=False, markup=False, soft_wrap=True),
    )
    with Store.open(comparison.store, comparison.content) as store:
        summary = summarize(comparison, store)
    write_json(comparison.directory / "summary.json", summary)
    if stopped:
        name = signal.Signals(stopped).name
        sys.stderr.write(f"drgr: stopped by {name}; run the same command to continue\n")
        raise typer.Exit(128 + stopped)
    if not summary["complete"]:
        raise typer.Exit(3)
