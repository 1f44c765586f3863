"""How good a model is on each domain, and what each domain receives.

Reading order: ``domains`` (measure), ``records`` (write down).
"""

from drgr.evaluation.domains import DomainScores, evaluate_domains, token_losses
from drgr.evaluation.records import (
    ExpertBounds,
    average_mixture,
    evaluation_record,
    layer_record,
    named,
    validation_record,
)

__all__ = [
    "DomainScores",
    "ExpertBounds",
    "average_mixture",
    "evaluate_domains",
    "evaluation_record",
    "layer_record",
    "named",
    "token_losses",
    "validation_record",
]
