"""Numerical building blocks that know nothing of experts or domains.

Reading order: ``inputs`` (checks, precision, shapes), then the Euclidean projections ``simplex``,
``box_section`` and ``norm_balls``, the proximal maps of ``proximal`` (both use ``norms``),
``isotonic``, ``scalar_roots`` with its ``status``, ``order_statistics``.
"""

from drgr.numerics.box_section import project_box_section, project_capped_simplex
from drgr.numerics.isotonic import isotonic_blocks, isotonic_regression
from drgr.numerics.norm_balls import project_group_ball, project_l1_ball, project_l2_ball
from drgr.numerics.order_statistics import kth_largest
from drgr.numerics.proximal import block_soft_threshold, group_soft_threshold, soft_threshold
from drgr.numerics.scalar_roots import Root, increasing_root
from drgr.numerics.simplex import project_simplex, project_weighted_simplex
from drgr.numerics.status import Status

__all__ = [
    "Root",
    "Status",
    "block_soft_threshold",
    "group_soft_threshold",
    "increasing_root",
    "isotonic_blocks",
    "isotonic_regression",
    "kth_largest",
    "project_box_section",
    "project_capped_simplex",
    "project_group_ball",
    "project_l1_ball",
    "project_l2_ball",
    "project_simplex",
    "project_weighted_simplex",
    "soft_threshold",
]
