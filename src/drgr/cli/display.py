"""What a person sees: progress bars and the final table."""

import math
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, final

from rich.console import Console, Group
from rich.live import Live
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

from drgr.routing.methods import Method
from drgr.training import StepView

Record = dict[str, Any]


@final
class TrainingDisplay:
    """Shows step, loss, worst domain, spend against budget, tokens per second and the time left.

    The bar has a line of its own, so that nothing is cut at 80 columns. Where the output is not a
    terminal, a line a record stands in for both.
    """

    def __init__(self, console: Console, *, total: int, unit: str) -> None:
        self._console = console
        self._unit = unit
        self._progress = Progress(
            TextColumn("step"),
            MofNCompleteColumn(),
            BarColumn(bar_width=None),
            TimeRemainingColumn(),
        )
        self._task = self._progress.add_task("train", total=total)
        self._figures = Text(no_wrap=True)
        self._live = Live(Group(self._progress, self._figures), console=console)
        self.has_stepped = False

    def __enter__(self) -> "TrainingDisplay":
        if self._console.is_terminal:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._live.stop()

    def on_step(self, view: StepView) -> None:
        """Moves the bar and renews the figures below it."""
        self.has_stepped = True
        figures = [
            f"loss {view.loss:.3f}",
            f"spend {view.spend:,}/{view.limit:,}",
            f"{view.tokens_per_second:,.0f} tok/s",
        ]
        if view.worst_domain is not None:
            figures.insert(1, f"worst {view.worst_domain} {view.worst_loss:.2f} {self._unit}")
        self._progress.update(self._task, completed=view.step)
        self._figures.plain = "  ".join(figures)

    def on_record(self, record: Record) -> None:
        """Prints evaluations and alarms above the bar; also training records without a terminal."""
        kind, step = record["kind"], record["step"]
        if kind == "validation":
            self._console.print(
                f"step {step}: held-out bits per byte, mean {record['mean_bits_per_byte']:.3f}, "
                f"worst {record['worst_bits_per_byte']:.3f} ({record['worst_domain']})"
            )
        elif kind == "alarm":
            self._console.print(f"step {step}: warning: {record['message']}", style="yellow")
        elif kind == "train" and not self._console.is_terminal:
            self._console.print(
                f"step {step}: loss {record['loss']:.3f}, spend {record['spend']:,} of "
                f"{record['budget']:,}, {record['tokens_per_second']:,.0f} tokens/s"
            )


@contextmanager
def preparation_display(console: Console) -> Iterator["PreparationDisplay"]:
    """Shows the stages of preparing a corpus, each with its own bar."""
    progress = Progress(
        TextColumn("{task.description:<28}"),
        BarColumn(bar_width=None),
        TextColumn("{task.percentage:>3.0f} %"),
        TimeRemainingColumn(),
        console=console,
        disable=not console.is_terminal,
    )
    with progress:
        yield PreparationDisplay(console, progress)


@final
class PreparationDisplay:
    """Turns the progress of a preparation into bars."""

    def __init__(self, console: Console, progress: Progress) -> None:
        self._console = console
        self._progress = progress
        self._tasks: dict[str, TaskID] = {}

    def __call__(self, stage: str, done: int, total: int | None) -> None:
        """Moves the bar of a stage."""
        if stage not in self._tasks:
            self._tasks[stage] = self._progress.add_task(stage, total=total)
            if not self._console.is_terminal:
                self._console.print(stage)
        self._progress.update(self._tasks[stage], completed=done, total=total)


def evaluation_table(record: Record) -> Table:
    """Returns the table of an evaluation, one row a domain, the worst one marked."""
    split = record["split"]
    table = Table(title=f"{split} split after {record['step']:,} steps", title_justify="left")
    table.add_column("domain")
    for header in ("training tokens", "bits per byte", "adversarial weight", "experts per token"):
        table.add_column(header, justify="right")
    for name, domain in record["domains"].items():
        is_worst = name == record["worst_domain"]
        table.add_row(
            f"{name} (worst)" if is_worst else name,
            f"{domain['train_tokens']:,}",
            _number(domain["bits_per_byte"], ".3f"),
            _number(domain["adversarial_weight"], ".3f"),
            _number(domain["experts_per_token"], ".2f"),
            style="bold" if is_worst else None,
        )
    return table


def methods_table(methods: Sequence[Method]) -> Table:
    """Returns the table of routing methods, one row each."""
    table = Table(show_lines=True)
    for header in ("name", "kind"):
        table.add_column(header, no_wrap=True)
    for header in ("source", "status", "what it does"):
        table.add_column(header)
    for method in methods:
        status = method.status + ("" if method.slow is None else f"; slow: {method.slow}")
        table.add_row(method.name, method.kind, method.source, status, method.summary)
    return table


def evaluation_summary(record: Record) -> str:
    """Returns the lines below the table."""
    budget, trained = record["budget"], record["budget"]["training"]
    evaluated, average = budget["evaluation"], budget["average"]
    lines = [
        f"mean bits per byte    {record['mean_bits_per_byte']:.3f}",
        f"worst domain          {record['worst_domain']} at {record['worst_bits_per_byte']:.3f}",
        *(
            f"unseen in training    {name} at {_number(domain['bits_per_byte'], '.3f')}, "
            "not in the mean"
            for name, domain in record["unseen"].items()
        ),
        f"effective domains     {record['effective_domains']:.2f} of {len(record['domains'])}",
        f"budget                {budget['minimum']} to {budget['maximum']} experts a token"
        + ("" if average is None else f", {average:g} on average"),
        f"spend in training     {trained['spend']:,} of {trained['budget']:,} assignments, "
        f"{trained['batches_over']} batches over",
        f"spend at evaluation   {evaluated['spend']:,} of {evaluated['budget']:,} assignments "
        f"({evaluated['spend'] / max(1, evaluated['budget']):.1%}), each token by itself",
        f"training FLOPs        {record['flops']:.3e}, of which {record['outer_flops']:.1e} in the "
        "outer loop",
        f"speed                 {record['tokens_per_second']:,.0f} tokens/s",
    ]
    lines += [
        f"{'expert balance' if not index else '':<22}MaxVio {layer['max_violation']:5.2f}, "
        f"MinVio {layer['min_violation']:5.2f}  {layer['name']}"
        for index, layer in enumerate(record["layers"])
    ]
    return "\n".join(lines)


def quiet_libraries() -> None:
    """Keeps other libraries' progress bars and advice off the screen."""
    from transformers.utils import logging  # noqa: PLC0415 - slow to import

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    if not sys.warnoptions:
        warnings.simplefilter("ignore", FutureWarning)


def _number(value: float | None, form: str) -> str:
    return "-" if value is None or not math.isfinite(value) else format(value, form)
