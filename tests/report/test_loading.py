import json
import math

import pytest

from drgr.errors import ConfigError, DataError
from drgr.report import RunRecord, load_run


def rewrite(path, change):
    content = json.loads(path.read_text(encoding="utf-8"))
    change(content)
    path.write_text(json.dumps(content), encoding="utf-8")


def append(directory, *lines):
    with (directory / "metrics.jsonl").open("ab") as file:
        for line in lines:
            file.write(line if isinstance(line, bytes) else json.dumps(line).encode() + b"\n")


def test_reads_every_file_of_a_finished_run(make_run):
    directory = make_run(steps=60, layers=2)
    run = load_run(directory)
    assert isinstance(run, RunRecord)
    assert run.name == "robust"
    assert run.notes == ()
    assert [record.step for record in run.train] == [10, 20, 30, 40, 50, 60]
    assert [record.step for record in run.validation] == [30, 60]
    assert [alarm.message for alarm in run.alarms] == ["effective domains fell below 2"]
    assert run.config == json.loads((directory / "config.json").read_text())
    assert run.environment.dirty is True
    assert run.environment.versions["torch"] == "2.13.0"
    assert run.environment.hardware == {"processor": "x86_64", "cores": "2"}
    lines = (directory / "metrics.jsonl").read_text().splitlines()
    first = json.loads(lines[0])
    assert run.train[0].adversary == first["adversary"]
    assert run.train[0].spend == first["spend"]
    assert run.train[0].layers[1].load == tuple(first["layers"][1]["load"])
    written = json.loads((directory / "evaluation.json").read_text())
    assert run.evaluation is not None
    assert run.evaluation.layers[0].domain_load["chem"] == tuple(
        written["layers"][0]["domain_load"]["chem"]
    )
    assert run.evaluation.budget.training_batches_over == 0


def test_interrupted_run_ends_at_its_last_whole_line(make_run):
    run = load_run(make_run(interrupted=True))
    assert run.evaluation is None
    assert run.train[-1].step == 150
    assert len(run.notes) == 1
    assert "last line of metrics.jsonl" in run.notes[0]
    assert "incomplete" in run.notes[0]


def test_whole_last_line_without_newline_counts(make_run):
    directory = make_run(steps=20)
    append(directory, b'{"kind": "train", "step": 30, "loss": 2.5}')
    run = load_run(directory)
    assert run.train[-1].step == 30
    assert run.train[-1].loss == 2.5
    assert run.train[-1].adversary == {}
    assert run.notes == ()


def test_unreadable_line_in_the_middle_is_named(make_run):
    directory = make_run(steps=20)
    append(directory, b"\xff\xfe\n", {"kind": "train", "step": 30})
    run = load_run(directory)
    assert run.train[-1].step == 30
    assert run.notes == ("Line 3 of metrics.jsonl is not valid JSON; left out.",)


def test_unknown_kinds_are_ignored_and_lines_without_step_named(make_run):
    directory = make_run(steps=20)
    append(directory, {"kind": "profile", "step": 1}, {"kind": "train", "loss": 1.0}, b"[1, 2]\n")
    run = load_run(directory)
    assert len(run.train) == 2
    assert run.notes == (
        "Line 4 of metrics.jsonl has no step; left out.",
        "metrics.jsonl line 5: must be an object, got [1, 2]; left out.",
    )


@pytest.mark.parametrize(
    "number", [math.nan, math.inf, -math.inf, 10**400], ids=["nan", "inf", "minus inf", "huge"]
)
def test_non_finite_numbers_are_left_out_and_named(make_run, number):
    directory = make_run(steps=20)
    append(directory, {"kind": "train", "step": 30, "loss": number, "domain_loss": {"a": number}})
    run = load_run(directory)
    assert run.train[-1].loss is None
    assert run.train[-1].domain_loss == {"a": None}
    assert len(run.notes) == 2
    assert "metrics.jsonl line 3, loss: must be a finite number" in run.notes[0]
    assert "metrics.jsonl line 3, domain_loss, a: must be a finite number" in run.notes[1]


def test_values_of_a_wrong_type_are_left_out_and_named(make_run):
    directory = make_run(steps=20)
    wrong = {"kind": "train", "step": 30, "loss": "low", "budget": True, "near_one_hot": 1}
    append(directory, {**wrong, "layers": {}, "adversary": [1], "sampling": None})
    append(directory, {"kind": "alarm", "step": 30, "message": 5})
    run = load_run(directory)
    last = run.train[-1]
    assert (last.loss, last.budget, last.near_one_hot, last.layers) == (None, None, False, ())
    assert last.adversary == {}
    assert run.alarms[-1].message == "(no message)"
    wanted = ("a number, got 'low'", "a number, got True", "true or false", "a list", "an object")
    for part in (*wanted, "a text, got 5"):
        assert any(part in note for note in run.notes), part
    assert len(run.notes) == 6


def test_nulls_are_silent(make_run):
    directory = make_run(steps=20)
    append(directory, {"kind": "train", "step": 30, "loss": None, "domain_loss": {"chem": None}})
    run = load_run(directory)
    assert run.train[-1].domain_loss == {"chem": None}
    assert run.notes == ()


def test_resumed_run_counts_rewritten_steps_once(make_run):
    directory = make_run(steps=90)
    append(
        directory,
        {"kind": "alarm", "step": 70, "message": "of the first attempt"},
        {"kind": "validation", "step": 60, "mean_bits_per_byte": 8.0},
        {"kind": "train", "step": 60, "loss": 9.0},
        {"kind": "train", "step": 70, "loss": 9.5},
    )
    run = load_run(directory)
    assert [record.step for record in run.train] == [10, 20, 30, 40, 50, 60, 70]
    assert [record.loss for record in run.train][-2:] == [9.0, 9.5]
    assert [record.step for record in run.validation] == [30, 60]
    assert run.validation[-1].mean_bits_per_byte == 8.0
    assert [alarm.step for alarm in run.alarms] == [40]
    # Training 60 to 90, validation 60 and 90, and the alarm.
    assert run.notes == ("7 record(s) were written again after a resume; the later ones count.",)


def test_resume_forgets_a_validation_beyond_its_last_step(make_run):
    directory = make_run(steps=60)
    append(directory, {"kind": "train", "step": 40, "loss": 9.0})
    run = load_run(directory)
    assert run.train[-1].step == 40
    assert [record.step for record in run.validation] == [30]


def test_alarms_of_one_step_are_all_kept(make_run):
    directory = make_run(steps=20)
    append(directory, *({"kind": "alarm", "step": 50, "message": name} for name in "ab"))
    assert [alarm.message for alarm in load_run(directory).alarms][-2:] == ["a", "b"]


@pytest.mark.parametrize("missing", ["config.json", "environment.json", "metrics.jsonl"])
def test_missing_file_is_noted(make_run, missing):
    directory = make_run(steps=20)
    (directory / missing).unlink()
    (note,) = load_run(directory).notes
    assert note.startswith(f"{missing} is missing")


def test_command_given_as_list_is_joined(make_run):
    directory = make_run(steps=20)
    rewrite(directory / "environment.json", lambda c: c.update(command=["drgr", "train"]))
    assert load_run(directory).environment.command == "drgr train"


def test_directory_that_does_not_exist(tmp_path):
    with pytest.raises(ConfigError, match=r"must be an existing directory, got '.*nowhere'; give"):
        load_run(tmp_path / "nowhere")


def test_directory_that_is_no_run(tmp_path):
    (tmp_path / "notes.txt").write_text("hello")
    with pytest.raises(ConfigError, match=r"must hold at least one of config\.json.*give the dir"):
        load_run(tmp_path)


@pytest.mark.parametrize("name", ["config.json", "environment.json", "evaluation.json"])
@pytest.mark.parametrize("content", [b'{"a": ', b"\xff{}", b"[" * 100_000, b"1" * 5000])
def test_broken_json_file(make_run, name, content):
    directory = make_run(steps=20)
    (directory / name).write_bytes(content)
    with pytest.raises(DataError, match=rf"{name}' must .*remove it to report on the rest"):
        load_run(directory)


def test_json_file_without_an_object(make_run):
    directory = make_run(steps=20)
    (directory / "config.json").write_text("[]")
    with pytest.raises(DataError, match=r"must hold a JSON object, got list; restore it"):
        load_run(directory)
