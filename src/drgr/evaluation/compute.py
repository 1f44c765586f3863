"""What a forward pass costs: FLOPs counted two ways, time, memory, bytes between devices."""

import math
import resource
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from drgr._checks import check_positive
from drgr.budgets.flops import FlopModel, forward_flops
from drgr.data import Batch, Corpus, evaluation_batches
from drgr.errors import ConfigError
from drgr.evaluation.subject import Subject
from drgr.models import measure_flops

FLOP_TOLERANCE = 0.02
"""Largest relative difference at which the two counts of FLOPs are said to agree."""


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class FlopCounts:
    """FLOPs of one forward pass, counted two ways.

    Attributes:
        tokens: Token positions of the pass.
        assignments: Pairs (token, expert) that ran, over all layers.
        formula: By the shapes of the weights, see :func:`drgr.models.measure_flops`; ``None`` where
            the model has a weight that they cannot count.
        counter: By ``torch.utils.flop_counter`` as products run, with eager attention and experts.
        reason: Why there is no formula; ``None`` where there is one.
    """

    tokens: int
    assignments: int
    formula: float | None
    counter: float
    reason: str | None = None

    @property
    def difference(self) -> float | None:
        """Relative difference of the formula from the counter."""
        return None if self.formula is None else self.formula / self.counter - 1

    @property
    def agrees(self) -> bool | None:
        """Whether the difference is within :data:`FLOP_TOLERANCE`."""
        difference = self.difference
        return None if difference is None else abs(difference) <= FLOP_TOLERANCE


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Latency:
    """Wall-clock time of forward passes over one batch, warm-up left out.

    Attributes:
        seconds: Time of each repeat.
        tokens: Token positions of the batch.
    """

    seconds: tuple[float, ...]
    tokens: int

    def percentile(self, percent: float) -> float:
        """Returns a percentile of the repeats, interpolated linearly, in seconds."""
        times = torch.tensor(self.seconds, dtype=torch.float64)
        return float(torch.quantile(times, percent / 100))

    @property
    def tokens_per_second(self) -> float:
        """Tokens of a batch over the median time."""
        return self.tokens / self.percentile(50)


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class PeakMemory:
    """The most memory that was in use.

    Attributes:
        num_bytes: How much.
        kind: ``"cuda allocator"`` (tensors on the GPU, since the last reset) or ``"maximum resident
            set size"`` (the whole process, since it started).
    """

    num_bytes: int
    kind: str


def probe_batch(
    corpus: Corpus, *, split: str, batch_size: int, sequence_length: int
) -> tuple[Tensor, Tensor]:
    """Returns a batch with about as many windows of each domain, for counting and timing.

    Returns:
        Token ids, shape ``(B, S)``, and domains, shape ``(B,)``; ``B`` is ``batch_size`` or, where
        the domains have fewer windows, less.

    Raises:
        DataError: If a domain is shorter than a window.
    """
    share = math.ceil(batch_size / len(corpus.domains))
    batches: list[Batch] = []
    for domain in corpus.domains:
        windows = evaluation_batches(
            corpus,
            split=split,
            domain=domain,
            batch_size=share,
            sequence_length=sequence_length,
            max_windows=share,
        )
        batches.append(next(iter(windows)))
    ids = torch.cat([batch.input_ids for batch in batches])
    domains = torch.cat([batch.domain for batch in batches])
    return ids[:batch_size], domains[:batch_size]


def flop_model(subject: Subject) -> FlopModel | str:
    """Returns the costs of a model by its formula, or why there is none."""
    try:
        return measure_flops(subject.model, {site.name: site.experts for site in subject.sites})
    except ConfigError as error:
        return str(error)


def count_flops(
    subject: Subject, costs: FlopModel | str, input_ids: Tensor, domains: Tensor
) -> FlopCounts:
    """Counts one forward pass by formula and by what torch sees run.

    Args:
        subject: The model, in evaluation mode; how it computes attention and experts is changed
            for the pass and restored.
        costs: See :func:`flop_model`.
        input_ids: Token ids, shape ``(B, S)``, on the model's device.
        domains: Domain of each sequence, shape ``(B,)``.
    """
    counter = FlopCounterMode(
        display=False, custom_mapping={torch.ops.aten._grouped_mm: _grouped_product_flops}
    )
    with torch.no_grad(), _eager(subject), counter:
        _, uses = subject.forward(input_ids, domains)
    assignments = int(sum(int(use.keep.sum()) for use in uses))
    formula = None
    if isinstance(costs, FlopModel):
        formula = forward_flops(
            costs,
            tokens=input_ids.numel(),
            sequence_length=input_ids.shape[1],
            assignments=assignments,
        )
    return FlopCounts(
        tokens=input_ids.numel(),
        assignments=assignments,
        formula=formula,
        counter=float(counter.get_total_flops()),
        reason=costs if isinstance(costs, str) else None,
    )


def time_forward(
    subject: Subject, input_ids: Tensor, domains: Tensor, *, warmup: int, repeats: int
) -> Latency:
    """Times forward passes over one batch, the device awaited at both ends of each.

    Args:
        subject: The model, in evaluation mode.
        input_ids: Token ids, shape ``(B, S)``, on the model's device.
        domains: Domain of each sequence, shape ``(B,)``.
        warmup: Passes before the first that counts.
        repeats: Passes that count, at least 1.

    Raises:
        ValueError: If there is no repeat.
    """
    check_positive("repeats", repeats)
    seconds = []
    with torch.no_grad():
        for number in range(warmup + repeats):
            _await(input_ids.device)
            started = time.perf_counter()
            subject.forward(input_ids, domains)
            _await(input_ids.device)
            if number >= warmup:
                seconds.append(time.perf_counter() - started)
    return Latency(seconds=tuple(seconds), tokens=input_ids.numel())


def reset_peak_memory(device: torch.device) -> None:
    """Starts counting anew where the allocator can; a process's resident size cannot be reset."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def peak_memory(device: torch.device) -> PeakMemory:
    """Returns the most memory that was in use, see :class:`PeakMemory`."""
    if device.type == "cuda":
        return PeakMemory(num_bytes=torch.cuda.max_memory_allocated(device), kind="cuda allocator")
    unit = 1 if sys.platform == "darwin" else 1024
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return PeakMemory(num_bytes=most * unit, kind="maximum resident set size")


@contextmanager
def _eager(subject: Subject) -> Iterator[None]:
    """Lets a model compute by products that the counter has a formula for, then restores it."""
    model: Any = subject.model
    configs: list[Any] = _distinct([site.experts.config for site in subject.sites])
    attentions: list[Any] = _distinct(
        [part.config for part in model.modules() if hasattr(part, "config")]
    )
    before = [config._experts_implementation for config in configs]
    attention = [config._attn_implementation for config in attentions]
    try:
        for config in attentions:
            config._attn_implementation = "eager"
        if not subject.experts_are_eager:
            for config in configs:
                config._experts_implementation = "eager"
        yield
    finally:
        for config, implementation in zip(configs, before, strict=True):
            config._experts_implementation = implementation
        for config, implementation in zip(attentions, attention, strict=True):
            config._attn_implementation = implementation


def _distinct(objects: Sequence[object]) -> list[object]:
    return list({id(entry): entry for entry in objects}.values())


def _grouped_product_flops(
    rows: Sequence[int], weights: Sequence[int], *_: object, **__: object
) -> int:
    """Counts ``(S, in)`` rows times the ``(in, out)`` weight of each row's group."""
    return 2 * math.prod(rows) * weights[-1]


def _await(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
