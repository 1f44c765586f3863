"""Training: the loop that joins data, model, routing and the adversary.

Reading order: ``config`` and ``routing_config`` (all settings), ``setup`` (settings to objects),
``step`` (one optimizer step), ``adversary`` and ``held_out`` (domain weights), ``loop`` (everything
over time), ``checkpoint``.
"""

from drgr.training.config import (
    DataConfig,
    RunConfig,
    known_keys,
    override,
    parse_config,
    read_config,
)
from drgr.training.finish import evaluate_protocol, evaluate_run
from drgr.training.loop import Observer, Outcome, StepView, train
from drgr.training.run_directory import (
    RunDirectory,
    check_run_directory,
    describe_environment,
    remove_run,
    write_json,
)
from drgr.training.setup import RunObjects, build_run, resolve_cache

__all__ = [
    "DataConfig",
    "Observer",
    "Outcome",
    "RunConfig",
    "RunDirectory",
    "RunObjects",
    "StepView",
    "build_run",
    "check_run_directory",
    "describe_environment",
    "evaluate_protocol",
    "evaluate_run",
    "known_keys",
    "override",
    "parse_config",
    "read_config",
    "remove_run",
    "resolve_cache",
    "train",
    "write_json",
]
