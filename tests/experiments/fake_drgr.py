"""Stands for the command line of drgr: writes what a run leaves, at once, without PyTorch.

Figures follow from the configuration. The environment variable FAKE_RUNS names a JSON file of what
is to happen to the runs of a method, by its name: ``fail`` with a message, ``flops`` per step,
``seconds`` to take, ``kill`` with a signal, ``empty`` to leave nothing.
"""

import json
import math
import os
import sys
import time
from pathlib import Path

DOMAINS = ("speech", "factbook")


def main() -> None:
    command, target, *options = sys.argv[1:]
    if command == "train":
        train(Path(target), Path(options[options.index("--run-dir") + 1]), "--resume" in options)
    else:
        validate(Path(target), Path(options[options.index("--output") + 1]))


def train(config_file: Path, directory: Path, resume: bool) -> None:
    config = json.loads(config_file.read_text())
    acts = json.loads(Path(os.environ["FAKE_RUNS"]).read_text()).get(config["name"], {})
    if resume != (directory / "config.json").exists():
        sys.exit(f"drgr: --resume is {resume}, but it should not be")
    directory.mkdir(parents=True, exist_ok=True)
    with (directory.parents[1] / "began.txt").open("a") as file:
        file.write(f"{directory.name} {resume} {os.environ['OMP_NUM_THREADS']}\n")
    (directory / "config.json").write_text(json.dumps(config))
    environment = {
        "commit": "abc",
        "dirty": False,
        "versions": {"drgr": "1"},
        "hardware": {"cores": 2},
    }
    (directory / "environment.json").write_text(json.dumps(environment))
    time.sleep(acts.get("seconds", 0.0))
    if "kill" in acts:
        os.kill(os.getpid(), acts["kill"])
    if "fail" in acts:
        sys.exit(f"noise\ndrgr: {acts['fail']}")
    if "empty" in acts:
        return
    (directory / "model").mkdir()
    (directory / "evaluation.json").write_text(json.dumps(evaluation(config, acts, "test")))


def validate(directory: Path, output: Path) -> None:
    config = json.loads((directory / "config.json").read_text())
    acts = json.loads(Path(os.environ["FAKE_RUNS"]).read_text()).get(config["name"], {})
    output.write_text(json.dumps(evaluation(config, acts, "validation")))


def evaluation(config: dict, acts: dict, split: str) -> dict:
    """Best at a learning rate of 0.01."""
    training = config["training"]
    worst = 3 + abs(math.log10(training["learning_rate"]) + 2) + 0.01 * training["seed"]
    values = dict(zip(DOMAINS, (worst - 1, worst), strict=True))
    return {
        "split": split,
        "step": training["steps"],
        "flops": acts.get("flops", 1.0) * training["steps"],
        "outer_flops": 0.0,
        "seconds": 1.0,
        "tokens_per_second": 1000.0,
        "effective_domains": 2.0,
        "domains": {
            name: {"bits_per_byte": value, "loss": value} for name, value in values.items()
        },
        "mean_bits_per_byte": worst - 0.5,
        "worst_domain": "factbook",
        "worst_bits_per_byte": worst,
    }


if __name__ == "__main__":
    main()
