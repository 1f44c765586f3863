"""Hypergradients of bilevel problems: right, certified, and of any torch problem.

Reading order: ``structures`` (nested parameters as vectors), ``products`` (Hessian-vector products
in three ways), ``linear_system`` with its ``status``, the solvers ``conjugate_gradients``
(preconditioned by ``diagonals``), ``neumann`` and ``direct_solvers``, then ``hypergradient`` (the
entry point).
"""

from drgr.bilevel.conjugate_gradients import CG
from drgr.bilevel.diagonals import adam_diagonal, hutchinson_diagonal
from drgr.bilevel.direct_solvers import Exact, Identity, RandomSubspace
from drgr.bilevel.hypergradient import Hypergradient, hypergradient
from drgr.bilevel.linear_system import LinearSolution, LinearSolver, LinearSystem
from drgr.bilevel.neumann import Neumann
from drgr.bilevel.products import HvpMode, SecondDerivatives, second_derivatives
from drgr.bilevel.status import SolveStatus

__all__ = [
    "CG",
    "Exact",
    "HvpMode",
    "Hypergradient",
    "Identity",
    "LinearSolution",
    "LinearSolver",
    "LinearSystem",
    "Neumann",
    "RandomSubspace",
    "SecondDerivatives",
    "SolveStatus",
    "adam_diagonal",
    "hutchinson_diagonal",
    "hypergradient",
    "second_derivatives",
]
