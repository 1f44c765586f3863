"""Routing as one priced assignment: experts with the largest score less price, inside a budget.

Reading order: ``plan`` (the records), ``policy`` (scores, prices, selection joined for one layer),
``controllers`` (the interface that moves prices), ``traffic`` (what flows backward), ``link_gates``
(which links are open), then one file
for each controller and loss.
"""

from drgr.routing.batch_price import BatchPrice
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
from drgr.routing.sign_bias import SignBias
from drgr.routing.traffic import (
    TrafficMeter,
    congestion,
    exchanged_bytes,
    gradient_traffic,
    tap_traffic,
    traffic_penalty,
    traffic_penalty_gradient,
)

__all__ = [
    "BatchPrice",
    "ControllerFactory",
    "GateGroup",
    "GateStep",
    "LayerGates",
    "LayerRouting",
    "LinkGates",
    "NoPrices",
    "PriceController",
    "QuantileBalancing",
    "RoutingPlan",
    "RoutingPolicy",
    "SignBias",
    "TrafficMeter",
    "congestion",
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
