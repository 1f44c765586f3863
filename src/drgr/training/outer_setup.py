"""From settings to the outer loop."""

from typing import assert_never

import torch
from torch import nn

from drgr.bilevel import CG, LinearSolver, Neumann
from drgr.budgets.flops import FlopModel
from drgr.data import Corpus
from drgr.errors import ConfigError
from drgr.integrations.transformers import Attachment, find_sites
from drgr.routing import LinkGates
from drgr.training.adversary import DomainAdversary
from drgr.training.config import RobustnessConfig, RunConfig
from drgr.training.domain_passes import DomainPasses
from drgr.training.outer_config import (
    CGConfig,
    GatesConfig,
    NeumannConfig,
    NoSolverConfig,
    OuterConfig,
    SolverConfig,
)
from drgr.training.outer_loop import GateSteps, OuterLoop, OuterSettings
from drgr.training.step import StepSettings


def check_outer(config: RunConfig) -> None:
    """Checks what only shows when settings meet each other.

    Raises:
        ConfigError: If two settings want to weigh the domains, losses are measured too rarely for
            the outer steps, a solver has nothing to solve, or there are no gates to move.
    """
    outer = config.outer
    if "mixture" in outer.variables:
        _check_mixture(outer, config.robustness)
    looks_ahead = outer.update == "lookahead"
    if looks_ahead and outer.solver.kind != "none":
        raise ConfigError(
            f"outer.update lookahead takes no solver, got outer.solver {outer.solver.kind}; set "
            "outer.update to gradient"
        )
    if looks_ahead and set(outer.variables) - {"mixture"}:
        raise ConfigError(
            "outer.update lookahead moves the mixture alone, got outer.variables "
            f"{list(outer.variables)}; set outer.update to gradient"
        )
    if "link-gates" in outer.variables and not config.routing.link_gates:
        raise ConfigError(
            "outer.variables has link-gates, but routing.link_gates is false; set it to true"
        )
    if looks_ahead and outer.variables and outer.anchor_strength == 0:
        raise ConfigError(
            "outer.anchor_strength must be above 0 with outer.update lookahead, got 0; "
            "0.01 is nearly none"
        )


def _check_mixture(outer: OuterConfig, robustness: RobustnessConfig) -> None:
    if robustness.apply_to != "nothing":
        raise ConfigError(
            f"outer.variables has the mixture, but robustness.apply_to is {robustness.apply_to}: "
            "both decide how much each domain counts; set robustness.apply_to to nothing"
        )
    is_compared = outer.begin >= robustness.begin and outer.every % robustness.every == 0
    if robustness.losses == "validation" and not is_compared:
        raise ConfigError(
            "outer steps compare predicted falls with those of the adversary's losses: outer.begin "
            "must be at least robustness.begin and outer.every a multiple of robustness.every, got "
            f"{outer.begin} and {robustness.begin}, {outer.every} and {robustness.every}"
        )


def split_parameters(
    model: nn.Module, config: OuterConfig
) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """Returns the parameters of the inner level and routers of the outer one, in model order."""
    routers: set[nn.Parameter] = set()
    if "router" in config.variables:
        routers = {weight for site in find_sites(model) for weight in site.router.parameters()}
    parameters = list(model.parameters())
    return (
        [weight for weight in parameters if weight not in routers],
        [weight for weight in parameters if weight in routers],
    )


def build_outer(
    config: RunConfig,
    attachment: Attachment,
    corpus: Corpus,
    *,
    step: StepSettings,
    flops: FlopModel,
    adversary: DomainAdversary,
    optimizer: torch.optim.Optimizer,
) -> OuterLoop | None:
    """Returns the outer loop, None where it has no variable.

    Raises:
        ConfigError: If the mixture is to stay close to one that leaves a domain out.
    """
    settings = config.outer
    if not settings.variables:
        return None
    base = adversary.base_sampling
    if settings.anchor == "sampling" and not bool((base > 0).all()):
        raise ConfigError(
            "outer.anchor sampling needs every domain to have a share above 0 in data.sampling, "
            f"got {base.tolist()}; set outer.anchor to uniform"
        )
    anchors = {"adversary": None, "uniform": torch.full_like(base, 1 / len(base)), "sampling": base}
    inner, routers = split_parameters(attachment.model, settings)
    gates = attachment.link_gates if "link-gates" in settings.variables else None
    passes = DomainPasses(
        attachment,
        corpus,
        step,
        flops,
        windows=settings.windows,
        inner=inner,
        outer=[*routers, *([] if gates is None else [gates.values])],
    )
    return OuterLoop(
        OuterSettings(
            moves_mixture="mixture" in settings.variables,
            lookahead=settings.update == "lookahead",
            adam_metric=settings.metric == "adam",
            solver=build_solver(settings.solver),
            gauss_newton=settings.curvature == "gauss-newton",
            horizon=settings.horizon or float(settings.every),
            rate=settings.rate,
            anchor=anchors[settings.anchor],
            anchor_strength=settings.anchor_strength,
            smoothing=settings.smoothing,
            unit=adversary.unit,
        ),
        passes,
        inner_optimizer=optimizer,
        outer_optimizer=(torch.optim.Adam(routers, lr=settings.learning_rate) if routers else None),
        gate_steps=None if gates is None else _gate_steps(settings.gates, gates),
    )


def _gate_steps(config: GatesConfig, gates: LinkGates) -> GateSteps:
    return GateSteps(gates=gates, rate=config.rate, penalty=config.penalty, group=config.group)


def build_solver(config: SolverConfig) -> LinearSolver | None:
    """Returns the solver of the inner level's linear system."""
    match config:
        case NoSolverConfig():
            return None
        case CGConfig(max_steps=max_steps, rtol=rtol):
            return CG(max_steps=max_steps, rtol=rtol)
        case NeumannConfig(num_terms=num_terms, step_size=step_size):
            return Neumann(num_terms=num_terms, step_size=step_size)
        case _:
            assert_never(config)
