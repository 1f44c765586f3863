"""The adversary: which distribution near the nominal one makes the expected loss largest.

Reading order: ``divergence`` (the interface), ``kl`` and ``chi_square`` (one divergence a file),
``certificate`` (edge cases and the error bound), ``worst_case`` (the entry point, with gradients),
``inputs`` (checks and scaling), then what a training loop keeps: ``domain_losses``,
``reference_losses``, ``weights``.
"""

from drgr.ambiguity.chi_square import ChiSquare
from drgr.ambiguity.divergence import Divergence, Problem, SaddlePoint, exact_saddle_point
from drgr.ambiguity.domain_losses import DomainLosses, domain_sums
from drgr.ambiguity.kl import KL
from drgr.ambiguity.reference_losses import load_reference_losses
from drgr.ambiguity.weights import effective_number, is_near_one_hot
from drgr.ambiguity.worst_case import WorstCase, worst_case
from drgr.numerics import Status

__all__ = [
    "KL",
    "ChiSquare",
    "Divergence",
    "DomainLosses",
    "Problem",
    "SaddlePoint",
    "Status",
    "WorstCase",
    "domain_sums",
    "effective_number",
    "exact_saddle_point",
    "is_near_one_hot",
    "load_reference_losses",
    "worst_case",
]
