"""One pass over a split that measures everything the protocol needs, in bounded memory.

Sums are kept for all tokens. Token losses themselves are kept up to a limit, as float32 on the CPU;
beyond it as many positions of every window are kept as the limit allows, evenly spaced from a
random start, so that every token has the same chance. What is kept does not depend on the batch
size or on the number of processes.
"""

from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from drgr.collectives import rank, sum_over_processes, world_size
from drgr.data import Batch, Corpus, evaluation_windows
from drgr.errors import DataError, NonFiniteLossError
from drgr.evaluation.congestion import RoutingSamples
from drgr.evaluation.domains import DomainScores, entropy_sum, own_batches, token_losses
from drgr.evaluation.fairness import frequency_groups
from drgr.evaluation.subject import LayerUse, Subject
from drgr.routing import router_similarity

NUM_DECILES = 10
TOKEN_LIMIT = 1 << 22
"""Token losses that are kept at most, by default: 16 MiB."""

_POSITION_SEED = 0
_CHUNK = 1 << 24


@final
@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TokenScores:
    """What one pass measured, over all processes. ``G`` domains, ``L`` layers, ``E`` experts.

    Attributes:
        domains: Sums by domain.
        window_losses: For each domain the mean loss of each window in nats, shape ``(W_g,)``,
            float64.
        token_losses: For each domain the losses kept, in nats, shape ``(N_g,)``, float32.
        kept_per_window: Positions of a window whose losses are kept.
        sequence_length: Positions of a window; all are kept where this is ``kept_per_window``.
        decile_loss_sums: Summed losses in nats by domain and decile of the predicted token's
            frequency, rarest first, shape ``(G, 10)``, float64.
        decile_tokens: The tokens behind each sum, shape ``(G, 10)``, int64.
        expert_counts: Pairs (token, layer) by domain and number of experts that ran, from 0 to all
            candidates, shape ``(G, K + 1)``, int64.
        entropy: Mean normalised routing entropy of each layer and domain, shape ``(L, G)``,
            float64; NaN in a layer whose scores are not known.
        layers_over: Layers and forward passes that spent more than their budget; 0 without one.
        has_budget: Whether there is a budget; without one ``domains.limit`` is the spend.
    """

    domains: DomainScores
    window_losses: tuple[Tensor, ...]
    token_losses: tuple[Tensor, ...]
    kept_per_window: int
    sequence_length: int
    decile_loss_sums: Tensor
    decile_tokens: Tensor
    expert_counts: Tensor
    entropy: Tensor
    layers_over: int
    has_budget: bool


def evaluate_tokens(
    subject: Subject,
    corpus: Corpus,
    *,
    split: str,
    max_windows: int | None,
    sequence_length: int,
    batch_size: int,
    token_limit: int = TOKEN_LIMIT,
    group: ProcessGroup | None = None,
    autocast: torch.dtype | None = None,
) -> TokenScores:
    """Evaluates a model on fixed windows of every domain of a split, token by token.

    Nothing of the model or its routing changes.

    Args:
        subject: The model.
        corpus: Where the windows come from; its ``train`` split says which tokens are frequent.
        split: ``"train"``, ``"validation"`` or ``"test"``.
        max_windows: Windows of each domain at most, evenly spread; all by default.
        sequence_length: Tokens predicted in a window.
        batch_size: Windows in a forward pass.
        token_limit: Token losses to keep at most; never fewer than one a window.
        group: Processes that share the work; each evaluates a part, all return the whole.
        autocast: Dtype of matrix products, or ``None`` for that of the weights.

    Returns:
        Sums and losses over all processes, on the CPU.

    Raises:
        DataError: If the split is unknown or a domain is shorter than a window.
        NonFiniteLossError: If a loss is not finite, naming the domain.
    """
    windows = window_counts(
        corpus, split=split, sequence_length=sequence_length, max_windows=max_windows
    )
    model = subject.model
    device = next(model.parameters()).device
    totals = _Totals(
        subject,
        deciles=frequency_groups(token_counts(corpus), num_groups=NUM_DECILES).to(device),
        windows=windows,
        positions=_kept_positions(sum(windows), sequence_length, token_limit),
    )
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad(), torch.autocast(device.type, autocast, enabled=autocast is not None):
            for index, first, batch in own_batches(
                corpus, split, max_windows, shape=(batch_size, sequence_length), group=group
            ):
                totals.add(index, first, batch)
    finally:
        model.train(was_training)
    scores = totals.summed(corpus, split, sequence_length, group)
    _check_finite(scores, split)
    return scores


def window_counts(
    corpus: Corpus, *, split: str, sequence_length: int, max_windows: int | None
) -> list[int]:
    """Returns how many windows of each domain an evaluation takes.

    Raises:
        ValueError: If a size is below 1.
        DataError: If the split is unknown or a domain is shorter than a window.
    """
    counts = [
        evaluation_windows(corpus, split=split, domain=domain, sequence_length=sequence_length)
        for domain in corpus.domains
    ]
    return counts if max_windows is None else [min(count, max_windows) for count in counts]


def token_counts(corpus: Corpus, *, split: str = "train") -> Tensor:
    """Counts each token id in a split, all domains together.

    Returns:
        Shape ``(V,)``, int64.

    Raises:
        DataError: If the split is unknown or has no tokens at all.
    """
    total = torch.zeros(corpus.vocabulary_size, dtype=torch.int64)
    for domain in corpus.domains:
        tokens = corpus.tokens(split, domain)
        for start in range(0, len(tokens), _CHUNK):
            part = torch.from_numpy(tokens[start : start + _CHUNK].astype("int64"))
            total += torch.bincount(part, minlength=len(total))
    if not bool(total.any()):
        raise DataError(
            f"corpus {corpus.name!r} has no {split} tokens, so none is frequent or rare; add text"
        )
    return total


def _kept_positions(num_windows: int, sequence_length: int, limit: int) -> Tensor:
    """Chooses the positions of each window whose losses are kept, shape ``(W, k)``, int64."""
    kept = max(1, min(sequence_length, limit // num_windows))
    if kept == sequence_length:
        return torch.arange(sequence_length).expand(num_windows, -1)
    generator = torch.Generator().manual_seed(_POSITION_SEED)
    start = torch.rand(num_windows, 1, generator=generator, dtype=torch.float64)
    positions = (torch.arange(kept) + start) * sequence_length / kept
    return positions.long().clamp_max(sequence_length - 1)


def _check_finite(scores: TokenScores, split: str) -> None:
    for name, loss in zip(scores.domains.domains, scores.domains.loss_sums, strict=True):
        if not bool(loss.isfinite()):
            raise NonFiniteLossError(
                f"the {split} loss of domain {name} must be finite, got {float(loss)}; check the "
                "model's weights and its precision, or the text of that domain"
            )


@final
class _Totals:
    """Running sums of one pass."""

    def __init__(
        self, subject: Subject, *, deciles: Tensor, windows: list[int], positions: Tensor
    ) -> None:
        self._subject, self._deciles = subject, deciles
        self._windows, self._positions = windows, positions
        device, sites = deciles.device, subject.sites
        self._device, self._num_layers, num_domains = device, len(sites), len(windows)

        def zeros(*shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        exact = torch.float64
        self._loss_sums, self._num_tokens = zeros(num_domains, dtype=exact), zeros(num_domains)
        self._load = zeros(len(sites), num_domains, sites[0].num_experts)
        self._limit, self._over = zeros(), zeros()
        self._decile_sums = zeros(num_domains, NUM_DECILES, dtype=exact)
        self._decile_tokens = zeros(num_domains, NUM_DECILES)
        self._expert_counts = zeros(num_domains, sites[0].num_experts + 1)
        self._num_candidates = 0
        self._entropy_sums = zeros(len(sites), num_domains, dtype=exact)
        self._samples = RoutingSamples.zeros(
            num_layers=len(sites), num_experts=sites[0].num_experts, device=device
        )
        self._window_losses = torch.zeros(len(positions), dtype=exact)
        self._token_losses = torch.zeros(positions.shape, dtype=torch.float32)

    def add(self, domain: int, first: int, batch: Batch) -> None:
        """Adds one batch of a single domain, whose first window has the number ``first``."""
        labels = batch.labels.to(self._device)
        logits, uses = self._subject.forward(batch.input_ids.to(self._device), domain)
        losses = token_losses(logits, labels)
        exact = losses.double()
        self._loss_sums[domain] += exact.sum()
        self._num_tokens[domain] += losses.numel()
        deciles = self._deciles[labels.flatten()]
        self._decile_sums[domain].index_add_(0, deciles, exact.flatten())
        self._decile_tokens[domain] += torch.bincount(deciles, minlength=NUM_DECILES)
        rows = slice(first, first + len(labels))
        self._window_losses[rows] = exact.mean(dim=1).cpu()
        self._token_losses[rows] = losses.float().cpu().gather(1, self._positions[rows])
        for layer, use in enumerate(uses):
            self._add_layer(layer, domain, use)
            self._samples.add(
                layer,
                (first, len(labels)),
                expert_ids=use.expert_ids,
                keep=use.keep,
                scores=use.scores,
            )

    def _add_layer(self, layer: int, domain: int, use: LayerUse) -> None:
        load, counts = self._load[layer, domain], self._expert_counts[domain]
        kept = use.expert_ids[use.keep]
        load += torch.bincount(kept, minlength=len(load))
        counts += torch.bincount(use.keep.sum(dim=1), minlength=len(counts))
        self._num_candidates = max(self._num_candidates, use.keep.shape[1])
        if use.limit is not None:
            self._limit += use.limit
            self._over += len(kept) > use.limit
        if use.scores is None:
            self._entropy_sums[layer, domain] = torch.nan
        else:
            self._entropy_sums[layer, domain] += entropy_sum(use.scores)

    def summed(
        self, corpus: Corpus, split: str, sequence_length: int, group: ProcessGroup | None
    ) -> TokenScores:
        """Returns the sums over all processes, on the CPU."""

        def total(tensor: Tensor) -> Tensor:
            return sum_over_processes(tensor.to(self._device), group).cpu()

        ratios = [corpus.bytes_per_token(split, domain) for domain in corpus.domains]
        load, num_tokens = total(self._load), total(self._num_tokens)
        entropy_sums, sites = total(self._entropy_sums), self._subject.sites
        has_budget = self._subject.has_budget
        # A process may have had no batch at all.
        num_candidates = self._most(group)
        return TokenScores(
            domains=DomainScores(
                domains=tuple(corpus.domains),
                layer_names=tuple(site.name for site in sites),
                loss_sums=total(self._loss_sums),
                num_tokens=num_tokens,
                expert_load=load,
                entropy_sums=entropy_sums,
                router_similarity=torch.stack(
                    [router_similarity(site.router.get_parameter("weight")).cpu() for site in sites]
                ),
                bytes_per_token=torch.tensor(ratios, dtype=torch.float64),
                limit=int(total(self._limit)) if has_budget else int(load.sum()),
                samples=self._samples.summed(group),
            ),
            # Every window was filled by one process and is 0 elsewhere: sums are exact.
            window_losses=total(self._window_losses).split(self._windows),
            token_losses=tuple(
                part.flatten() for part in total(self._token_losses).split(self._windows)
            ),
            kept_per_window=self._positions.shape[1],
            sequence_length=sequence_length,
            decile_loss_sums=total(self._decile_sums),
            decile_tokens=total(self._decile_tokens),
            expert_counts=total(self._expert_counts)[:, : num_candidates + 1],
            entropy=entropy_sums / num_tokens,
            layers_over=int(total(self._over)),
            has_budget=has_budget,
        )

    def _most(self, group: ProcessGroup | None) -> int:
        counts = torch.zeros(world_size(group), dtype=torch.int64, device=self._device)
        counts[rank(group)] = self._num_candidates
        return int(sum_over_processes(counts, group).max())
