"""What each command does once its arguments are read: call one function, show what came out."""

import signal
import sys
from collections.abc import Sequence
from pathlib import Path

import typer
from rich.console import Console

from drgr.cli.display import (
    Record,
    evaluation_summary,
    evaluation_table,
    methods_table,
    preparation_display,
    quiet_libraries,
)
from drgr.cli.evaluating import EvaluationRequest, find_target, run_evaluation
from drgr.cli.protocol_display import protocol_summary, protocol_table
from drgr.cli.running import existing_run, load_recipe, prepare, run_training
from drgr.collectives import rank
from drgr.data import BUILT_IN_CORPORA
from drgr.errors import ConfigError
from drgr.recipes import RECIPES
from drgr.report import write_report
from drgr.routing.methods import METHODS
from drgr.training import (
    DataConfig,
    RunDirectory,
    known_keys,
    override,
    resolve_cache,
    write_json,
)


def train_run(
    recipe: str,
    *,
    run_dir: Path | None,
    settings: Sequence[str],
    cache: Path | None,
    resume: bool,
    overwrite: bool,
    report: bool,
) -> None:
    """Trains, shows the evaluation and writes the report."""
    config = override(load_recipe(recipe), settings)
    directory = RunDirectory(run_dir or Path("runs") / config.name)
    quiet_libraries()
    outcome = run_training(config, directory, cache=cache, resume=resume, overwrite=overwrite)
    if not outcome.is_first_process:
        raise typer.Exit(outcome.exit_code)
    if outcome.evaluation is None:
        name = signal.Signals(outcome.signal).name
        sys.stderr.write(
            f"drgr: stopped by {name} after step {outcome.step}, saved; use --resume\n"
        )
        raise typer.Exit(outcome.exit_code)
    _show(outcome.evaluation)
    if report:
        report_runs([directory.path], output=None)


def evaluate_target(
    name: str, request: EvaluationRequest, *, output: Path | None, protocol: Path | None
) -> None:
    """Evaluates the last checkpoint of a run, or a model, shows the result and writes it."""
    quiet_libraries()
    target = find_target(name, data=request.data)
    is_own = isinstance(target, RunDirectory) and request.data is None
    if output is not None and not is_own:
        raise ConfigError(
            "--output is for the evaluation of a run on its own data; use --protocol FILE for the "
            "protocol's record"
        )
    if protocol is None and is_own and isinstance(target, RunDirectory):
        protocol = target.protocol
    outcome = run_evaluation(target, request)
    if not outcome.is_first_process:
        return
    if outcome.evaluation is not None:
        _show(outcome.evaluation)
        if output is not None:
            write_json(output, outcome.evaluation)
    console = Console()
    console.print(protocol_table(outcome.protocol))
    console.print(protocol_summary(outcome.protocol), highlight=False, soft_wrap=True)
    if protocol is not None:
        write_json(protocol, outcome.protocol)
        typer.echo(f"{'protocol':<22}{protocol}")


def report_runs(run_dirs: Sequence[Path], *, output: Path | None) -> None:
    """Writes the report on one run into it, or that on several beside what the first one has."""
    runs = [existing_run(path).path for path in run_dirs]
    name = "report.html" if len(runs) == 1 else "comparison.html"
    written = write_report(runs, output=output or runs[0] / name)
    typer.echo(f"{'report':<22}{written}")


def show_recipes(name: str | None) -> None:
    """Lists the recipes, or shows one as JSON."""
    if name is not None:
        typer.echo(load_recipe(name).to_json(), nl=False)
        return
    for key, recipe in RECIPES.items():
        summary, *_ = (recipe.__doc__ or "").strip().splitlines()
        typer.echo(f"{key:<12}{summary}")


def show_methods(kind: str | None) -> None:
    """Lists the routing methods, or those of one kind."""
    kinds = sorted({method.kind for method in METHODS})
    if kind is not None and kind not in kinds:
        raise ConfigError(f"kind must be one of {', '.join(kinds)}, got {kind}")
    shown = [method for method in METHODS if kind in (None, method.kind)]
    Console().print(methods_table(shown))


def show_settings() -> None:
    """Lists the dotted path of every setting."""
    typer.echo("\n".join(known_keys()))


def prepare_data(data: dict[str, object], *, cache: Path | None) -> None:
    """Prepares a corpus and shows how large it is."""
    quiet_libraries()
    console = Console()
    with preparation_display(console) as display:
        settings = DataConfig.model_validate(data)
        prepared = prepare(settings, cache=resolve_cache(cache), report=display)
    for domain in prepared.domains:
        shown = "  ".join(
            f"{split} {len(prepared.tokens(split, domain)):>9,}"
            for split in ("train", "validation", "test")
        )
        line = f"{domain:<12}{shown}  {prepared.bytes_per_token('train', domain):.2f} bytes/token"
        console.print(line, highlight=False, soft_wrap=True)
    typer.echo(f"{prepared.name} is in {prepared.directory}")


def list_corpora() -> None:
    """Lists the built-in corpora."""
    typer.echo("\n".join(BUILT_IN_CORPORA))


def _show(record: Record) -> None:
    console = Console()
    if rank() == 0:
        console.print(evaluation_table(record))
        console.print(evaluation_summary(record), highlight=False, soft_wrap=True)
