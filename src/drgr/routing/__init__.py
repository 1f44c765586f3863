"""Routing as one priced assignment: experts with the largest score less price, inside a budget.

Reading order: ``plan`` (the records), ``policy`` (scores, prices, selection joined for one layer),
``controllers`` (the interface that moves prices), ``traffic`` (what flows backward), ``link_gates``
(which links are open), then one file
for each controller and loss.
"""

from drgr.routing.batch_price import BatchPrice
from drgr.routing.bip import BipBalancing
from drgr.routing.congestion_price import CongestionPrice
from drgr.routing.controllers import NoPrices, PriceController
from drgr.routing.link_gates import (
    GateGroup,
    GateStep,
    LayerGates,
    LinkGates,
    proximal_gates,
)
from drgr.routing.load import expert_load, max_violation, min_violation
from drgr.routing.load_balancing import load_balancing_loss
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
    "BatchPrice",
    "BipBalancing",
    "CongestionPrice",
    "ControllerFactory",
    "DecayingSubgradient",
    "GateGroup",
    "GateStep",
    "LayerGates",
    "LayerRouting",
    "LinkGates",
    "NoPrices",
    "PriceController",
    "QuantileBalancing",
    "RmsBias",
    "RoutingPlan",
    "RoutingPolicy",
    "SelectiveSinkhorn",
    "SignBias",
    "SinkhornCost",
    "SinkhornPrices",
    "TrafficMeter",
    "Transport",
    "congestion",
    "entropic_transport",
    "exchanged_bytes",
    "expert_load",
    "gradient_traffic",
    "load_balancing_loss",
    "max_violation",
    "min_violation",
    "proximal_gates",
    "tap_traffic",
    "traffic_penalty",
    "traffic_penalty_gradient",
]
