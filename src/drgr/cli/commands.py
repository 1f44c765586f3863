"""The commands and their arguments.

What a command does is in ``actions``, which is imported when a command runs: it brings PyTorch and
transformers, and ``drgr --help`` should not wait for them.
"""

import importlib.util
import sys
from pathlib import Path
from typing import Annotated

import typer

import drgr
from drgr.errors import ConfigError, DataError, DrgrError, UnknownRouterError

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
    from drgr.cli import actions

    actions.train_run(
        recipe,
        run_dir=run_dir,
        settings=settings or [],
        cache=cache,
        resume=resume,
        overwrite=overwrite,
        report=report,
    )


@app.command("evaluate")
def evaluate_command(
    target: Annotated[
        str,
        typer.Argument(
            metavar="RUN|MODEL", help="A run directory, a saved MoE model, or its hub name."
        ),
    ],
    *,
    data: Annotated[
        str | None,
        typer.Option(
            metavar="CORPUS",
            help="A built-in corpus or a domain file; by default the run's own. Models need it.",
        ),
    ] = None,
    tokenizer: Annotated[
        str | None, typer.Option(help="Tokenizer of a model, where it has none of its own.")
    ] = None,
    split: Annotated[str, typer.Option(help="train, validation or test.")] = "test",
    windows: Annotated[
        int | None, typer.Option(min=1, help="Sequences of each domain at most; default all.")
    ] = None,
    sequence_length: Annotated[
        int | None, typer.Option(min=2, help="Tokens of a sequence; by default the run's.")
    ] = None,
    batch_size: Annotated[
        int | None, typer.Option(min=1, help="Sequences in a forward pass; by default the run's.")
    ] = None,
    reference: Annotated[
        Path | None, typer.Option(help="Another evaluation, or a run, to take the excess over.")
    ] = None,
    repeats: Annotated[int, typer.Option(min=1, help="Forward passes that are timed.")] = 20,
    output: Annotated[
        Path | None, typer.Option(help="Also write a run's evaluation record as JSON.")
    ] = None,
    protocol: Annotated[
        Path | None,
        typer.Option(help="Where the whole record goes; by default protocol.json in the run."),
    ] = None,
    cache: Cache = None,
) -> None:
    """Evaluate a run's last checkpoint or any MoE model: robustness, fairness, compute."""
    from drgr.cli import actions, evaluating

    request = evaluating.EvaluationRequest(
        data=data,
        tokenizer=tokenizer,
        split=split,
        windows=windows,
        sequence_length=sequence_length,
        batch_size=batch_size,
        repeats=repeats,
        reference=reference,
        cache=cache,
    )
    actions.evaluate_target(target, request, output=output, protocol=protocol)


@app.command("report")
def report_command(
    run_dirs: Annotated[
        list[Path], typer.Argument(metavar="RUN...", help="One or more run directories.")
    ],
    output: Annotated[
        Path | None,
        typer.Option(
            help="The HTML file; by default report.html, or comparison.html, in the first run."
        ),
    ] = None,
) -> None:
    """Write one self-contained HTML report on one run, or several side by side."""
    from drgr.cli import actions

    actions.report_runs(run_dirs, output=output)


@app.command("compare")
def compare_command(
    experiment: Annotated[
        Path, typer.Argument(metavar="EXPERIMENT", help="A YAML or JSON file of methods.")
    ],
    *,
    directory: Annotated[
        Path | None, typer.Option(help="Where everything is kept; by default runs/NAME.")
    ] = None,
    parallel: Annotated[int, typer.Option(min=1, help="Runs at a time, a process each.")] = 1,
    cache: Cache = None,
    retry_failed: Annotated[
        bool, typer.Option("--retry-failed", help="Make runs that failed before anew.")
    ] = False,
    allow_dirty: Annotated[
        bool, typer.Option("--allow-dirty", help="Run from source that differs from its commit.")
    ] = False,
    export: Annotated[
        str | None, typer.Option(help="Run nothing; write the results as csv, latex or markdown.")
    ] = None,
    output: Annotated[Path | None, typer.Option(help="File of --export; else the output.")] = None,
) -> None:
    """Compare methods over seeds at equal FLOPs; continues where it was interrupted."""
    if importlib.util.find_spec("scipy") is None:
        raise ConfigError("drgr compare needs scipy; install it with pip install 'drgr[compare]'")
    from drgr.cli import comparing

    comparison = comparing.open_comparison(experiment, directory=directory, cache=cache)
    if export is not None:
        comparing.export_results(comparison, form=export, output=output)
        return
    comparing.compare_methods(
        comparison, parallel=parallel, retry_failed=retry_failed, allow_dirty=allow_dirty
    )


@app.command("recipes")
def recipes_command(
    name: Annotated[
        str | None, typer.Argument(help="Show this recipe's full configuration as JSON.")
    ] = None,
) -> None:
    """List the recipes, or show one."""
    from drgr.cli import actions

    actions.show_recipes(name)


@app.command("methods")
def methods_command(
    kind: Annotated[
        str | None, typer.Argument(help="score, price, selection or loss; all by default.")
    ] = None,
) -> None:
    """List the routing methods: name, source, what is published and what derived."""
    from drgr.cli import actions

    actions.show_methods(kind)


@app.command("settings")
def settings_command() -> None:
    """List every setting by its dotted path."""
    from drgr.cli import actions

    actions.show_settings()


@data_app.command("prepare")
def data_prepare_command(
    corpus: Annotated[
        str, typer.Argument(help="A built-in corpus (see drgr data list), or a domain file.")
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
    from drgr.cli import actions

    data: dict[str, object] = {
        "corpus": corpus,
        "vocabulary_size": vocabulary_size,
        "tokenizer": tokenizer,
        "skip_unreadable": skip_unreadable,
    }
    actions.prepare_data(data, cache=cache)


@data_app.command("list")
def data_list_command() -> None:
    """List the built-in corpora."""
    from drgr.cli import actions

    actions.list_corpora()
