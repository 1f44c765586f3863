"""Comparisons of methods over seeds at equal FLOPs.

Reading order: ``experiment`` (the file), ``methods`` (its configurations), ``compute`` (what they
cost), ``planning`` (which runs), ``comparison`` (making them), ``store`` (keeping them),
``statistics`` and ``summary`` (what they say).
"""

from drgr.experiments.comparison import check_source, run_comparison
from drgr.experiments.experiment import Experiment, parse_experiment, read_experiment
from drgr.experiments.export import export
from drgr.experiments.methods import Variant, build_variants
from drgr.experiments.planning import Comparison
from drgr.experiments.store import Store, StoredRun
from drgr.experiments.summary import summarize

__all__ = [
    "Comparison",
    "Experiment",
    "Store",
    "StoredRun",
    "Variant",
    "build_variants",
    "check_source",
    "export",
    "parse_experiment",
    "read_experiment",
    "run_comparison",
    "summarize",
]
