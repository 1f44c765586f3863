"""What ``protocol.json`` says, as frozen records; see ``docs/evaluation.md`` for each field."""

from collections.abc import Mapping
from dataclasses import dataclass

Series = tuple[float | None, ...]

Points = tuple[tuple[float | None, float | None], ...]
"""Pairs (share or level, value)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ProtocolDomain:
    """One domain; ``tails`` are means of the worst shares of its token losses, in nats."""

    windows: float | None
    loss: float | None
    loss_error: float | None
    bits_per_byte: float | None
    bits_per_byte_error: float | None
    held_out: bool | None
    tails: Points
    deciles: Series
    experts_per_token: float | None
    dropped_share: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class ProtocolRobustness:
    """What shifts between domains do to the bits per byte."""

    mean: float | None
    worst_domain: str | None
    worst: float | None
    cvar: Points
    divergence: str | None
    radii: Series
    values: Series
    converged: bool | None
    mixtures: Points
    num_mixtures: float | None
    reference: str | None
    excess: Mapping[str, float | None]


@dataclass(frozen=True, slots=True, kw_only=True)
class ProtocolFairness:
    """Inequality; deciles of the frequency of the predicted token, rarest first, in nats."""

    gini: float | None
    max_minus_min: float | None
    tails: Points
    deciles: Series
    kept: float | None
    of: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class ProtocolCompute:
    """What forward passes cost."""

    device: str | None
    flops_per_token: float | None
    flops_difference: float | None
    flops_agree: bool | None
    p50_seconds: float | None
    p95_seconds: float | None
    repeats: float | None
    tokens_per_second: float | None
    peak_bytes: float | None
    peak_kind: str | None
    assignments: float | None
    budget: float | None
    layers_over: float | None
    exchanged_per_token: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class ProtocolLayer:
    """Expert balance of one layer on the evaluated split."""

    name: str
    routing_entropy: float | None
    dead_experts: float | None
    overload: float | None
    congestion: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class ProtocolRecord:
    """The last ``drgr evaluate`` of a run; ``max_windows`` is ``None`` where all were read."""

    corpus: str | None
    split: str | None
    step: float | None
    max_windows: float | None
    domains: Mapping[str, ProtocolDomain]
    robustness: ProtocolRobustness
    fairness: ProtocolFairness
    compute: ProtocolCompute
    layers: tuple[ProtocolLayer, ...]
