"""Progress displays, on a terminal and elsewhere."""

import io
import math

from rich.console import Console

from drgr.cli.display import (
    PreparationDisplay,
    TrainingDisplay,
    evaluation_table,
    preparation_display,
)
from drgr.training import StepView


def view(**changes) -> StepView:
    fields = {
        "step": 3,
        "loss": 4.25,
        "worst_domain": "chem",
        "worst_loss": 2.5,
        "spend": 1300,
        "limit": 1302,
        "tokens_per_second": 5432.1,
    }
    return StepView(**(fields | changes))


def console(*, terminal: bool) -> Console:
    return Console(file=io.StringIO(), force_terminal=terminal, width=80, legacy_windows=False)


def test_bar_shows_what_a_person_needs():
    output = console(terminal=True)
    with TrainingDisplay(output, total=10, unit="b/B") as display:
        display.on_step(view())
    shown = output.file.getvalue()
    assert "..." not in shown
    assert "\u2026" not in shown
    for part in (
        "3/10",
        "-:--:--",
        "loss 4.250",
        "worst chem 2.50 b/B",
        "spend 1,300/1,302",
        "5,432 tok/s",
    ):
        assert part in shown


def test_before_a_domain_was_measured_there_is_no_worst():
    output = console(terminal=True)
    with TrainingDisplay(output, total=10, unit="b/B") as display:
        display.on_step(view(worst_domain=None, worst_loss=math.nan))
    assert "nan" not in output.file.getvalue()
    assert "worst" not in output.file.getvalue()


def test_without_a_terminal_records_are_lines():
    output = console(terminal=False)
    with TrainingDisplay(output, total=10, unit="b/B") as display:
        display.on_step(view())
        assert output.file.getvalue() == ""
        display.on_record(
            {
                "kind": "train",
                "step": 3,
                "loss": 4.25,
                "spend": 5,
                "budget": 6,
                "tokens_per_second": 10.0,
            }
        )
        display.on_record({"kind": "alarm", "step": 4, "message": "one domain only"})
    assert output.file.getvalue().splitlines() == [
        "step 3: loss 4.250, spend 5 of 6, 10 tokens/s",
        "step 4: warning: one domain only",
    ]


def test_preparation_names_each_stage_once():
    output = console(terminal=False)
    with preparation_display(output) as display:
        assert isinstance(display, PreparationDisplay)
        for done in range(3):
            display("fetch", done, 2)
        display("encode", 0, None)
    assert output.file.getvalue().split() == ["fetch", "encode"]


def test_the_table_marks_the_worst_and_shows_gaps():
    record = {
        "split": "test",
        "step": 1200,
        "worst_domain": "b",
        "domains": {
            "a": {
                "train_tokens": 0,
                "bits_per_byte": None,
                "adversarial_weight": 0.25,
                "experts_per_token": None,
            },
            "b": {
                "train_tokens": 12345,
                "bits_per_byte": 1.5,
                "adversarial_weight": 0.75,
                "experts_per_token": 1.75,
            },
        },
    }
    output = console(terminal=False)
    output.print(evaluation_table(record))
    shown = output.file.getvalue()
    assert "test split after 1,200 steps" in shown
    assert "b (worst)" in shown
    assert "a (worst)" not in shown
    assert "12,345" in shown
    assert "1.500" in shown
    rows = [line for line in shown.splitlines() if "0.250" in line]
    assert rows[0].count(" - ") == 2
