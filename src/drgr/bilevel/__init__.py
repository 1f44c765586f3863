"""Hypergradients of bilevel problems: right, certified, and of any torch problem.

Reading order: ``structures`` (nested parameters as vectors), ``products`` (Hessian-vector products
in three ways), ``linear_system`` with its ``status``, the solvers ``conjugate_gradients``
(preconditioned by ``diagonals``), ``neumann`` and ``direct_solvers``, ``hypergradient`` (the entry
point), and ``proximal_alternating``, the method that uses it, with ``minibatch_alternating``.
"""

from drgr.bilevel.conjugate_gradients import CG
from drgr.bilevel.diagonals import adam_diagonal, hutchinson_diagonal
from drgr.bilevel.direct_solvers import Exact, Identity, RandomSubspace
from drgr.bilevel.hypergradient import Hypergradient, hypergradient
from drgr.bilevel.linear_system import LinearSolution, LinearSolver, LinearSystem
from drgr.bilevel.minibatch_alternating import MiniBatchSolution, minimize_on_batches
from drgr.bilevel.neumann import Neumann
from drgr.bilevel.products import HvpMode, SecondDerivatives, second_derivatives
from drgr.bilevel.proximal_alternating import BilevelSolution, ProximalAlternating, StopReason
from drgr.bilevel.status import SolveStatus

__all__ = [
    "CG",
    "BilevelSolution",
    "Exact",
    "HvpMode",
    "Hypergradient",
    "Identity",
    "LinearSolution",
    "LinearSolver",
    "LinearSystem",
    "MiniBatchSolution",
    "Neumann",
    "ProximalAlternating",
    "RandomSubspace",
    "SecondDerivatives",
    "SolveStatus",
    "StopReason",
    "adam_diagonal",
    "hutchinson_diagonal",
    "hypergradient",
    "minimize_on_batches",
    "second_derivatives",
]
