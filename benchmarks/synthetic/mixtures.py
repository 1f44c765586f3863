"""Part one: stochastic training on domains whose optimal mixture is known."""

import time
from dataclasses import dataclass, replace
from typing import Any, final

import torch
from torch import Tensor

from benchmarks.synthetic.problems import (
    CORE,
    DOUBLE,
    Domains,
    Oracle,
    Quadratics,
    draw,
    minimax,
    planted_domains,
    population_risks,
)
from drgr.ambiguity import KL, domain_sums, worst_case
from drgr.bilevel import CG, hypergradient
from drgr.training.adversary import DomainAdversary

BATCH = 128
LEARNING_RATE = 0.03
REFRESH_EVERY = 10
SMOOTHING = 0.9
# Of the ascent from the last weights (one over its step size), and of the ball around uniform.
ASCENT_PENALTY = 3.0
BALL_PENALTY = 0.1
UNIFORM_SHARE = 0.01
# Of the bilevel mixture: steps between outer steps, least samples of each of its two batches in all
# and of a domain, step size and longest step in the logarithm of the mixture, and penalty of the
# outer worst case.
OUTER_EVERY = 20
OUTER_SAMPLES = 128
OUTER_DOMAIN_SAMPLES = 2
OUTER_RATE = 0.3
LONGEST_OUTER_STEP = 0.3
OUTER_PENALTY = 0.1

UNIFORM = "uniform sampling"
ORACLE = "oracle mixture as sampling"
GROUP_DRO = "group DRO, objective"
SAMPLING = "adversary as sampling"


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Method:
    """One way to weight domains.

    Attributes:
        fixed: Distribution that is sampled for the whole run: ``"natural"``, ``"uniform"``,
            ``"oracle"``; or None where weights move.
        apply_to: What an adversary's weights act on.
        ascends: Whether it starts from its own last weights instead of the uniform ones.
        begin: Share of the run before it acts.
        is_bilevel: Whether hypergradients move the sampling instead.
        excess: Whether losses are compared above each domain's own floor, or as they are.
    """

    fixed: str | None = None
    apply_to: str = "sampling"
    ascends: bool = True
    begin: float = 0.0
    is_bilevel: bool = False
    excess: bool = True


_MOVING = {
    GROUP_DRO: Method(apply_to="objective"),
    SAMPLING: Method(),
    "adversary as sampling, begun late": Method(begin=0.5),
    "KL ball around uniform, as sampling": Method(ascends=False),
    "bilevel mixture, CG": Method(is_bilevel=True),
    ORACLE: Method(fixed="oracle"),
}
_ON_RAW = (GROUP_DRO, SAMPLING, "KL ball around uniform, as sampling")
METHODS = {
    UNIFORM: Method(fixed="uniform"),
    "natural sampling": Method(fixed="natural"),
    **{f"{name} (excess)": method for name, method in _MOVING.items()},
    **{f"{name} (raw)": replace(_MOVING[name], excess=False) for name in (*_ON_RAW, ORACLE)},
}


@dataclass(slots=True)
class _Bilevel:
    """Moves the logarithm of a sampling mixture by hypergradients of the worst case."""

    domains: Domains
    references: Tensor
    logits: Tensor
    auxiliary: Tensor | None = None

    @property
    def samples(self) -> int:
        """Samples that one step takes."""
        return 2 * self.domain_samples * len(self.logits)

    @property
    def domain_samples(self) -> int:
        """Samples of a domain in each of the two batches."""
        return max(OUTER_DOMAIN_SAMPLES, OUTER_SAMPLES // len(self.logits))

    def step(self, predictor: Tensor, generator: torch.Generator) -> Tensor:
        """Takes one outer step and returns the sampling distribution."""
        num_domains = len(self.logits)
        each = torch.arange(num_domains).repeat_interleave(self.domain_samples)
        train, held_out = (draw(self.domains, each, generator) for _ in range(2))

        def losses(batch: tuple[Tensor, Tensor], point: Tensor) -> Tensor:
            features, targets = batch
            return (features @ point - targets).square().view(num_domains, -1).mean(dim=1)

        def inner(logits: Tensor, point: Tensor) -> Tensor:
            return logits.softmax(dim=0) @ losses(train, point)

        def outer(_logits: Tensor, point: Tensor) -> Tensor:
            excess = losses(held_out, point) - self.references
            return worst_case(excess, divergence=KL(), penalty=OUTER_PENALTY).value

        found = hypergradient(
            outer,
            inner,
            self.logits,
            predictor,
            solver=CG(rtol=1e-3),
            damping=0.01,
            start=self.auxiliary,
        )
        self.auxiliary = found.auxiliary
        # Exponentiated descent: the slope in a logit is the mixture's weight times that in it.
        mixture = self.logits.softmax(dim=0)
        move = OUTER_RATE * found.grads / mixture.clamp_min(1e-3)
        move = move * (LONGEST_OUTER_STEP / move.abs().max().clamp_min(LONGEST_OUTER_STEP))
        self.logits = self.logits - move
        return _with_uniform(self.logits.softmax(dim=0))


def _with_uniform(mixture: Tensor) -> Tensor:
    return (1 - UNIFORM_SHARE) * mixture + UNIFORM_SHARE / len(mixture)


def _adversary(method: Method, references: Tensor) -> DomainAdversary:
    uniform = torch.full_like(references, 1 / len(references))
    return DomainAdversary(
        divergence=KL(),
        penalty=ASCENT_PENALTY if method.ascends else BALL_PENALTY,
        radius=None,
        sampling=uniform,
        nominal=None if method.ascends else uniform,
        apply_to=method.apply_to,
        unit=torch.ones_like(references),
        smoothing=SMOOTHING,
        reference=references,
        uniform_share=UNIFORM_SHARE if method.apply_to == "sampling" else 0.0,
    )


@dataclass(slots=True)
class _Weighting:
    """What a method samples and how it weights samples, step by step."""

    method: Method
    domains: Domains
    references: Tensor
    sampling: Tensor
    objective: Tensor
    adversary: DomainAdversary | None = None
    bilevel: _Bilevel | None = None

    @classmethod
    def of(
        cls, method: Method, domains: Domains, references: Tensor, oracle: Tensor
    ) -> "_Weighting":
        uniform = torch.full_like(references, 1 / len(references))
        weighting = cls(method, domains, references, uniform, torch.ones_like(uniform))
        match method.fixed:
            case "natural":
                weighting.sampling = domains.natural
            case "oracle":
                weighting.sampling = oracle
            case None if method.is_bilevel:
                weighting.bilevel = _Bilevel(domains, references, uniform.log())
            case None:
                weighting.adversary = _adversary(method, references)
            case _:
                pass
        return weighting

    @property
    def shares(self) -> Tensor:
        """Share of each domain in the expected objective."""
        shares = self.sampling * self.objective
        return shares / shares.sum()

    def observe(self, step: int, begin: int, domain: Tensor, losses: Tensor) -> None:
        """Shows an adversary a batch's losses, as they were before the step."""
        if self.adversary is None:
            return
        self.adversary.observe(*domain_sums(losses.unsqueeze(1), domain, len(self.references)))
        if step >= begin and step % REFRESH_EVERY == 0:
            weights = self.adversary.refresh()
            self.sampling, self.objective = weights.sampling, weights.objective

    def move(self, step: int, predictor: Tensor, generator: torch.Generator) -> int:
        """Moves a bilevel mixture where it is due; returns the samples that this took."""
        if self.bilevel is None or step % OUTER_EVERY or step == 0:
            return 0
        self.sampling = self.bilevel.step(predictor, generator)
        return self.bilevel.samples


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Trained:
    """A trained predictor, the mean shares of the second half of its run, and what it took."""

    predictor: Tensor
    mixture: Tensor
    steps: int
    samples: int
    seconds: float


def train(
    method: Method,
    domains: Domains,
    references: Tensor,
    oracle: Tensor,
    *,
    samples: int,
    seed: int,
) -> Trained:
    """Descends from 0 with a rate that falls linearly to 0, until so many samples are drawn."""
    generator = torch.Generator().manual_seed(seed)
    weighting = _Weighting.of(method, domains, references, oracle)
    predictor = torch.zeros(CORE + 1, dtype=DOUBLE)
    mixtures, total = torch.zeros_like(references), 0.0
    spent, step = 0, 0
    started = time.process_time()
    while spent + BATCH <= samples:
        domain = weighting.sampling.multinomial(BATCH, replacement=True, generator=generator)
        features, targets = draw(domains, domain, generator)
        error = features @ predictor - targets
        scale = weighting.objective[domain] * error
        rate = LEARNING_RATE * (1 - spent / samples)
        predictor = predictor - rate * 2 / BATCH * (scale @ features)
        if 2 * spent >= samples:
            mixtures, total = mixtures + weighting.shares, total + 1
        spent += BATCH
        begin = int(method.begin * samples / BATCH)
        weighting.observe(step, begin, domain, error.square())
        spent += weighting.move(step, predictor, generator)
        step += 1
    return Trained(
        predictor=predictor,
        mixture=mixtures / total,
        steps=step,
        samples=spent,
        seconds=time.process_time() - started,
    )


def measure(num_domains: int, seed: int, *, samples: int) -> list[dict[str, Any]]:
    """Returns a row for each method, on the same domains at equal samples."""
    domains = planted_domains(num_domains, seed)
    quadratics = population_risks(domains)
    floors = quadratics.floors()
    references = {True: floors, False: torch.zeros_like(floors)}
    oracles = {excess: minimax(quadratics, level) for excess, level in references.items()}
    rows: list[dict[str, Any]] = []
    base = None
    for name, method in METHODS.items():
        reference, oracle = references[method.excess], oracles[method.excess]
        found = train(method, domains, reference, oracle.mixture, samples=samples, seed=1000 + seed)
        each = found.seconds / found.steps
        base = each if base is None else base
        judged = {
            "excess": _regrets(quadratics, floors, oracles[True], found),
            "raw": _regrets(quadratics, references[False], oracles[False], found),
        }
        rows.append(
            {
                "part": "mixture",
                "domains": num_domains,
                "seed": seed,
                "method": name,
                **{
                    f"{key}_{target}": value
                    for target, row in judged.items()
                    for key, value in row.items()
                },
                "mean_excess": float((quadratics.risks(found.predictor) - floors).mean()),
                "steps": found.steps,
                "samples": found.samples,
                "seconds_per_step": each,
                "ratio_to_uniform": each / base,
                "oracle_gap": max(one.gap for one in oracles.values()),
                "oracle_support": int((oracle.mixture > 1e-3).sum()),
            }
        )
    return rows


def _regrets(
    quadratics: Quadratics, references: Tensor, oracle: Oracle, found: Trained
) -> dict[str, float]:
    """Returns regrets of predictor and mixture to an oracle, exact in the population."""

    def regret(predictor: Tensor) -> float:
        return float((quadratics.risks(predictor) - references).max()) - oracle.value

    return {
        "regret": regret(found.predictor),
        "mixture_regret": regret(quadratics.best_of_mixture(found.mixture)),
        "mixture_distance": float((found.mixture - oracle.mixture).abs().sum() / 2),
        "oracle_value": oracle.value,
    }
