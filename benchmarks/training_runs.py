"""What benchmarks of training share: whole runs as ``drgr train`` does them, and single steps."""

import json
import os
import shutil
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from drgr.data import Corpus, prepare_corpus
from drgr.training import RunConfig, resolve_cache
from drgr.training.held_out import held_out_sums
from drgr.training.setup import RunObjects
from drgr.training.step import train_step
from drgr.training.step_totals import is_finite

# One forward pass costs a third of a training pass over as many tokens.
BACKWARD_SHARE = 3
# A frozen price may spend more than the average in held-out passes; 5 % covers it.
MARGIN = 1.05


def trained(directory: Path, settings: Sequence[str], *, cache: str | None) -> dict[str, Any]:
    """Trains the recipe ``demo`` with changes, on one thread, anew; returns its evaluation.

    Returns:
        The record of ``evaluation.json``, or the end of the error output under ``failed``.
    """
    shutil.rmtree(directory, ignore_errors=True)
    command = [sys.executable, "-m", "drgr", "train", "demo", "--run-dir", str(directory)]
    command += ["--no-report", *[part for setting in settings for part in ("--set", setting)]]
    if cache:
        command += ["--cache", cache]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if result.returncode:
        return {"failed": result.stderr[-2000:]}
    record: dict[str, Any] = json.loads((directory / "evaluation.json").read_text())
    return record


def opened_corpus(config: RunConfig, *, cache: str | Path | None) -> Corpus:
    """Returns the corpus of a configuration, prepared if it is not yet."""
    return prepare_corpus(
        config.data.corpus,
        cache=resolve_cache(Path(cache) if cache else None),
        vocabulary_size=config.data.vocabulary_size,
    )


def summarise(runs: Sequence[dict[str, Any]], method: str, keys: Sequence[str]) -> dict[str, Any]:
    """Returns mean and standard deviation over seeds; failed runs are counted, not hidden."""
    mine = [run for run in runs if run["method"] == method]
    finished = [run for run in mine if "failed" not in run]
    summary: dict[str, Any] = {"seeds": len(mine), "failed": len(mine) - len(finished)}
    for key in keys:
        values = [run[key] for run in finished]
        if values:
            summary[key] = {
                "mean": statistics.fmean(values),
                "sd": statistics.stdev(values) if len(values) > 1 else 0.0,
            }
    return summary


def stepper(run: RunObjects, *, held_out: bool) -> Callable[[int], None]:
    """Returns the step of ``drgr train``; with ``held_out`` its share of the adversary's passes."""
    settings = run.config.robustness

    def step(number: int) -> None:
        if number % settings.every == 0:
            if held_out:
                sums, counts, _ = held_out_sums(
                    run.attachment,
                    run.corpus,
                    run.settings,
                    run.flops,
                    step=number,
                    windows=settings.windows,
                )
                run.adversary.observe(sums, counts)
            run.adversary.refresh()
        totals = train_step(
            run.forward_model,
            run.attachment,
            run.optimizer,
            run.corpus,
            run.settings,
            step=number,
            weights=run.adversary.weights,
        )
        if not is_finite(totals):
            raise SystemExit(f"step {number} is not finite")

    return step
