"""The commands: each reads its arguments, calls one function, and shows what came out."""

import signal
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

import drgr
from drgr.cli.display import (
    Record,
    evaluation_summary,
    evaluation_table,
    preparation_display,
    quiet_libraries,
)
from drgr.cli.running import existing_run, load_recipe, prepare, run_evaluation, run_training
from drgr.collectives import rank
from drgr.data import BUILT_IN_CORPORA
from drgr.errors import ConfigError, DataError, DrgrError, UnknownRouterError
from drgr.recipes import RECIPES
from drgr.report import write_report
from drgr.training import (
    DataConfig,
    RunDirectory,
    known_keys,
    override,
    resolve_cache,
    write_json,
)

_USAGE, _FAILED = 2, 3
# What a user can mend by changing arguments, settings or data, before anything was computed.
_USAGE_ERRORS = (ConfigError, DataError, UnknownRouterError)

app = typer.Typer(
    name="drgr",
    help="Train Mixture-of-Experts models for their worst domain, inside an exact compute budget.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
data_app = typer.Typer(help="Prepare and inspect corpora.", no_args_is_help=True)
app.add_typer(data_app, name="data")

Cache = Annotated[
    Path | None,
    typer.Option(help="Cache directory; by default DRGR_CACHE, else the platform's."),
]
Settings = Annotated[
    list[str] | None,
    typer.Option("--set", help="Change a setting, e.g. training.steps=100; may be repeated."),
]


def run() -> int:
    """Runs the command line; returns the exit code."""
    debug = "--debug" in sys.argv
    try:
        app([argument for argument in sys.argv[1:] if argument != "--debug"])
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except (DrgrError, OSError) as error:
        if debug:
            raise
        sys.stderr.write(f"drgr: {error}\n")
        return _USAGE if isinstance(error, _USAGE_ERRORS) else _FAILED
    return 0


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"drgr {drgr.__version__}")
        raise typer.Exit


@app.callback(help=app.info.help)
def _options(
    version: Annotated[
        bool,
        typer.Option("--version", is_eager=True, callback=_show_version, help="Show the version."),
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show where an error came from.")] = False,
) -> None:
    """Takes the options of the program itself; ``run`` and the callback have acted on them."""
    del version, debug


@app.command("train")
def train_command(
    recipe: Annotated[
        str, typer.Argument(help="A recipe, a configuration file, or package.module:function.")
    ],
    *,
    run_dir: Annotated[
        Path | None, typer.Option(help="Where the run writes; by default runs/NAME.")
    ] = None,
    settings: Settings = None,
    cache: Cache = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue the run there.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the run there.")] = False,
    report: Annotated[bool, typer.Option(help="Write the report at the end.")] = True,
) -> None:
    """Train a model. Several processes: torchrun --nproc-per-node=2 -m drgr train ..."""
    config = override(load_recipe(recipe), settings or [])
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
        _write_report([directory], directory.path / "report.html")


@app.command("evaluate")
def evaluate_command(
    run_dir: Annotated[Path, typer.Argument(metavar="RUN", help="A run directory.")],
    split: Annotated[str, typer.Option(help="train, validation or test.")] = "test",
    windows: Annotated[
        int | None, typer.Option(min=1, help="Sequences of each domain at most; default all.")
    ] = None,
    output: Annotated[Path | None, typer.Option(help="Also write the record as JSON.")] = None,
    cache: Cache = None,
) -> None:
    """Evaluate the last checkpoint of a run on every domain of a split."""
    quiet_libraries()
    record = run_evaluation(existing_run(run_dir), split=split, windows=windows, cache=cache)
    _show(record)
    if output is not None:
        write_json(output, record)


@app.command("report")
def report_command(
    run_dirs: Annotated[
        list[Path], typer.Argument(metavar="RUN...", help="One or more run directories.")
    ],
    output: Annotated[
        Path | None, typer.Option(help="The HTML file; by default report.html in the first run.")
    ] = None,
) -> None:
    """Write one self-contained HTML report on one run, or several side by side."""
    runs = [existing_run(path) for path in run_dirs]
    _write_report(runs, output or runs[0].path / "report.html")


@app.command("recipes")
def recipes_command(
    name: Annotated[
        str | None, typer.Argument(help="Show this recipe's full configuration as JSON.")
    ] = None,
) -> None:
    """List the recipes, or show one."""
    if name is not None:
        typer.echo(load_recipe(name).to_json(), nl=False)
        return
    for key, recipe in RECIPES.items():
        typer.echo(f"{key:<12}{(recipe.__doc__ or '').strip()}")


@app.command("settings")
def settings_command() -> None:
    """List every setting by its dotted path."""
    typer.echo("\n".join(known_keys()))


@data_app.command("prepare")
def data_prepare_command(
    corpus: Annotated[
        str, typer.Argument(help=f"One of {', '.join(BUILT_IN_CORPORA)}, or a domain file.")
    ] = "drgr-8",
    cache: Cache = None,
    vocabulary_size: Annotated[int, typer.Option(min=258, help="Tokens of the tokenizer.")] = 2048,
    tokenizer: Annotated[
        str | None, typer.Option(help="A Hugging Face tokenizer instead, by name or path.")
    ] = None,
    skip_unreadable: Annotated[
        bool, typer.Option("--skip-unreadable", help="Leave out files that are not text.")
    ] = False,
) -> None:
    """Fetch, check, split and tokenize a corpus; continues where it was interrupted."""
    quiet_libraries()
    console = Console()
    data = DataConfig(
        corpus=corpus,
        vocabulary_size=vocabulary_size,
        tokenizer=tokenizer,
        skip_unreadable=skip_unreadable,
    )
    with preparation_display(console) as display:
        prepared = prepare(data, cache=resolve_cache(cache), report=display)
    for domain in prepared.domains:
        shown = "  ".join(
            f"{split} {len(prepared.tokens(split, domain)):>9,}"
            for split in ("train", "validation", "test")
        )
        ratio = prepared.bytes_per_token("train", domain)
        line = f"{domain:<12}{shown}  {ratio:.2f} bytes/token"
        console.print(line, highlight=False, soft_wrap=True)
    typer.echo(f"{prepared.name} is in {prepared.directory}")


@data_app.command("list")
def data_list_command() -> None:
    """List the built-in corpora."""
    typer.echo("\n".join(BUILT_IN_CORPORA))


def _show(record: Record) -> None:
    console = Console()
    if rank() == 0:
        console.print(evaluation_table(record))
        console.print(evaluation_summary(record), highlight=False, soft_wrap=True)


def _write_report(runs: list[RunDirectory], output: Path) -> None:
    written = write_report([run.path for run in runs], output=output)
    typer.echo(f"{'report':<22}{written}")
