"""How good a model is on each domain, and what each domain receives.

Reading order: ``domains`` (measure), ``congestion`` (how full experts repel), ``records`` (write
down). The whole protocol: ``subject``
(what is evaluated), ``token_pass`` (one pass over a split), ``robustness``, ``fairness`` and
``compute`` (what is made of it), ``reference`` (another evaluation), ``protocol`` (all of it
together), ``protocol_record`` (write down).
"""

from drgr.evaluation.compute import FlopCounts, Latency, PeakMemory
from drgr.evaluation.congestion import RoutingSamples, track_record
from drgr.evaluation.domains import DomainScores, evaluate_domains, token_losses
from drgr.evaluation.fairness import frequency_groups, gini
from drgr.evaluation.protocol import ComputeScores, ProtocolSettings, check_subject, measure
from drgr.evaluation.protocol_record import SCHEMA, protocol_record
from drgr.evaluation.records import (
    ExpertBounds,
    average_mixture,
    evaluation_record,
    layer_record,
    named,
    validation_record,
)
from drgr.evaluation.reference import Reference, read_reference
from drgr.evaluation.robustness import (
    leave_one_out,
    mixture_losses,
    robust_curve,
    standard_error,
    tail_mean,
)
from drgr.evaluation.subject import AttachedModel, LayerUse, PlainModel, Subject
from drgr.evaluation.token_pass import TokenScores, evaluate_tokens

__all__ = [
    "SCHEMA",
    "AttachedModel",
    "ComputeScores",
    "DomainScores",
    "ExpertBounds",
    "FlopCounts",
    "Latency",
    "LayerUse",
    "PeakMemory",
    "PlainModel",
    "ProtocolSettings",
    "Reference",
    "RoutingSamples",
    "Subject",
    "TokenScores",
    "average_mixture",
    "check_subject",
    "evaluate_domains",
    "evaluate_tokens",
    "evaluation_record",
    "frequency_groups",
    "gini",
    "layer_record",
    "leave_one_out",
    "measure",
    "mixture_losses",
    "named",
    "protocol_record",
    "read_reference",
    "robust_curve",
    "standard_error",
    "tail_mean",
    "token_losses",
    "track_record",
    "validation_record",
]
