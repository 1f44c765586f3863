"""What follows the last step: the test evaluation, and the model for others to load."""

import math
from typing import Any

from drgr.collectives import rank
from drgr.errors import CheckpointError
from drgr.evaluation import evaluate_domains, evaluation_record
from drgr.training.loop_state import LoopState, by_name
from drgr.training.metrics import Record, congested
from drgr.training.run_directory import RunDirectory, write_json
from drgr.training.setup import RunObjects


def finish(run: RunObjects, state: LoopState, directory: RunDirectory) -> Record:
    """Evaluates on the test split and writes the result and the model."""
    record = _evaluate(run, state, split="test", max_windows=run.config.training.test_windows)
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
    state = LoopState(run, directory)
    if not state.load_latest():
        raise CheckpointError(
            f"{directory.path} has no whole checkpoint to evaluate; train it first (drgr train)"
        )
    return _evaluate(run, state, split=split, max_windows=max_windows)


def _evaluate(run: RunObjects, state: LoopState, *, split: str, max_windows: int | None) -> Record:
    scores = evaluate_domains(
        run.attachment,
        run.corpus,
        split=split,
        max_windows=max_windows,
        sequence_length=run.settings.sequence_length,
        batch_size=run.settings.batch_size,
        group=run.group,
        autocast=run.settings.autocast,
    )
    if not math.isfinite(float(scores.loss_sums.sum())):
        raise state.not_finite(split, scores.loss_sums, step=state.step)
    return evaluation_record(
        scores,
        split=split,
        step=state.step,
        budget=run.budget,
        training=_training_summary(run, state),
    )


def _save_model(run: RunObjects, directory: RunDirectory) -> None:
    """Writes the model for ``from_pretrained``, its tokenizer, and the routing state beside it."""
    directory.model.mkdir(parents=True, exist_ok=True)
    model: Any = run.attachment.model
    model.save_pretrained(directory.model)
    for file in run.corpus.tokenizer_directory.iterdir():
        (directory.model / file.name).write_bytes(file.read_bytes())
    run.attachment.save(directory.model)


def _training_summary(run: RunObjects, state: LoopState) -> Record:
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
                "congestion": congested(traffic, None),
                "domain_traffic": dict(zip(domains, traffic.tolist(), strict=True)),
            }
            for traffic in state.total.traffic / state.step
        ],
    }
