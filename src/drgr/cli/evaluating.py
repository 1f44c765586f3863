"""What ``drgr evaluate`` runs: the protocol on a run or on a saved model."""

import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

import torch
from rich.console import Console

from drgr.cli.display import Record
from drgr.cli.running import joined_processes, prepare_together, usage_error_before
from drgr.collectives import rank, world_size
from drgr.errors import ConfigError
from drgr.evaluation import (
    PlainModel,
    ProtocolSettings,
    check_subject,
    measure,
    protocol_record,
    read_reference,
)
from drgr.models import load_pretrained
from drgr.training import (
    DataConfig,
    RunDirectory,
    build_run,
    describe_environment,
    evaluate_protocol,
    read_config,
)

_SEQUENCE_LENGTH, _BATCH_SIZE = 256, 8


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluationRequest:
    """What a person asked for; what is ``None`` is the run's own, or a default.

    Attributes:
        data: Corpus to evaluate on.
        tokenizer: Tokenizer of a model.
        split: Which split.
        windows: Sequences of each domain at most.
        sequence_length: Tokens of a sequence.
        batch_size: Sequences in a forward pass.
        repeats: Forward passes that are timed.
        reference: Another evaluation to compare with.
        cache: Cache directory.
    """

    data: str | None
    tokenizer: str | None
    split: str
    windows: int | None
    sequence_length: int | None
    batch_size: int | None
    repeats: int
    reference: Path | None
    cache: Path | None


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluationOutcome:
    """What an evaluation gave.

    Attributes:
        evaluation: A record as in ``evaluation.json``; ``None`` for a model or another corpus.
        protocol: The protocol's record.
        is_first_process: Whether this process speaks for all.
    """

    evaluation: Record | None
    protocol: Record
    is_first_process: bool


def find_target(name: str, *, data: str | None) -> RunDirectory | str:
    """Tells a run from a model.

    Args:
        name: A run directory, a directory written by ``save_pretrained``, or a hub name.
        data: The corpus that was given, without which no model can be evaluated.

    Returns:
        The run, or the name of the model.

    Raises:
        ConfigError: If it can be neither.
    """
    path = Path(name)
    if (path / "config.json").is_file():
        if not _is_model(path / "config.json"):
            return RunDirectory(path)
    elif path.exists() or data is None:
        raise ConfigError(
            f"{path} is not a run directory (it has no config.json), nor a saved model; name one, "
            "or give the hub name of a model together with --data"
        )
    if data is None:
        raise ConfigError(f"{path} is a model, not a run, so say what to read with --data CORPUS")
    return name


def run_evaluation(target: RunDirectory | str, request: EvaluationRequest) -> EvaluationOutcome:
    """Evaluates, in this process or together with those that torchrun started.

    Raises:
        ConfigError: If target, settings, corpus and reference do not fit together.
        DataError: If the corpus cannot be read, or is too short.
        UnknownRouterError: If a model has no MoE layer whose routes can be read.
        NonFiniteLossError: If a loss is not finite.
    """
    with joined_processes(), usage_error_before(lambda: False):
        is_first = rank() == 0
        environment = describe_environment(["drgr", *sys.argv[1:]], processes=world_size())
        if isinstance(target, RunDirectory):
            evaluation, protocol = _evaluate_run(target, request)
        else:
            evaluation, protocol = None, _evaluate_model(target, request)
    return EvaluationOutcome(
        evaluation=evaluation,
        protocol=protocol | {"environment": environment},
        is_first_process=is_first,
    )


def _evaluate_run(
    run_dir: RunDirectory, request: EvaluationRequest
) -> tuple[Record | None, Record]:
    if request.tokenizer is not None:
        raise ConfigError("--tokenizer is for models; a run is evaluated with its own tokenizer")
    config = read_config(run_dir.config)
    console = _console()
    own = prepare_together(config.data, cache=request.cache, console=console)
    corpus = None
    if request.data is not None:
        tokenizer = str(own.tokenizer_directory)
        data = DataConfig(corpus=request.data, tokenizer=tokenizer)
        corpus = prepare_together(data, cache=request.cache, console=console)
    run = build_run(config, own)
    settings = ProtocolSettings(
        split=request.split,
        max_windows=request.windows,
        sequence_length=request.sequence_length or run.settings.sequence_length,
        batch_size=request.batch_size or run.settings.batch_size,
        autocast=run.settings.autocast,
        repeats=request.repeats,
    )
    return evaluate_protocol(run, run_dir, settings, corpus=corpus, reference=request.reference)


def _evaluate_model(name: str, request: EvaluationRequest) -> Record:
    model = load_pretrained(name)
    subject = PlainModel(model)
    if request.data is None:
        raise ConfigError(f"{name} is a model, so say what to read with --data CORPUS")
    data = DataConfig(corpus=request.data, tokenizer=request.tokenizer or name)
    corpus = prepare_together(data, cache=request.cache, console=_console())
    is_cuda = torch.cuda.is_available()
    most = getattr(model.config, "max_position_embeddings", None) or _SEQUENCE_LENGTH
    settings = ProtocolSettings(
        split=request.split,
        max_windows=request.windows,
        sequence_length=request.sequence_length or min(_SEQUENCE_LENGTH, most),
        batch_size=request.batch_size or _BATCH_SIZE,
        autocast=torch.bfloat16 if is_cuda else None,
        repeats=request.repeats,
    )
    check_subject(subject, corpus, settings)
    reference = None
    if request.reference is not None:
        reference = read_reference(request.reference, split=request.split, domains=corpus.domains)
    if is_cuda:
        mover: Any = model
        mover.to(torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))))
    scores, compute = measure(subject, corpus, settings)
    return protocol_record(
        scores,
        compute,
        settings,
        subject={"kind": "model", "name": name, "step": None},
        corpus={"corpus": corpus.name, "fingerprint": corpus.fingerprint},
        layer_names=tuple(site.name for site in subject.sites),
        reference=reference,
    )


def _is_model(path: Path) -> bool:
    """Whether a ``config.json`` is one of transformers; a broken one is left to its own reader."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(content, dict) and "model_type" in content


def _console() -> Console:
    return Console(stderr=True, quiet=rank() != 0)
