"""Hypergradients of bilevel problems: right, certified, and of any torch problem.

Reading order: ``structures`` (nested parameters as vectors), ``products`` (Hessian-vector products
in three ways), ``linear_system`` with its ``status``, the solvers ``conjugate_gradients``
(preconditioned by ``diagonals``), ``neumann`` and ``direct_solvers``, ``hypergradient`` (the entry
point), and ``proximal_alternating``, the method that uses it, with ``minibatch_alternating``.
``single_loop`` holds the stochastic methods. What can be proved, from the constants of a problem,
is in ``bounds`` and ``descent_bounds`` (see ``docs/theory.md``).
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
from drgr.bilevel.single_loop.block_wise import BlockWise
from drgr.bilevel.single_loop.estimator import Directions, Estimator, Start
from drgr.bilevel.single_loop.galerkin import GalerkinSOBA
from drgr.bilevel.single_loop.machine import SingleLoop, SingleLoopResult, SingleLoopRun
from drgr.bilevel.single_loop.moving_average import MASOBA
from drgr.bilevel.single_loop.nested import AmIGO, StocBiO
from drgr.bilevel.single_loop.oracle import Oracle, OracleCalls, Point
from drgr.bilevel.single_loop.penalty import F2SA
from drgr.bilevel.single_loop.plain import SOBA
from drgr.bilevel.single_loop.problem import FiniteSumProblem
from drgr.bilevel.single_loop.saga import SABA
from drgr.bilevel.single_loop.sarah import SRBA
from drgr.bilevel.single_loop.subspace import SubspaceSOBA
from drgr.bilevel.status import SolveStatus

__all__ = [
    "CG",
    "F2SA",
    "MASOBA",
    "SABA",
    "SOBA",
    "SRBA",
    "AmIGO",
    "BilevelSolution",
    "BlockWise",
    "Directions",
    "Estimator",
    "Exact",
    "FiniteSumProblem",
    "GalerkinSOBA",
    "HvpMode",
    "Hypergradient",
    "Identity",
    "LinearSolution",
    "LinearSolver",
    "LinearSystem",
    "MiniBatchSolution",
    "Neumann",
    "Oracle",
    "OracleCalls",
    "Point",
    "ProximalAlternating",
    "RandomSubspace",
    "SecondDerivatives",
    "SingleLoop",
    "SingleLoopResult",
    "SingleLoopRun",
    "SolveStatus",
    "Start",
    "StocBiO",
    "StopReason",
    "SubspaceSOBA",
    "adam_diagonal",
    "hutchinson_diagonal",
    "hypergradient",
    "minimize_on_batches",
    "second_derivatives",
]
