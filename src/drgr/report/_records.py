"""What a run directory says, as frozen records.

Numbers that a run could not measure (a domain absent from a window) are ``None``; non-finite
numbers never get this far. Losses are token means in nats; spend and budget count assignments
``(token, expert)``; lists over experts are in expert order.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from drgr.report._protocol_records import ProtocolRecord

Numbers = Mapping[str, float | None]
Counts = tuple[float | None, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Environment:
    """Where and how a run was started.

    Attributes:
        command: the command line as typed.
        started: ISO 8601 time.
        commit: version-control commit of the code.
        dirty: whether the code had uncommitted changes; ``None`` if not recorded.
        versions: name -> version of the software.
        hardware: name -> description of the machine.
        processes: number of processes.
    """

    command: str | None
    started: str | None
    commit: str | None
    dirty: bool | None
    versions: Mapping[str, str]
    hardware: Mapping[str, str]
    processes: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerWindow:
    """Expert balance of one MoE layer, summed over a window of training steps."""

    name: str
    load: Counts
    max_violation: float | None
    min_violation: float | None
    mean_violation: float | None
    dead_experts: float | None
    price: float | None
    congestion: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class LossWindow:
    """One routing loss without its coefficient, a mean over a window of training steps."""

    value: float | None
    coefficient: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainRecord:
    """Training between two log lines; see ``docs/run-directory.md`` for each field.

    ``tokens``, ``flops``, ``outer_flops``, ``seconds`` and ``domain_tokens`` are cumulative; the
    rest describes the window that ends at ``step``.
    """

    step: int
    tokens: float | None
    flops: float | None
    outer_flops: float | None
    seconds: float | None
    tokens_per_second: float | None
    loss: float | None
    objective: float | None
    effective_domains: float | None
    near_one_hot: bool
    budget: float | None
    spend: float | None
    exchanged_forward: float | None
    exchanged_backward: float | None
    routing_losses: Mapping[str, LossWindow]
    domain_loss: Numbers
    domain_tokens: Numbers
    sampling: Numbers
    adversary: Numbers
    experts_per_token: Numbers
    layers: tuple[LayerWindow, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class ValidationRecord:
    """One pass over the validation split."""

    step: int
    loss: Numbers
    bits_per_byte: Numbers
    experts_per_token: Numbers
    mean_bits_per_byte: float | None
    worst_domain: str | None
    worst_bits_per_byte: float | None
    budget: float | None
    spend: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class AlarmRecord:
    """A warning raised during the run."""

    step: int
    message: str


@dataclass(frozen=True, slots=True, kw_only=True)
class DomainEvaluation:
    """One domain on the held-out split."""

    train_tokens: float | None
    test_tokens: float | None
    loss: float | None
    bits_per_byte: float | None
    adversarial_weight: float | None
    experts_per_token: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Repulsion:
    """How strongly full experts repel tokens: the congestion coefficient and its track over a run.

    Attributes:
        estimate: the coefficient.
        lower: lower end of its interval of 95 %.
        upper: upper end.
        kinks: steps where the second and the third stretch of the track begin, with six evaluations
            or more.
        has_phases: whether it rises, then rises slower or falls, then falls; ``None`` if not known.
    """

    estimate: float | None = None
    lower: float | None = None
    upper: float | None = None
    kinks: tuple[float | None, float | None] = (None, None)
    has_phases: bool | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerEvaluation:
    """Expert balance of one MoE layer on the held-out split, in all and by domain.

    ``congestion`` and ``domain_traffic`` are of the gradients of training, a mean over steps.
    """

    name: str
    max_violation: float | None
    min_violation: float | None
    mean_violation: float | None
    dead_experts: float | None
    routing_entropy: float | None
    router_similarity: float | None
    repulsion: Repulsion
    load: Counts
    domain_load: Mapping[str, Counts]
    congestion: float | None
    domain_traffic: Mapping[str, Counts]


@dataclass(frozen=True, slots=True, kw_only=True)
class BudgetEvaluation:
    """The budget's rule and what was spent of it, in assignments."""

    unit: str | None
    minimum: float | None
    maximum: float | None
    average: float | None
    training_budget: float | None
    training_spend: float | None
    training_batches_over: float | None
    evaluation_budget: float | None
    evaluation_spend: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluationRecord:
    """The last evaluation of a finished run."""

    split: str | None
    step: float | None
    flops: float | None
    outer_flops: float | None
    tokens_per_second: float | None
    seconds: float | None
    domains: Mapping[str, DomainEvaluation]
    unseen: Numbers
    mean_bits_per_byte: float | None
    worst_domain: str | None
    worst_bits_per_byte: float | None
    effective_domains: float | None
    budget: BudgetEvaluation
    exchanged_forward: float | None
    exchanged_backward: float | None
    layers: tuple[LayerEvaluation, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class RunRecord:
    """All that a report needs of one run.

    Attributes:
        name: the directory's name.
        directory: where the run was read from.
        config: the resolved configuration, as JSON values.
        environment: command, versions and hardware.
        train: training records by increasing step.
        validation: validation records by increasing step.
        alarms: warnings by increasing step.
        evaluation: the held-out evaluation; ``None`` if the run was interrupted.
        protocol: the last ``drgr evaluate``; ``None`` if there was none.
        notes: what was missing or left out while reading, for the reader of the report.
    """

    name: str
    directory: Path
    config: Mapping[str, object]
    environment: Environment
    train: tuple[TrainRecord, ...]
    validation: tuple[ValidationRecord, ...]
    alarms: tuple[AlarmRecord, ...]
    evaluation: EvaluationRecord | None
    protocol: ProtocolRecord | None
    notes: tuple[str, ...]
