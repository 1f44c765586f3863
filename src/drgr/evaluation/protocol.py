"""The whole protocol on one model: measured in one pass, written as one record.

The record is described in ``docs/evaluation.md``; its parts are in ``protocol_record``.
"""

from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from drgr.ambiguity import KL, Divergence
from drgr.data import Corpus
from drgr.errors import ConfigError
from drgr.evaluation.compute import (
    FlopCounts,
    Latency,
    PeakMemory,
    count_flops,
    flop_model,
    peak_memory,
    probe_batch,
    reset_peak_memory,
    time_forward,
)
from drgr.evaluation.subject import Subject
from drgr.evaluation.token_pass import TOKEN_LIMIT, TokenScores, evaluate_tokens, window_counts


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class ProtocolSettings:
    """What the protocol measures.

    Attributes:
        split: ``"train"``, ``"validation"`` or ``"test"``.
        max_windows: Windows of each domain at most; all by default.
        sequence_length: Tokens predicted in a window.
        batch_size: Windows in a forward pass.
        autocast: Dtype of matrix products; ``None`` for that of the weights.
        token_limit: Token losses that are kept at most.
        divergence: The set of the curve of worst cases.
        radii: Its radii.
        domain_levels: Shares of the domains whose mean is taken, worst first.
        token_levels: Shares of the tokens whose mean is taken, worst first.
        num_mixtures: Random target mixtures.
        concentration: Of their Dirichlet distribution.
        mixture_seed: Seed of their draw.
        warmup: Forward passes before those that are timed.
        repeats: Forward passes that are timed.
    """

    split: str = "test"
    max_windows: int | None = None
    sequence_length: int
    batch_size: int
    autocast: torch.dtype | None = None
    token_limit: int = TOKEN_LIMIT
    divergence: Divergence = KL()  # noqa: RUF009 - frozen, without fields
    radii: tuple[float, ...] = (0.0, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0)
    domain_levels: tuple[float, ...] = (0.25, 0.5)
    token_levels: tuple[float, ...] = (0.01, 0.1)
    num_mixtures: int = 1000
    concentration: float = 1.0
    mixture_seed: int = 0
    warmup: int = 3
    repeats: int = 20


@final
@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ComputeScores:
    """What forward passes over the probe batch cost, see ``compute``.

    Attributes:
        flops: Counted two ways.
        latency: Time of repeats; of this process.
        memory: Peak over the whole protocol.
        device: Where the model is.
        bytes_per_value: Bytes of a value that experts receive.
        width: Values of a token's vector.
    """

    flops: FlopCounts
    latency: Latency
    memory: PeakMemory
    device: str
    bytes_per_value: int
    width: int


def check_subject(subject: Subject, corpus: Corpus, settings: ProtocolSettings) -> None:
    """Checks what only shows when model, corpus and settings meet, before anything is computed.

    Raises:
        ConfigError: If the corpus has more tokens than the model knows, or windows are longer than
            the model's positions.
        DataError: If the split is unknown or a domain is shorter than a window.
    """
    window_counts(
        corpus,
        split=settings.split,
        sequence_length=settings.sequence_length,
        max_windows=settings.max_windows,
    )
    config: Any = subject.model.config
    if corpus.vocabulary_size > config.vocab_size:
        raise ConfigError(
            f"the model knows {config.vocab_size} tokens, but corpus {corpus.name} has "
            f"{corpus.vocabulary_size}; give the model's own tokenizer (--tokenizer)"
        )
    most = getattr(config, "max_position_embeddings", None)
    if most is not None and settings.sequence_length > most:
        raise ConfigError(
            f"sequence_length must be at most the model's {most} positions, got "
            f"{settings.sequence_length}; shorten it (--sequence-length)"
        )


def measure(
    subject: Subject,
    corpus: Corpus,
    settings: ProtocolSettings,
    *,
    group: ProcessGroup | None = None,
) -> tuple[TokenScores, ComputeScores]:
    """Runs the protocol's forward passes; nothing of the model or its routing changes.

    Args:
        subject: The model.
        corpus: Prepared with the model's own tokenizer.
        settings: What is measured.
        group: Processes that share the pass over the split.

    Raises:
        ConfigError: See :func:`check_subject`.
        DataError: The same.
        NonFiniteLossError: If a loss is not finite, naming the domain.
    """
    check_subject(subject, corpus, settings)
    device = next(subject.model.parameters()).device
    reset_peak_memory(device)
    scores = evaluate_tokens(
        subject,
        corpus,
        split=settings.split,
        max_windows=settings.max_windows,
        sequence_length=settings.sequence_length,
        batch_size=settings.batch_size,
        token_limit=settings.token_limit,
        group=group,
        autocast=settings.autocast,
    )
    ids, domains = probe_batch(
        corpus,
        split=settings.split,
        batch_size=settings.batch_size,
        sequence_length=settings.sequence_length,
    )
    return scores, _measure_compute(subject, ids.to(device), domains.to(device), settings)


def _measure_compute(
    subject: Subject, ids: Tensor, domains: Tensor, settings: ProtocolSettings
) -> ComputeScores:
    model, device = subject.model, ids.device
    dtype = settings.autocast or next(model.parameters()).dtype
    was_training = model.training
    model.eval()
    try:
        with torch.autocast(device.type, settings.autocast, enabled=settings.autocast is not None):
            latency = time_forward(
                subject, ids, domains, warmup=settings.warmup, repeats=settings.repeats
            )
            memory = peak_memory(device)  # before attention is made to keep its scores
            flops = count_flops(subject, flop_model(subject), ids, domains)
    finally:
        model.train(was_training)
    return ComputeScores(
        flops=flops,
        latency=latency,
        memory=memory,
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        bytes_per_value=dtype.itemsize,
        width=subject.sites[0].width,
    )
