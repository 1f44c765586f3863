"""Every routing method of the package keeps what its interface promises."""

from functools import partial

import pytest
import torch

from drgr.budgets import TokenBudget
from drgr.routing import SelectiveSinkhorn
from drgr.routing.losses import terms
from drgr.routing.methods import LOSSES, PRICES, SCORES, SELECTIONS
from drgr.routing.scores import (
    CosineScores,
    GaussianScores,
    KMeansScores,
    NoisyScores,
    NormScores,
    ReluRmsScores,
    SigmoidScores,
    SoftmaxScores,
    StochasticGates,
    TsallisHybridScores,
)
from drgr.routing.selection import (
    BudgetedSelector,
    OpenExperts,
    ProgressiveSelector,
    QuantileSelector,
    SequenceSelector,
    ThresholdSelector,
    TopPSelector,
)
from drgr.testing import (
    check_controller,
    check_loss,
    check_router,
    check_scorer,
    check_selector,
)

BUDGET = TokenBudget(minimum=1, maximum=4, average=2.3)
FEWER = TokenBudget(minimum=1, maximum=2, average=1.5)

CONTROLLERS = {
    method.name: partial(SelectiveSinkhorn, probability=1.0)
    if method.name == "selective-sinkhorn"  # at random steps it has no prices
    else method.implementation
    for method in PRICES
}
SCORERS = {
    "softmax": lambda _: SoftmaxScores(),
    "sigmoid": lambda _: SigmoidScores(),
    "cosine": lambda _: CosineScores(),
    "k-means": lambda place: KMeansScores(place.num_experts, place.width),
    "norm": lambda place: NormScores(place.num_experts),
    "relu-rms": lambda place: ReluRmsScores(place.num_experts),
    "tsallis-hybrid": lambda _: TsallisHybridScores(),
    "noisy": lambda place: NoisyScores(place.num_experts, place.width),
    "gaussian": lambda _: GaussianScores(),
    "stochastic": lambda place: StochasticGates(
        place.num_experts, estimator="stochastic-times-smooth"
    ),
}
# A parameter or buffer has one value for each expert.
EXPERTS_DIFFER = {"k-means", "relu-rms", "noisy", "stochastic"}
SELECTORS = {
    "budget": lambda _: BudgetedSelector(BUDGET),
    "top-p": lambda _: TopPSelector(0.6, maximum=4),
    "threshold": lambda _: ThresholdSelector(0.1, maximum=4),
    "learned-threshold": lambda _: QuantileSelector(BUDGET),
    "sequence": lambda _: SequenceSelector(BUDGET),
    "progressive": lambda _: ProgressiveSelector(
        lambda step: BUDGET if step < 2 else FEWER, maximum=4
    ),
    "open": lambda _: OpenExperts(4),
}
# A learned threshold says what it aims at; a batch may have more.
AIMS_ONLY = {"learned-threshold"}
TERMS = {
    "load_balancing": terms.global_balance_term,
    "micro_balancing": terms.micro_balance_term,
    "sequence_balancing": terms.sequence_balance_term,
    "top1_balancing": partial(terms.top1_balance_term, temperature=0.5),
    "router_z": terms.router_z_term,
    "tsallis_entropy": partial(terms.tsallis_term, order=1.3),
    "specialisation_balance": partial(terms.specialisation_balance_term, entropy_coefficient=0.3),
    "routing_information": terms.routing_information_term,
    "activation_locality": partial(terms.activation_locality_term, sharpness=2.0),
    "chunk_sparsity": partial(terms.chunk_sparsity_term, chunk_length=4),
}
ORDERED = {"sequence_balancing", "activation_locality", "chunk_sparsity"}
# They see weights, activations or several layers; tests/routing/losses has their promises.
NOT_OF_ONE_LAYER = {
    "expert_router_coupling",
    "expert_specialisation",
    "layer_coupling",
    "pool_balancing",
}


def test_no_method_is_left_out():
    assert set(CONTROLLERS) == {method.name for method in PRICES}
    assert set(SCORERS) == {method.name for method in SCORES}
    assert set(SELECTORS) == {method.name for method in SELECTIONS}
    assert set(TERMS) | NOT_OF_ONE_LAYER == {method.name for method in LOSSES}


def build(name):
    return lambda num_experts, device: CONTROLLERS[name](num_experts, device=device)


@pytest.mark.parametrize("name", CONTROLLERS)
def test_controllers(name):
    check_controller(build(name), balances=name != "none")


def check_controllers_here():
    for name in CONTROLLERS:
        check_controller(build(name), balances=False)


def check_losses_here():
    for name, term in TERMS.items():
        check_loss(term, keeps_order=name in ORDERED, shares_processes=name != "micro_balancing")


@pytest.mark.parametrize("check", [check_controllers_here, check_losses_here])
def test_several_processes_equal_one(check, run_processes):
    run_processes(check, 2)


@pytest.mark.parametrize("name", SCORERS)
def test_scorers(name):
    check_scorer(SCORERS[name], treats_experts_alike=name not in EXPERTS_DIFFER)


@pytest.mark.parametrize("name", SELECTORS)
def test_selectors(name):
    check_selector(SELECTORS[name], is_bounded=name not in AIMS_ONLY)


@pytest.mark.parametrize("name", SCORERS)
def test_every_scorer_in_a_layer(name):
    check_router(
        SCORERS[name], SELECTORS["budget"], build("quantile"), trains_router=name != "k-means"
    )


@pytest.mark.parametrize("name", SELECTORS)
def test_every_selector_in_a_layer(name):
    # Open experts are those that a scorer opens.
    scorer = SCORERS["relu-rms" if name == "open" else "softmax"]
    check_router(scorer, SELECTORS[name], build("quantile"))


@pytest.mark.parametrize("name", CONTROLLERS)
def test_every_controller_in_a_layer(name):
    check_router(SCORERS["sigmoid"], SELECTORS["budget"], build(name))


@pytest.mark.parametrize("name", TERMS)
def test_losses(name):
    check_loss(TERMS[name], keeps_order=name in ORDERED)


def test_checks_leave_the_generator_of_the_caller_alone():
    before = torch.get_rng_state()
    check_loss(terms.router_z_term)
    check_controller(build("sign-bias"))
    check_scorer(SCORERS["noisy"], treats_experts_alike=False)
    check_selector(SELECTORS["budget"])
    check_router(SCORERS["noisy"], SELECTORS["budget"], build("none"))
    assert torch.equal(torch.get_rng_state(), before)
