"""Routing as one priced assignment: experts with the largest score less price, inside a budget.

Three interfaces make a router: ``scores`` (what an expert suits a token), ``controllers`` (what an
expert costs) and ``selection`` (which of a token's experts run); one file for each method.

Reading order: ``plan`` (the records), ``policy`` (prices and selection of one layer), ``traffic``
(what flows backward), ``link_gates`` (which links are open), then the methods. ``losses`` and
``diagnostics`` have one file for each loss and measure, over ``tokens`` (means over real tokens and
processes).
"""

from drgr.routing.batch_price import BatchPrice
from drgr.routing.bip import BipBalancing
from drgr.routing.congestion_price import CongestionPrice
from drgr.routing.controllers import NoPrices, PriceController
from drgr.routing.diagnostics import (
    CongestionEstimate,
    Correlation,
    PhaseTrack,
    Violations,
    active_experts,
    chunk_level_sparsity,
    congestion_coefficient,
    dead_experts,
    expert_reuse,
    load_percentiles,
    load_violations,
    overload_factor,
    router_similarity,
    routing_entropy,
    score_activation_correlation,
    source_loads,
    specialisation_histogram,
    three_phase_track,
)
from drgr.routing.link_gates import (
    GateGroup,
    GateStep,
    LayerGates,
    LinkGates,
    proximal_gates,
)
from drgr.routing.load import expert_load, max_violation, mean_violation, min_violation
from drgr.routing.losses import (
    AdaptiveWeight,
    LossInputs,
    RoutingLoss,
    activation_locality_loss,
    activation_locality_term,
    chunk_sparsity_loss,
    chunk_sparsity_term,
    expert_router_coupling_loss,
    expert_specialisation_loss,
    global_balance_term,
    layer_coupling_loss,
    load_balancing_loss,
    micro_balance_term,
    micro_balancing_loss,
    noise_radius,
    pool_balancing_loss,
    pool_fractions,
    router_responses,
    router_z_loss,
    router_z_term,
    routing_information_loss,
    routing_information_term,
    routing_loss,
    selected_mass,
    sequence_balance_term,
    sequence_balancing_loss,
    specialisation_balance_loss,
    specialisation_balance_term,
    top1_balance_term,
    top1_balancing_loss,
    tsallis_entropy,
    tsallis_entropy_loss,
    tsallis_term,
)
from drgr.routing.place import LayerPlace
from drgr.routing.plan import LayerRouting, RoutingPlan
from drgr.routing.policy import ControllerFactory, RoutingPolicy
from drgr.routing.quantile import QuantileBalancing
from drgr.routing.rms_bias import RmsBias
from drgr.routing.selective_sinkhorn import SelectiveSinkhorn
from drgr.routing.sign_bias import SignBias
from drgr.routing.sinkhorn import SinkhornCost, SinkhornPrices
from drgr.routing.subgradient import DecayingSubgradient
from drgr.routing.traffic import (
    TrafficMeter,
    congestion,
    exchanged_bytes,
    gradient_traffic,
    tap_traffic,
    traffic_penalty,
    traffic_penalty_gradient,
)
from drgr.routing.transport import Transport, entropic_transport

__all__ = [
    "AdaptiveWeight",
    "BatchPrice",
    "BipBalancing",
    "CongestionEstimate",
    "CongestionPrice",
    "ControllerFactory",
    "Correlation",
    "DecayingSubgradient",
    "GateGroup",
    "GateStep",
    "LayerGates",
    "LayerPlace",
    "LayerRouting",
    "LinkGates",
    "LossInputs",
    "NoPrices",
    "PhaseTrack",
    "PriceController",
    "QuantileBalancing",
    "RmsBias",
    "RoutingLoss",
    "RoutingPlan",
    "RoutingPolicy",
    "SelectiveSinkhorn",
    "SignBias",
    "SinkhornCost",
    "SinkhornPrices",
    "TrafficMeter",
    "Transport",
    "Violations",
    "activation_locality_loss",
    "activation_locality_term",
    "active_experts",
    "chunk_level_sparsity",
    "chunk_sparsity_loss",
    "chunk_sparsity_term",
    "congestion",
    "congestion_coefficient",
    "dead_experts",
    "entropic_transport",
    "exchanged_bytes",
    "expert_load",
    "expert_reuse",
    "expert_router_coupling_loss",
    "expert_specialisation_loss",
    "global_balance_term",
    "gradient_traffic",
    "layer_coupling_loss",
    "load_balancing_loss",
    "load_percentiles",
    "load_violations",
    "max_violation",
    "mean_violation",
    "micro_balance_term",
    "micro_balancing_loss",
    "min_violation",
    "noise_radius",
    "overload_factor",
    "pool_balancing_loss",
    "pool_fractions",
    "proximal_gates",
    "router_responses",
    "router_similarity",
    "router_z_loss",
    "router_z_term",
    "routing_entropy",
    "routing_information_loss",
    "routing_information_term",
    "routing_loss",
    "score_activation_correlation",
    "selected_mass",
    "sequence_balance_term",
    "sequence_balancing_loss",
    "source_loads",
    "specialisation_balance_loss",
    "specialisation_balance_term",
    "specialisation_histogram",
    "tap_traffic",
    "three_phase_track",
    "top1_balance_term",
    "top1_balancing_loss",
    "traffic_penalty",
    "traffic_penalty_gradient",
    "tsallis_entropy",
    "tsallis_entropy_loss",
    "tsallis_term",
]
