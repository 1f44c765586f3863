"""What the commands run: recipes found, corpora prepared, processes joined."""

import importlib
import os
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from rich.console import Console

from drgr.cli.display import Record, TrainingDisplay, preparation_display
from drgr.collectives import rank, world_size
from drgr.data import Corpus, Progress, prepare_corpus, silent
from drgr.errors import CheckpointError, ConfigError
from drgr.recipes import RECIPES
from drgr.training import (
    DataConfig,
    RunConfig,
    RunDirectory,
    build_run,
    check_run_directory,
    describe_environment,
    read_config,
    remove_run,
    resolve_cache,
    train,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class CommandOutcome:
    """How a training command ended.

    Attributes:
        step: Steps taken.
        signal: The signal that stopped it, 0 if it ran to its end.
        evaluation: The final evaluation; ``None`` if it was stopped.
        is_first_process: Whether this process speaks for the run.
    """

    step: int
    signal: int
    evaluation: Record | None
    is_first_process: bool

    @property
    def exit_code(self) -> int:
        """0, or 128 plus the signal."""
        return 128 + self.signal if self.signal else 0


def load_recipe(name: str) -> RunConfig:
    """Finds a configuration by recipe name, file, or ``package.module:function``.

    Raises:
        ConfigError: If there is none by that name.
    """
    if name in RECIPES:
        return RECIPES[name]()
    if Path(name).suffix in (".json", ".toml", ".yaml", ".yml"):
        return read_config(Path(name))
    module_name, separator, function_name = name.partition(":")
    if not separator:
        raise ConfigError(
            f"recipe {name!r} is unknown; use one of {', '.join(RECIPES)}, a configuration file, "
            f"or package.module:function"
        )
    sys.path.insert(0, str(Path.cwd()))
    try:
        module = importlib.import_module(module_name)
        recipe: Callable[[], RunConfig] = getattr(module, function_name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(f"recipe {name!r} cannot be imported: {error}") from error
    try:
        config = recipe()
    except (TypeError, ValueError) as error:
        raise ConfigError(f"recipe {name!r} is not valid: {error}") from error
    if not isinstance(config, RunConfig):
        raise ConfigError(f"recipe {name!r} must return a RunConfig, got {type(config).__name__}")
    return config


def existing_run(path: Path) -> RunDirectory:
    """Returns the run directory at ``path``.

    Raises:
        ConfigError: If there is none.
    """
    directory = RunDirectory(path)
    if not directory.config.exists():
        raise ConfigError(f"{path} is not a run directory (it has no config.json); name one")
    return directory


def prepare(data: DataConfig, *, cache: Path, report: Progress = silent) -> Corpus:
    """Prepares the corpus that the data settings ask for."""
    return prepare_corpus(
        data.corpus,
        cache=cache,
        vocabulary_size=data.vocabulary_size,
        tokenizer=data.tokenizer,
        skip_unreadable=data.skip_unreadable,
        report=report,
    )


def run_training(
    config: RunConfig,
    directory: RunDirectory,
    *,
    cache: Path | None,
    resume: bool,
    overwrite: bool,
) -> CommandOutcome:
    """Trains, in this process or together with those that torchrun started."""
    with joined_processes():
        is_first = rank() == 0
        if is_first:
            check_run_directory(directory.path, resume=resume, overwrite=overwrite)
        console = Console(stderr=True, quiet=not is_first)
        corpus = prepare_together(config.data, cache=cache, console=console)
        run = build_run(config, corpus)
        if is_first and overwrite:
            remove_run(directory)
        unit = "b/B" if config.robustness.unit == "bits-per-byte" else "nats"
        with (
            TrainingDisplay(console, total=config.training.steps, unit=unit) as display,
            usage_error_before(lambda: display.has_stepped),
            _quiet_threads(),
        ):
            outcome = train(
                run,
                directory,
                observer=display,
                environment=describe_environment(["drgr", *sys.argv[1:]], processes=world_size()),
                resume=resume,
            )
    return CommandOutcome(
        step=outcome.step,
        signal=outcome.signal,
        evaluation=outcome.evaluation,
        is_first_process=is_first,
    )


@contextmanager
def _quiet_threads() -> Iterator[None]:
    """Hides a full disk's traceback in TensorBoard's thread: the main thread raises it again."""
    previous = threading.excepthook

    def hide_write_errors(error: threading.ExceptHookArgs) -> None:
        if not issubclass(error.exc_type, OSError):
            previous(error)

    threading.excepthook = hide_write_errors
    try:
        yield
    finally:
        threading.excepthook = previous


@contextmanager
def usage_error_before(has_begun: Callable[[], bool]) -> Iterator[None]:
    """Makes a checkpoint that cannot be used a matter of usage, as long as nothing was computed."""
    try:
        yield
    except CheckpointError as error:
        if has_begun():
            raise
        raise ConfigError(str(error)) from error


def prepare_together(data: DataConfig, *, cache: Path | None, console: Console) -> Corpus:
    """Prepares the corpus in the first process while the others wait; then all open it."""
    if world_size() > 1 and rank() != 0:
        dist.barrier()
    with preparation_display(console) as display:
        corpus = prepare(data, cache=resolve_cache(cache), report=display)
    if world_size() > 1 and rank() == 0:
        dist.barrier()
    return corpus


@contextmanager
def joined_processes() -> Iterator[None]:
    """Joins the processes that torchrun started, for the time of a command."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield
        return
    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    try:
        yield
    finally:
        dist.destroy_process_group()
