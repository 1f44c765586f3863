"""Diagnostics of routing: functions of loads, scores, plans and router rows, without gradient.

Reading order: ``violations`` and ``load_shape`` (how even), ``entropy`` and ``specialisation`` (how
decided, and for whom), ``router_similarity`` and ``score_activation`` (what routers know of their
experts), ``locality`` (what neighbours share), ``congestion_coefficient`` and ``three_phases``
(how strongly balance acts, over a run).
"""

from drgr.routing.diagnostics.congestion_coefficient import (
    CongestionEstimate,
    congestion_coefficient,
)
from drgr.routing.diagnostics.entropy import routing_entropy
from drgr.routing.diagnostics.load_shape import dead_experts, load_percentiles, overload_factor
from drgr.routing.diagnostics.locality import active_experts, chunk_level_sparsity, expert_reuse
from drgr.routing.diagnostics.router_similarity import router_similarity
from drgr.routing.diagnostics.score_activation import Correlation, score_activation_correlation
from drgr.routing.diagnostics.specialisation import source_loads, specialisation_histogram
from drgr.routing.diagnostics.three_phases import PhaseTrack, three_phase_track
from drgr.routing.diagnostics.violations import Violations, load_violations

__all__ = [
    "CongestionEstimate",
    "Correlation",
    "PhaseTrack",
    "Violations",
    "active_experts",
    "chunk_level_sparsity",
    "congestion_coefficient",
    "dead_experts",
    "expert_reuse",
    "load_percentiles",
    "load_violations",
    "overload_factor",
    "router_similarity",
    "routing_entropy",
    "score_activation_correlation",
    "source_loads",
    "specialisation_histogram",
    "three_phase_track",
]
