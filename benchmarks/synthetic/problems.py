"""Problems with known truth: domains with planted risks, clusters with planted experts.

The oracle of the mixtures uses dense linear algebra alone and shares no code with what it judges.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from drgr.models import GatedExperts
from drgr.routing import RoutingPlan

DOUBLE = torch.float64
CORE = 8
# Spread of the domains' maps, share of the target that the core features cannot see, noise of the
# spurious feature, and the range of the noise that nothing predicts.
SPREAD = 0.3
HIDDEN = 1.0
SPURIOUS_NOISE = 0.5
LEAST_NOISE, MOST_NOISE = 0.3, 1.5


class Domains(NamedTuple):
    """Regression domains: ``y = signal + noise``, with ``signal = <w_d, c> + hidden``.

    The features are the core ``c`` and the spurious ``s = a_d signal + noise``. ``G``
    domains, ``p`` core features; everything float64.
    """

    maps: Tensor
    """``w_d``, shape ``(G, p)``."""
    signs: Tensor
    """``a_d``: 1 in the majority of domains, -1 in rare ones, shape ``(G,)``."""
    noise: Tensor
    """Standard deviation of what nothing predicts, shape ``(G,)``."""
    natural: Tensor
    """Natural shares, shape ``(G,)``."""


class Quadratics(NamedTuple):
    """Population risks ``theta' A_d theta - 2 b_d' theta + v_d`` of the domains."""

    matrices: Tensor
    """``A_d``, shape ``(G, n, n)``."""
    slopes: Tensor
    """``b_d``, shape ``(G, n)``."""
    constants: Tensor
    """``v_d``, shape ``(G,)``."""

    def risks(self, predictor: Tensor) -> Tensor:
        """Returns the mean square error of a linear predictor in every domain, shape ``(G,)``."""
        curved = torch.einsum("i,gij,j->g", predictor, self.matrices, predictor)
        risks: Tensor = curved - 2 * self.slopes @ predictor + self.constants
        return risks

    def best_of_mixture(self, mixture: Tensor) -> Tensor:
        """Returns the minimiser of the mean risk under a mixture, shape ``(n,)``."""
        matrix = torch.einsum("g,gij->ij", mixture, self.matrices)
        best: Tensor = torch.linalg.solve(matrix, mixture @ self.slopes)
        return best

    def floors(self) -> Tensor:
        """Returns the least risk of a linear predictor in each domain alone, shape ``(G,)``."""
        best = torch.linalg.solve(self.matrices, self.slopes)
        floors: Tensor = self.constants - (self.slopes * best).sum(dim=1)
        return floors


class Oracle(NamedTuple):
    """Minimax predictor and value, least favourable mixture, and a bound on the value's error."""

    predictor: Tensor
    mixture: Tensor
    value: float
    gap: float


def planted_domains(num_domains: int, seed: int) -> Domains:
    """Draws domains; natural shares fall as ``1 / rank``, and the last quarter disagrees."""
    generator = torch.Generator().manual_seed(seed)
    common = torch.randn(CORE, generator=generator, dtype=DOUBLE)
    own = torch.randn(num_domains, CORE, generator=generator, dtype=DOUBLE)
    maps = common / common.norm() + SPREAD * own / math.sqrt(CORE)
    signs = torch.ones(num_domains, dtype=DOUBLE)
    signs[-max(1, num_domains // 4) :] = -1
    levels = torch.linspace(math.log(LEAST_NOISE), math.log(MOST_NOISE), num_domains, dtype=DOUBLE)
    noise = levels.exp()[torch.randperm(num_domains, generator=generator)]
    natural = 1 / torch.arange(1, num_domains + 1, dtype=DOUBLE)
    return Domains(maps, signs, noise, natural / natural.sum())


def draw(domains: Domains, domain: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Draws a sample of each given domain: features ``(B, p + 1)`` and targets ``(B,)``."""
    noise = torch.randn(len(domain), CORE + 3, generator=generator, dtype=DOUBLE)
    core, hidden, spurious, target = noise.tensor_split([CORE, CORE + 1, CORE + 2], dim=1)
    signal = (domains.maps[domain] * core).sum(dim=1) + HIDDEN * hidden[:, 0]
    feature = domains.signs[domain] * signal + SPURIOUS_NOISE * spurious[:, 0]
    return (
        torch.cat([core, feature.unsqueeze(1)], dim=1),
        signal + domains.noise[domain] * target[:, 0],
    )


def population_risks(domains: Domains) -> Quadratics:
    """Returns the risks of linear predictors without an intercept, from the moments."""
    num_domains = len(domains.noise)
    power = domains.maps.square().sum(dim=1) + HIDDEN**2
    across = domains.signs.unsqueeze(1) * domains.maps
    matrices = torch.zeros(num_domains, CORE + 1, CORE + 1, dtype=DOUBLE)
    matrices[:, :CORE, :CORE] = torch.eye(CORE, dtype=DOUBLE)
    matrices[:, :CORE, CORE] = across
    matrices[:, CORE, :CORE] = across
    matrices[:, CORE, CORE] = domains.signs.square() * power + SPURIOUS_NOISE**2
    slopes = torch.cat([domains.maps, (domains.signs * power).unsqueeze(1)], dim=1)
    return Quadratics(matrices, slopes, power + domains.noise.square())


def minimax(quadratics: Quadratics, references: Tensor, *, tolerance: float = 1e-6) -> Oracle:
    """Solves ``min_theta max_d risk_d(theta) - reference_d``, by Newton steps on a soft maximum.

    The temperature falls towards 0; the soft weights are a mixture, whose own minimiser bounds the
    value from below. That minimiser is the predictor returned, so the gap certifies all of it.

    Raises:
        ArithmeticError: If the gap stays above the tolerance.
    """
    num_domains = len(references)
    predictor = quadratics.best_of_mixture(
        torch.full((num_domains,), 1 / num_domains, dtype=DOUBLE)
    )
    best: Oracle | None = None
    temperature = 1.0
    while temperature > tolerance / 100:
        predictor, mixture = _at_temperature(quadratics, references, predictor, temperature)
        of_mixture = quadratics.best_of_mixture(mixture)
        excess = quadratics.risks(of_mixture) - references
        gap = float(excess.max() - mixture @ excess)
        if best is None or gap < best.gap:
            best = Oracle(of_mixture, mixture, float(excess.max()), gap)
        temperature /= 3
    if best is None or not best.gap <= tolerance:
        raise ArithmeticError(f"the oracle's gap must be at most {tolerance}, got {best}")
    return best


def _at_temperature(
    quadratics: Quadratics, references: Tensor, predictor: Tensor, temperature: float
) -> tuple[Tensor, Tensor]:
    """Minimises ``temperature * log sum exp(excess / temperature)`` by damped Newton steps."""

    def objective(point: Tensor) -> float:
        excess = quadratics.risks(point) - references
        return float(temperature * torch.logsumexp(excess / temperature, dim=0))

    for _ in range(50):
        excess = quadratics.risks(predictor) - references
        weights = (excess / temperature).softmax(dim=0)
        slopes = 2 * (quadratics.matrices @ predictor - quadratics.slopes)
        slope = weights @ slopes
        spread = slopes - slope
        curvature = 2 * torch.einsum("g,gij->ij", weights, quadratics.matrices)
        curvature = curvature + (weights.unsqueeze(1) * spread).T @ spread / temperature
        step = torch.linalg.solve(curvature, slope)
        decrease = float(slope @ step)
        if not decrease >= 1e-24:  # also where a reference is not a number
            break
        start, size = objective(predictor), 1.0
        while size > 1e-6 and objective(predictor - size * step) > start - 0.1 * size * decrease:
            size /= 2
        predictor = predictor - size * step
    excess = quadratics.risks(predictor) - references
    return predictor, (excess / temperature).softmax(dim=0)


class Clusters(NamedTuple):
    """Clusters of tokens, each with a planted expert of its own; float32."""

    centres: Tensor
    """Of length ``sqrt(D)``, shape ``(E, D)``."""
    experts: GatedExperts
    """The planted experts, one for each cluster, of the class of the student's."""
    shares: Tensor
    """How often a cluster occurs, falling with its rank, shape ``(E,)``."""
    spread: float
    """Standard deviation of a coordinate of a token around its centre."""
    noise: float
    """Standard deviation of a coordinate of a target around the planted expert's output."""


def planted_clusters(
    num_experts: int,
    seed: int,
    *,
    width: int,
    expert_width: int,
    zipf: float = 0.7,
    spread: float = 0.3,
    noise: float = 0.1,
) -> Clusters:
    """Draws centres and planted experts, whose outputs have about unit variance."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(num_experts, width, generator=generator)
    centres = centres * math.sqrt(width) / centres.norm(dim=1, keepdim=True)
    experts = GatedExperts(num_experts, width=width, expert_width=expert_width)
    with torch.no_grad():
        for weight, scale in ((experts.gate_up, 1.0), (experts.down, 1.5)):
            drawn = torch.randn(weight.shape, generator=generator)
            weight.copy_(scale * drawn / math.sqrt(weight.shape[2]))
    experts.requires_grad_(requires_grad=False)
    shares = torch.arange(1, num_experts + 1).float().pow(-zipf)
    return Clusters(centres, experts, shares / shares.sum(), spread, noise)


def draw_tokens(
    clusters: Clusters, cluster: Tensor, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Draws a token of each given cluster: tokens ``(T, D)`` and noiseless targets ``(T, D)``."""
    centres = clusters.centres[cluster]
    tokens = centres + clusters.spread * torch.randn(centres.shape, generator=generator)
    return tokens, planted_outputs(clusters, cluster, tokens)


def planted_outputs(clusters: Clusters, cluster: Tensor, tokens: Tensor) -> Tensor:
    """Returns what the planted expert of each token's cluster makes of the token."""
    plan = RoutingPlan(
        expert_ids=cluster.unsqueeze(1),
        combine_weights=torch.ones(len(cluster), 1),
        keep=torch.ones(len(cluster), 1, dtype=torch.bool),
        expert_load=cluster.bincount(minlength=len(clusters.shares)),
    )
    output: Tensor = clusters.experts(tokens, plan)
    return output
