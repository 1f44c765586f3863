"""What follows the last step: the test evaluation, and the model for others to load."""

import math
from pathlib import Path
from typing import Any

from drgr.collectives import rank
from drgr.data import Corpus
from drgr.errors import CheckpointError
from drgr.evaluation import (
    AttachedModel,
    DomainScores,
    ProtocolSettings,
    check_subject,
    evaluate_domains,
    evaluation_record,
    measure,
    protocol_record,
    read_reference,
    track_record,
)
from drgr.training.loop_state import LoopState, by_name
from drgr.training.metrics import Record, congested, read_validations
from drgr.training.run_directory import RunDirectory, write_json
from drgr.training.setup import RunObjects


def finish(run: RunObjects, state: LoopState, directory: RunDirectory) -> Record:
    """Evaluates on the test split and writes the result and the model."""
    test_windows = run.config.training.test_windows
    record = _evaluate(run, state, directory, split="test", max_windows=test_windows)
    if rank() == 0:
        write_json(directory.evaluation, record)
        _save_model(run, directory)
    return record


def evaluate_run(
    run: RunObjects, directory: RunDirectory, *, split: str, max_windows: int | None
) -> Record:
    """Evaluates the last whole checkpoint of a run.

    Args:
        run: The objects of the run, freshly built; its state is replaced by the checkpoint's.
        directory: The run's directory.
        split: ``"train"``, ``"validation"`` or ``"test"``.
        max_windows: Windows of each domain at most; all by default.

    Returns:
        A record as in ``evaluation.json``.

    Raises:
        CheckpointError: If there is no checkpoint, or it cannot be used.
        NonFiniteLossError: If the model's loss on a domain is not finite.
    """
    state = _loaded(run, directory)
    return _evaluate(run, state, directory, split=split, max_windows=max_windows)


def evaluate_protocol(
    run: RunObjects,
    directory: RunDirectory,
    settings: ProtocolSettings,
    *,
    corpus: Corpus | None = None,
    reference: Path | None = None,
) -> tuple[Record | None, Record]:
    """Measures the last whole checkpoint of a run by the whole protocol.

    Args:
        run: The objects of the run, freshly built; its state is replaced by the checkpoint's.
        directory: The run's directory.
        settings: What is measured.
        corpus: Another corpus with the run's tokenizer; its own by default.
        reference: An evaluation to compare with, see :func:`drgr.evaluation.read_reference`.

    Returns:
        A record as in ``evaluation.json``, ``None`` on another corpus, and one as in
        ``docs/evaluation.md``.

    Raises:
        CheckpointError: If there is no checkpoint, or it cannot be used.
        ConfigError: If the settings or the reference do not fit.
        DataError: If the split is unknown or a domain is shorter than a window.
        NonFiniteLossError: If the model's loss on a domain is not finite.
    """
    is_own = corpus is None
    read = run.corpus if corpus is None else corpus
    subject = AttachedModel(run.attachment, knows_sources=is_own)
    check_subject(subject, read, settings)
    other = None
    if reference is not None:
        other = read_reference(reference, split=settings.split, domains=read.domains)
    state = _loaded(run, directory)
    scores, compute = measure(subject, read, settings, group=run.group)
    trained = _training_summary(run, state, directory) if is_own else None
    protocol = protocol_record(
        scores,
        compute,
        settings,
        subject={"kind": "run", "name": str(directory.path), "step": state.step},
        corpus={"corpus": read.name, "fingerprint": read.fingerprint},
        layer_names=run.attachment.layer_names,
        reference=other,
        training=trained,
    )
    if not is_own:
        return None, protocol
    unseen = _unseen(
        run,
        state,
        split=settings.split,
        max_windows=settings.max_windows,
        shape=(settings.batch_size, settings.sequence_length),
    )
    return _record(run, state, directory, (scores.domains, unseen), split=settings.split), protocol


def _loaded(run: RunObjects, directory: RunDirectory) -> LoopState:
    state = LoopState(run, directory)
    if not state.load_latest():
        raise CheckpointError(
            f"{directory.path} has no whole checkpoint to evaluate; train it first (drgr train)"
        )
    return state


def _evaluate(
    run: RunObjects,
    state: LoopState,
    directory: RunDirectory,
    *,
    split: str,
    max_windows: int | None,
) -> Record:
    shape = (run.settings.batch_size, run.settings.sequence_length)
    scores = _scores(run, state, run.corpus, split=split, max_windows=max_windows, shape=shape)
    unseen = _unseen(run, state, split=split, max_windows=max_windows, shape=shape)
    return _record(run, state, directory, (scores, unseen), split=split)


def _unseen(
    run: RunObjects,
    state: LoopState,
    *,
    split: str,
    max_windows: int | None,
    shape: tuple[int, int],
) -> DomainScores | None:
    """Evaluates the domains that training had no part of; None where there are none."""
    if run.unseen is None:
        return None
    return _scores(run, state, run.unseen, split=split, max_windows=max_windows, shape=shape)


def _scores(
    run: RunObjects,
    state: LoopState,
    corpus: Corpus,
    *,
    split: str,
    max_windows: int | None,
    shape: tuple[int, int],
) -> DomainScores:
    """Evaluates domains in batches of a shape: windows, and tokens of each."""
    batch_size, sequence_length = shape
    scores = evaluate_domains(
        run.attachment,
        corpus,
        split=split,
        max_windows=max_windows,
        sequence_length=sequence_length,
        batch_size=batch_size,
        group=run.group,
        autocast=run.settings.autocast,
        knows_sources=corpus is run.corpus,
    )
    if not math.isfinite(float(scores.loss_sums.sum())):
        raise state.not_finite(split, scores.loss_sums, step=state.step, domains=corpus.domains)
    return scores


def _record(
    run: RunObjects,
    state: LoopState,
    directory: RunDirectory,
    found: tuple[DomainScores, DomainScores | None],
    *,
    split: str,
) -> Record:
    """Returns the record of what was found on the domains of training and on unseen ones."""
    scores, unseen = found
    return evaluation_record(
        scores,
        split=split,
        step=state.step,
        bounds=run.bounds,
        training=_training_summary(run, state, directory),
        unseen=unseen,
    )


def _save_model(run: RunObjects, directory: RunDirectory) -> None:
    """Writes the model for ``from_pretrained``, its tokenizer, and the routing state beside it."""
    directory.model.mkdir(parents=True, exist_ok=True)
    model: Any = run.attachment.model
    model.save_pretrained(directory.model)
    for file in run.corpus.tokenizer_directory.iterdir():
        (directory.model / file.name).write_bytes(file.read_bytes())
    run.attachment.save(directory.model)


def _tracks(run: RunObjects, state: LoopState, directory: RunDirectory) -> list[Record | None]:
    """Returns the track of each layer's congestion coefficient over the validations so far."""
    validations = read_validations(directory.metrics, last_step=state.step)
    steps = [record["step"] for record in validations]

    def estimates(layer: int) -> list[float | None]:
        # A run that an earlier version began has records without it.
        found = (record["layers"][layer].get("congestion_coefficient") for record in validations)
        return [None if one is None else one["estimate"] for one in found]

    return [
        track_record(steps, estimates(layer)) for layer in range(len(run.attachment.layer_names))
    ]


def _training_summary(run: RunObjects, state: LoopState, directory: RunDirectory) -> Record:
    domains = run.corpus.domains
    weights = run.adversary.weights
    return {
        "train_tokens": by_name(domains, state.total.num_tokens),
        "adversarial_weight": {
            name: float(weight) for name, weight in zip(domains, weights.adversary, strict=True)
        },
        "effective_domains": weights.effective_domains,
        "average_share": {
            name: float(share) / max(state.step, 1)
            for name, share in zip(domains, state.share_sums, strict=True)
        },
        "flops": state.flops,
        "outer_flops": state.outer_flops,
        "seconds": state.seconds,
        "tokens_per_second": float(state.total.num_tokens.sum()) / max(state.seconds, 1e-9),
        "budget": {
            "budget": int(state.total.limit.sum()),
            "spend": int(state.total.spend.sum()),
            "batches_over": int(state.total.over),
        },
        "exchanged_bytes": run.exchanged_bytes(float(state.total.spend.sum() / state.step)),
        "layers": [
            {
                "training_budget": int(limit),
                "training_spend": int(spend),
                "congestion": congested(traffic, None),
                "congestion_track": track,
                "domain_traffic": dict(zip(domains, traffic.tolist(), strict=True)),
            }
            for limit, spend, traffic, track in zip(
                state.total.limit,
                state.total.spend,
                state.total.traffic / state.step,
                _tracks(run, state, directory),
                strict=True,
            )
        ],
    }
