"""The writers of docs/results.md, one module a section; ``python -m benchmarks.results``."""

from benchmarks.results.comparison import common_seeds
from benchmarks.results.headline import HEADLINE, claims

__all__ = ["HEADLINE", "claims", "common_seeds"]
