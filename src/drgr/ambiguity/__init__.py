"""The adversary: which distribution near the nominal one makes the expected loss largest.

Reading order: ``divergence`` (the interface); one divergence a file: ``kl``, ``burg``,
``hellinger``, ``neyman``, ``cressie_read`` (all by ``power_family`` along a ``power_path``),
``chi_square``, ``jensen_shannon``, ``total_variation``, ``cvar`` (both by ``quantiles``) and
``spectral``; ``certificate`` (edge cases and the error bound) and ``worst_case`` (the entry point,
with gradients; ``inputs``, ``scaling``, ``infinite`` and ``implicit`` serve it). Then what a
training loop keeps: ``robust_loss``, ``group_losses``, ``domain_losses``, ``multilevel``,
``reference_losses``, ``weights``. What a radius can be proved to buy is in ``bounds`` (see
``docs/theory.md``).
"""

from drgr.ambiguity.burg import Burg
from drgr.ambiguity.chi_square import ChiSquare
from drgr.ambiguity.cressie_read import AlphaDivergence, CressieRead
from drgr.ambiguity.cvar import CVaR, KLCVaR
from drgr.ambiguity.divergence import (
    Divergence,
    Problem,
    SaddlePoint,
    SmoothDivergence,
    divergence_of_top,
    exact_saddle_point,
    restricted_to_top,
)
from drgr.ambiguity.domain_losses import DomainLosses, domain_sums
from drgr.ambiguity.group_losses import GroupLosses
from drgr.ambiguity.hellinger import Hellinger
from drgr.ambiguity.jensen_shannon import JensenShannon
from drgr.ambiguity.kl import KL
from drgr.ambiguity.multilevel import Multilevel
from drgr.ambiguity.neyman import Neyman
from drgr.ambiguity.reference_losses import load_reference_losses
from drgr.ambiguity.robust_loss import RobustLoss
from drgr.ambiguity.spectral import Spectral
from drgr.ambiguity.total_variation import TotalVariation
from drgr.ambiguity.weights import effective_number, is_near_one_hot
from drgr.ambiguity.worst_case import WorstCase, worst_case
from drgr.numerics import Status

__all__ = [
    "KL",
    "AlphaDivergence",
    "Burg",
    "CVaR",
    "ChiSquare",
    "CressieRead",
    "Divergence",
    "DomainLosses",
    "GroupLosses",
    "Hellinger",
    "JensenShannon",
    "KLCVaR",
    "Multilevel",
    "Neyman",
    "Problem",
    "RobustLoss",
    "SaddlePoint",
    "SmoothDivergence",
    "Spectral",
    "Status",
    "TotalVariation",
    "WorstCase",
    "divergence_of_top",
    "domain_sums",
    "effective_number",
    "exact_saddle_point",
    "is_near_one_hot",
    "load_reference_losses",
    "restricted_to_top",
    "worst_case",
]
