"""The command line as real processes: signals, exit codes, and several processes together."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType

import pytest

from drgr.data import Corpus

SOURCE = Path(__file__).parents[2] / "src"
LONG = {"training__steps": 60, "training__log_every": 1, "training__evaluate_every": 50}


@pytest.fixture
def start(tmp_path: Path):
    """Starts ``python ARGUMENTS`` with the package on its path and one thread."""
    started = []

    def run(*arguments: object) -> subprocess.Popen:
        environment = os.environ | {
            "PYTHONPATH": os.pathsep.join([str(SOURCE), os.environ.get("PYTHONPATH", "")]),
            "OMP_NUM_THREADS": "1",
        }
        process = subprocess.Popen(
            [sys.executable, *map(str, arguments)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=tmp_path,
            env=environment,
        )
        started.append(process)
        return process

    yield run
    for process in started:
        if process.poll() is None:
            process.kill()
            process.communicate()


def wait_for_records(path: Path, count: int, process: subprocess.Popen) -> None:
    """Returns when ``metrics.jsonl`` has ``count`` lines."""
    deadline = time.monotonic() + 90
    while time.monotonic() < deadline and process.poll() is None:
        if path.exists() and path.read_bytes().count(b"\n") >= count:
            return
        time.sleep(0.01)
    raise AssertionError(f"no {count} records: {process.communicate()}")


@pytest.mark.slow
def test_signals_finish_the_step_save_and_say_so(
    start, drgr, config_file, cache, tmp_path, runs: ModuleType, corpus: Corpus
):
    run, seen = tmp_path / "run", 0
    arguments = ["train", config_file(**LONG), "--run-dir", run, "--cache", cache, "--no-report"]
    for number, code in ((signal.SIGINT, 130), (signal.SIGTERM, 143)):
        process = start("-m", "drgr", *arguments, *(["--resume"] if seen else []))
        wait_for_records(run / "metrics.jsonl", seen + 1, process)
        process.send_signal(number)
        out, err = process.communicate(timeout=60)
        assert process.returncode == code, err
        checkpoint = max(path.name for path in (run / "checkpoints").iterdir())
        records = runs.read_records(run)
        step = records[-1]["step"]
        # The step was finished, logged and saved, and the run stopped long before its end.
        assert checkpoint == f"step-{step:08d}"
        assert seen < step < 60
        assert f"drgr: stopped by {number.name} after step {step}, saved; use --resume" in err
        assert "Traceback" not in err
        assert out == ""
        assert not (run / "evaluation.json").exists()
        seen = len(records)
    assert drgr(*arguments, "--resume").code == 0
    runs.run_small(runs.small_config(**LONG), corpus, tmp_path / "straight")
    runs.assert_same(runs.results(run), runs.results(tmp_path / "straight"))


@pytest.mark.slow
def test_torchrun(start, config_file, cache, tmp_path, runs: ModuleType, corpus: Corpus):
    changes = {"training__batch_size": 8, "training__steps": 4, "training__log_every": 1}
    process = start(
        "-m",
        "torch.distributed.run",
        "--nproc-per-node=2",
        "--rdzv-backend=c10d",
        "--rdzv-endpoint=localhost:0",
        "-m",
        "drgr",
        "train",
        config_file(**changes),
        "--run-dir",
        tmp_path / "two",
        "--cache",
        cache,
        "--no-report",
    )
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    # The first process alone speaks.
    assert out.count("mean bits per byte") == 1
    assert err.count("step 2: loss") == 1
    environment = json.loads((tmp_path / "two" / "environment.json").read_text())
    assert environment["processes"] == 2
    runs.run_small(runs.small_config(**changes), corpus, tmp_path / "one")
    together, alone = runs.results(tmp_path / "two"), runs.results(tmp_path / "one")
    for mine, theirs in zip(together["metrics"], alone["metrics"], strict=True):
        assert mine["loss"] == pytest.approx(theirs["loss"], rel=1e-4)
        assert mine["spend"] == theirs["spend"] == mine["budget"]
        assert mine["domain_tokens"] == theirs["domain_tokens"]
    mine, theirs = together["evaluation"], alone["evaluation"]
    assert mine["worst_bits_per_byte"] == pytest.approx(theirs["worst_bits_per_byte"], rel=1e-3)
    assert mine["budget"]["training"] == theirs["budget"]["training"]


@pytest.mark.slow
def test_bad_input_in_a_real_process(start, config_file, tmp_path):
    path = config_file(training__stepz=3)
    process = start("-m", "drgr", "train", path)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 2
    assert out == ""
    assert err == "drgr: training.stepz is not a setting; the nearest is training.steps\n"
    assert not (tmp_path / "runs").exists()


def test_missing_parts_are_named(start):
    """An installation without the extras says how to get them, and shows no traceback."""
    code = (
        "import importlib.util, sys\n"
        "find = importlib.util.find_spec\n"
        "missing = ('typer', 'plotly')\n"
        "importlib.util.find_spec = lambda name: None if name in missing else find(name)\n"
        "sys.argv = ['drgr', '--version']\n"
        "from drgr.cli.main import main\n"
        "main()\n"
    )
    process = start("-c", code)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (2, "")
    assert err == (
        "drgr: the command line needs typer, plotly; install it with pip install 'drgr[train]'\n"
    )
