"""Batches that depend on seed, step and weights alone, never on what was drawn before."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from drgr._checks import check_not_negative
from drgr.data.corpus import Corpus, Tokens
from drgr.data.splits import SPLITS
from drgr.errors import DataError


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Batch:
    """Windows of text for next-token prediction.

    Attributes:
        input_ids: Token ids, shape ``(B, S)``, int64.
        labels: The tokens that follow, already shifted, shape ``(B, S)``, int64.
        domain: Index into ``corpus.domains`` of each row, shape ``(B,)``, int64.
    """

    input_ids: torch.Tensor
    labels: torch.Tensor
    domain: torch.Tensor


def draw_batch(
    corpus: Corpus,
    *,
    split: str = "train",
    step: int,
    seed: int,
    weights: NDArray[np.float64],
    batch_size: int,
    sequence_length: int,
    rows: range | None = None,
) -> Batch:
    """Draws the batch of one step, or some of its rows.

    Domains are drawn by systematic sampling: one uniform offset per step and equal spacing give
    each domain ``batch_size * weight`` rows, rounded down or up, and a random permutation makes
    every single row distributed by ``weights``. Each window starts at a uniformly random token of
    its domain. All of it comes from a counter-based generator, so any step can be drawn without its
    predecessors, and row ``i`` is the same in whichever ``rows`` it is asked for.

    Args:
        corpus: A prepared corpus with ``G`` domains.
        split: Which split to draw from.
        step: Step of the training, 0 or more.
        seed: Seed of the run, 0 or more.
        weights: Sampling weights, shape ``(G,)``; finite, not negative, not all 0; they need not
            sum to 1. A domain of weight 0 is never drawn.
        batch_size: Rows ``B`` of the whole batch, over all processes and accumulation steps.
        sequence_length: Tokens ``S`` per row.
        rows: Rows of the whole batch to return; all by default.

    Returns:
        ``len(rows)`` windows.

    Raises:
        ValueError: If the weights, the sizes or the rows cannot be used.
        DataError: If the split is unknown, or a drawn domain is shorter than one window.
    """
    check_not_negative("step", step)
    check_not_negative("seed", seed)
    _check_sizes(batch_size=batch_size, sequence_length=sequence_length)
    wanted = range(batch_size) if rows is None else rows
    if len(wanted) == 0 or min(wanted) < 0 or max(wanted) >= batch_size:
        raise ValueError(f"rows must be a non-empty part of range({batch_size}), got {rows}")
    shares = _normalised(weights, len(corpus.domains))
    generator = _generator(corpus, split, seed, step)
    domain = _draw_domains(generator, shares, batch_size)[list(wanted)]
    position = generator.random(batch_size)[list(wanted)]
    windows = np.empty((len(wanted), sequence_length + 1), np.int64)
    for index in np.unique(domain):
        tokens = _long_enough(corpus, split, corpus.domains[index], sequence_length)
        for row in np.flatnonzero(domain == index):
            start = int(position[row] * (len(tokens) - sequence_length))
            windows[row] = tokens[start : start + sequence_length + 1]
    return _batch(windows, domain)


def _generator(corpus: Corpus, split: str, seed: int, step: int) -> np.random.Generator:
    if split not in SPLITS:
        corpus.tokens(split, corpus.domains[0])  # raises the error that names the nearest split
    # The step and the split fill the counter's high words: streams of 2**128 numbers never overlap.
    counter = [0, 0, step, SPLITS.index(split)]
    return np.random.Generator(np.random.Philox(key=seed, counter=counter))


def _check_sizes(**sizes: int) -> None:
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"{name} must be at least 1, got {size}")


def _normalised(weights: NDArray[np.float64], domains: int) -> NDArray[np.float64]:
    weights = np.asarray(weights, np.float64)
    if weights.shape != (domains,):
        raise ValueError(f"weights must have shape ({domains},), one a domain, got {weights.shape}")
    if not np.isfinite(weights).all() or (weights < 0).any() or not weights.any():
        raise ValueError(
            f"weights must be finite, not negative and not all 0, got {weights.tolist()}"
        )
    scaled = weights / weights.max()  # no overflow and no underflow to a sum of 0
    shares: NDArray[np.float64] = scaled / scaled.sum()
    return shares


def _draw_domains(
    generator: np.random.Generator, shares: NDArray[np.float64], batch_size: int
) -> NDArray[np.int64]:
    ends = np.cumsum(shares)
    last = int(np.flatnonzero(shares)[-1])
    points = (np.arange(batch_size) + generator.random()) / batch_size
    # Rounding can leave the last end just below the last point.
    drawn = np.minimum(np.searchsorted(ends, points, side="right"), last)
    return generator.permutation(drawn)


def evaluation_batches(
    corpus: Corpus,
    *,
    split: str,
    domain: str,
    batch_size: int,
    sequence_length: int,
    max_windows: int | None = None,
) -> Iterator[Batch]:
    """Returns fixed windows of one domain, for measuring a held-out loss.

    Windows start at multiples of ``sequence_length``, so that every token is predicted at most
    once; the only tokens left out are the last, fewer than ``sequence_length``, of the stream. With
    ``max_windows`` they are spread evenly over the stream.

    Args:
        corpus: A prepared corpus.
        split: Usually ``"validation"`` or ``"test"``.
        domain: One of ``corpus.domains``.
        batch_size: Rows ``B`` of a batch; the last batch may have fewer.
        sequence_length: Tokens ``S`` per row.
        max_windows: Largest number of windows; ``None`` takes all.

    Returns:
        An iterator over :func:`evaluation_windows` rows in all.

    Raises:
        ValueError: If a size is below 1.
        DataError: If the split or domain is unknown or shorter than one window.
    """
    _check_sizes(batch_size=batch_size)
    count = evaluation_windows(corpus, split=split, domain=domain, sequence_length=sequence_length)
    taken = _evenly_spread(count, max_windows)
    tokens = _long_enough(corpus, split, domain, sequence_length)
    return _windows(tokens, taken, corpus.domains.index(domain), batch_size, sequence_length)


def evaluation_windows(corpus: Corpus, *, split: str, domain: str, sequence_length: int) -> int:
    """Returns how many non-overlapping windows one domain's split holds.

    Raises:
        ValueError: If ``sequence_length`` is below 1.
        DataError: If the split or domain is unknown or shorter than one window.
    """
    _check_sizes(sequence_length=sequence_length)
    tokens = _long_enough(corpus, split, domain, sequence_length)
    return (len(tokens) - 1) // sequence_length


def _evenly_spread(count: int, most: int | None) -> NDArray[np.int64]:
    if most is None:
        return np.arange(count)
    _check_sizes(max_windows=most)
    chosen = min(count, most)
    return np.arange(chosen) * count // chosen


def _windows(
    tokens: Tokens,
    taken: NDArray[np.int64],
    domain: int,
    batch_size: int,
    sequence_length: int,
) -> Iterator[Batch]:
    inside = np.arange(sequence_length + 1)
    for first in range(0, len(taken), batch_size):
        starts = taken[first : first + batch_size] * sequence_length
        windows = tokens[starts[:, None] + inside].astype(np.int64)
        yield _batch(windows, np.full(len(starts), domain))


def _batch(windows: NDArray[np.int64], domain: NDArray[np.int64]) -> Batch:
    pairs = torch.from_numpy(windows)
    return Batch(
        input_ids=pairs[:, :-1].contiguous(),
        labels=pairs[:, 1:].contiguous(),
        domain=torch.from_numpy(np.ascontiguousarray(domain)),
    )


def _long_enough(corpus: Corpus, split: str, domain: str, sequence_length: int) -> Tokens:
    tokens = corpus.tokens(split, domain)
    if len(tokens) <= sequence_length:
        raise DataError(
            f"domain {domain!r} has {len(tokens)} {split} tokens; sequence_length "
            f"{sequence_length} needs at least {sequence_length + 1}: shorten it or add text"
        )
    return tokens


def check_sequence_length(corpus: Corpus, sequence_length: int) -> None:
    """Checks that every split of every domain holds at least one window.

    Args:
        corpus: A prepared corpus.
        sequence_length: Tokens per row.

    Raises:
        ValueError: If ``sequence_length`` is below 1.
        DataError: Naming the first domain and split that is too short.
    """
    _check_sizes(sequence_length=sequence_length)
    for domain in corpus.domains:
        for split in SPLITS:
            _long_enough(corpus, split, domain, sequence_length)
