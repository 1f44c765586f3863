"""Losses of routing: each one file with its formula, each a function that returns its value.

Reading order: ``layer`` (what a loss sees, and the weighted sum), ``load_balancing`` (three
scopes), then one file for each loss; ``terms`` puts them all in one of two
forms.
"""

from drgr.routing.losses.activation_locality import activation_locality_loss
from drgr.routing.losses.adaptive_weight import AdaptiveWeight
from drgr.routing.losses.chunk_sparsity import chunk_sparsity_loss
from drgr.routing.losses.expert_router_coupling import (
    expert_router_coupling_loss,
    noise_radius,
    router_responses,
)
from drgr.routing.losses.layer import (
    CoupledWeights,
    JointLoss,
    LossInputs,
    RoutingLoss,
    routing_loss,
)
from drgr.routing.losses.layer_coupling import layer_coupling_loss, selected_mass
from drgr.routing.losses.load_balancing import (
    load_balancing_loss,
    micro_balancing_loss,
    sequence_balancing_loss,
)
from drgr.routing.losses.pool_balancing import pool_balancing_loss, pool_fractions
from drgr.routing.losses.specialisation import expert_specialisation_loss
from drgr.routing.losses.specialisation_balance import (
    routing_information_loss,
    specialisation_balance_loss,
)
from drgr.routing.losses.terms import (
    activation_locality_term,
    chunk_sparsity_term,
    expert_router_coupling_term,
    expert_specialisation_term,
    global_balance_term,
    layer_coupling_term,
    micro_balance_term,
    pool_balance_term,
    router_z_term,
    routing_information_term,
    sequence_balance_term,
    specialisation_balance_term,
    top1_balance_term,
    tsallis_term,
)
from drgr.routing.losses.top1_balancing import top1_balancing_loss
from drgr.routing.losses.tsallis import tsallis_entropy, tsallis_entropy_loss
from drgr.routing.losses.z_loss import router_z_loss

__all__ = [
    "AdaptiveWeight",
    "CoupledWeights",
    "JointLoss",
    "LossInputs",
    "RoutingLoss",
    "activation_locality_loss",
    "activation_locality_term",
    "chunk_sparsity_loss",
    "chunk_sparsity_term",
    "expert_router_coupling_loss",
    "expert_router_coupling_term",
    "expert_specialisation_loss",
    "expert_specialisation_term",
    "global_balance_term",
    "layer_coupling_loss",
    "layer_coupling_term",
    "load_balancing_loss",
    "micro_balance_term",
    "micro_balancing_loss",
    "noise_radius",
    "pool_balance_term",
    "pool_balancing_loss",
    "pool_fractions",
    "router_responses",
    "router_z_loss",
    "router_z_term",
    "routing_information_loss",
    "routing_information_term",
    "routing_loss",
    "selected_mass",
    "sequence_balance_term",
    "sequence_balancing_loss",
    "specialisation_balance_loss",
    "specialisation_balance_term",
    "top1_balance_term",
    "top1_balancing_loss",
    "tsallis_entropy",
    "tsallis_entropy_loss",
    "tsallis_term",
]
