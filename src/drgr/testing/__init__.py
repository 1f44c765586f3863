"""Conformance checks for routing methods, those of this package and your own.

Each raises :class:`ConformanceError` with the promise that is broken. Call them from any test; in a
process of a group they also check that several processes equal one.
"""

from drgr.testing.batches import ConformanceError
from drgr.testing.controllers import check_controller
from drgr.testing.losses import check_loss
from drgr.testing.routers import check_router
from drgr.testing.scorers import check_scorer
from drgr.testing.selectors import check_selector

__all__ = [
    "ConformanceError",
    "check_controller",
    "check_loss",
    "check_router",
    "check_scorer",
    "check_selector",
]
