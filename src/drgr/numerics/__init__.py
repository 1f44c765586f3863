"""Numerical building blocks that know nothing of experts or domains."""

from drgr.numerics.order_statistics import kth_largest
from drgr.numerics.scalar_roots import Root, increasing_root
from drgr.numerics.status import Status

__all__ = ["Root", "Status", "increasing_root", "kth_largest"]
