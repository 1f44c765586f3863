"""What a radius buys: bounds on worst cases from moments, and certificates for shifted mixtures.

Every function evaluates one statement of ``docs/theory.md``, whose number its docstring names.
With ``p`` the nominal probabilities, ``V`` the worst case of losses ``l`` in a ball of radius
``rho``, ``m = <p, l>`` and ``s^2 = sum_i p_i (l_i - m)^2``.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from drgr._checks import check_not_negative, check_positive, check_shape
from drgr.ambiguity.divergence import Divergence
from drgr.ambiguity.inputs import checked_losses, checked_nominal
from drgr.ambiguity.worst_case import WorstCase, worst_case


class ExcessBounds(NamedTuple):
    """Bounds on ``V - m``, shape ``(...)``, in the unit and dtype of the losses.

    Examples:
        >>> import torch
        >>> ExcessBounds(torch.zeros(()), torch.ones(())).upper
        tensor(1.)
    """

    lower: Tensor
    upper: Tensor


def chi_square_excess(
    losses: Tensor, *, radius: float, nominal: Tensor | None = None
) -> ExcessBounds:
    r"""Bounds the worst case of a ``ChiSquare`` ball over the mean (theory.md 6.1).

    ``s min(sqrt(2 rho), s / (m - min l)) <= V - m <= min(sqrt(2 rho) s, max l - m)``. Both ends
    are equal while no weight reaches 0.

    Args:
        losses: Finite losses, shape ``(..., n)``.
        radius: ``rho >= 0``, in the normalisation of ``ChiSquare``.
        nominal: Probabilities as for :func:`worst_case`; uniform if None.

    Raises:
        ValueError: If an argument is out of range.

    Examples:
        >>> import torch
        >>> chi_square_excess(torch.tensor([1.0, 2.0, 3.0]), radius=0.125)
        ExcessBounds(lower=tensor(0.4082), upper=tensor(0.4082))
    """
    check_not_negative("radius", radius)
    moments = _moments(losses, nominal)
    step = math.sqrt(2 * radius)
    lower = moments.deviation * moments.longest_step.clamp_max(step)
    return moments.bounds(lower, step * moments.deviation)


def kl_excess(losses: Tensor, *, radius: float, nominal: Tensor | None = None) -> ExcessBounds:
    r"""Bounds the worst case of a ``KL`` ball over the mean (theory.md 6.2).

    From above by the least of ``sqrt(rho / 2) (max l - min l)`` (Pinsker), ``sqrt(2 rho) s + rho
    (max l - m) / 3`` (Bernstein) and ``max l - m``; from below, with ``a = (m - min l) / s``, by
    the greater of ``s (sqrt(2 rho + rho^2 a^2) - rho a)`` and ``s min(sqrt(e^rho - 1), 1 / a)``.
    Both ends are ``sqrt(2 rho) s`` to first order.

    Args:
        losses: Finite losses, shape ``(..., n)``.
        radius: ``rho >= 0``, in nats.
        nominal: Probabilities as for :func:`worst_case`; uniform if None.

    Raises:
        ValueError: If an argument is out of range.

    Examples:
        >>> import torch
        >>> kl_excess(torch.tensor([1.0, 2.0, 3.0]), radius=0.02)
        ExcessBounds(lower=tensor(0.1445), upper=tensor(0.1700))
    """
    check_not_negative("radius", radius)
    moments = _moments(losses, nominal)
    deviation, step = moments.deviation, math.sqrt(2 * radius)
    pinsker = math.sqrt(radius / 2) * (moments.top - moments.bottom)
    bernstein = step * deviation + radius / 3 * (moments.top - moments.mean)
    # s a, with its limit 0 where the losses are equal.
    fall = moments.mean - moments.bottom
    smooth = ((step * deviation).square() + (radius * fall).square()).sqrt() - radius * fall
    # Beyond this radius the step is the longest one anyway.
    far = math.sqrt(math.expm1(min(radius, 600.0)))
    lower = torch.maximum(smooth, deviation * moments.longest_step.clamp_max(far))
    return moments.bounds(lower, torch.minimum(pinsker, bernstein))


def total_variation_excess(
    losses: Tensor, *, radius: float, nominal: Tensor | None = None
) -> ExcessBounds:
    r"""Bounds the worst case of a ``TotalVariation`` ball over the mean (theory.md 6.3).

    ``min(rho, P_min) (max l - min l) <= V - m <= min(rho (max l - min l), max l - m)`` with
    ``P_min`` the nominal mass of the smallest loss. Both ends are equal while ``rho <= P_min``.

    Args:
        losses: Finite losses, shape ``(..., n)``.
        radius: ``rho >= 0``, the mass that may move.
        nominal: Probabilities as for :func:`worst_case`; uniform if None.

    Raises:
        ValueError: If an argument is out of range.

    Examples:
        >>> import torch
        >>> total_variation_excess(torch.tensor([1.0, 2.0, 3.0]), radius=0.25)
        ExcessBounds(lower=tensor(0.5000), upper=tensor(0.5000))
    """
    check_not_negative("radius", radius)
    moments = _moments(losses, nominal)
    spread = moments.top - moments.bottom
    return moments.bounds(moments.bottom_mass.clamp_max(radius) * spread, radius * spread)


def smooth_excess(
    losses: Tensor,
    *,
    radius: float,
    least_curvature: float,
    most_curvature: float,
    reach: float,
    nominal: Tensor | None = None,
) -> ExcessBounds:
    r"""Bounds the worst case of any f-divergence ball over the mean (theory.md 6.4).

    ``s min(sqrt(2 rho / K), reach / max_i |l_i - m| / s) <= V - m <= sqrt(2 rho / k) s``.

    Args:
        losses: Finite losses, shape ``(..., n)``.
        radius: ``rho >= 0``.
        least_curvature: ``k > 0`` with ``f(r) >= k (r - 1)^2 / 2`` for ``0 <= r <= 1 / min_i p_i``;
            for KL ``min_i p_i`` will do.
        most_curvature: ``K`` with ``f(r) <= K (r - 1)^2 / 2`` for ``|r - 1| <= reach``; for KL
            ``1 / (1 - reach)`` will do.
        reach: See ``most_curvature``; above 0, at most 1.
        nominal: Probabilities as for :func:`worst_case`; uniform if None.

    Raises:
        ValueError: If an argument is out of range.

    Examples:
        >>> import torch
        >>> losses = torch.tensor([1.0, 2.0, 3.0])
        >>> smooth_excess(losses, radius=0.02, least_curvature=1.0, most_curvature=1.0, reach=1.0)
        ExcessBounds(lower=tensor(0.1633), upper=tensor(0.1633))
    """
    check_not_negative("radius", radius)
    check_positive("least_curvature", least_curvature)
    check_positive("most_curvature", most_curvature)
    if not 0 < reach <= 1:
        raise ValueError(f"reach must lie in (0, 1], got {reach}")
    moments = _moments(losses, nominal)
    furthest = torch.maximum(moments.top - moments.mean, moments.mean - moments.bottom)
    longest = reach * _ratio(moments.deviation, furthest)
    lower = moments.deviation * longest.clamp_max(math.sqrt(2 * radius / most_curvature))
    return moments.bounds(lower, math.sqrt(2 * radius / least_curvature) * moments.deviation)


def risk_at_distance(worst: WorstCase, *, distance: float, radius: float | None = None) -> Tensor:
    r"""Bounds the risk ``<q, l>`` of every mixture at a distance (theory.md 6.5).

    ``value + gap + multiplier * (distance - radius)``, with 0 for the radius of a penalised worst
    case. No other solve is needed, and it holds for mixtures inside and outside of the ball: what
    was trained against one shift is certified against all.

    Args:
        worst: A worst case of the losses, from a finite divergence with a level.
        distance: ``D(q || p)`` of the mixture, at least 0; ``q`` has mass only where ``p`` has.
        radius: The radius of ``worst``; None if it is penalised.

    Returns:
        Shape ``(...)``, dtype of the value.

    Raises:
        ValueError: If a number is out of range.

    Examples:
        >>> import torch
        >>> from drgr.ambiguity import KL
        >>> worst = worst_case(torch.tensor([1.0, 2.0, 4.0]), divergence=KL(), penalty=1.0)
        >>> risk_at_distance(worst, distance=0.5)
        tensor(3.5712)
    """
    check_not_negative("distance", distance)
    check_not_negative("radius", radius or 0.0)
    further = distance - (radius or 0.0)
    slope = worst.multiplier * further if further else torch.zeros_like(worst.value)
    return (worst.value + worst.gap + slope).detach()


def regret_bound(
    losses: Tensor, *, divergence: Divergence, radius: float, nominal: Tensor | None = None
) -> Tensor:
    r"""Bounds what a robust choice loses to another one under any mixture (theory.md 6.6).

    If ``x`` minimises the worst case up to ``eps``, then for every ``q`` in the ball and every
    other choice with losses ``l'``, ``<q, l(x)> <= <q, l'> + V(l') + V(-l') + eps``. This returns
    ``V(l') + V(-l')``.

    Args:
        losses: ``l'``, the losses of the other choice, shape ``(..., n)``.
        divergence: Of the ball.
        radius: Of the ball.
        nominal: Probabilities as for :func:`worst_case`; uniform if None.

    Returns:
        Shape ``(...)``; at least 0, and 0 if the losses are equal.

    Examples:
        >>> import torch
        >>> from drgr.ambiguity import ChiSquare
        >>> regret_bound(torch.tensor([1.0, 2.0, 3.0]), divergence=ChiSquare(), radius=0.125)
        tensor(0.8165)
    """
    worst, best = (
        worst_case(side, divergence=divergence, radius=radius, nominal=nominal)
        for side in (losses.detach(), -losses.detach())
    )
    return worst.value + worst.gap + best.value + best.gap


def hoeffding_widths(num_samples: Tensor, *, loss_range: float, failure: float) -> Tensor:
    r"""Returns how far held-out means may lie below the true ones (theory.md 6.8).

    ``range sqrt(log(G / failure) / (2 n_d))``: with probability at least ``1 - failure`` no true
    mean of ``G`` domains exceeds its sample mean by more.

    Args:
        num_samples: *Independent* samples ``n_d`` of each domain (documents, not tokens), shape
            ``(G,)``.
        loss_range: Largest possible loss less the smallest; clip losses that have none.
        failure: Probability in (0, 1) with which a width may be exceeded.

    Returns:
        Widths in the unit of the losses, shape ``(G,)``, float64.

    Raises:
        ValueError: If an argument is out of range.

    References:
        Hoeffding, *Probability inequalities for sums of bounded random variables*, 1963.

    Examples:
        >>> import torch
        >>> hoeffding_widths(torch.tensor([100, 400]), loss_range=1.0, failure=0.1)
        tensor([0.1224, 0.0612], dtype=torch.float64)
    """
    count, log = _sample_arguments(num_samples, loss_range, failure, least=1)
    return loss_range * (log / (2 * count)).sqrt()


def bernstein_widths(
    variances: Tensor, num_samples: Tensor, *, loss_range: float, failure: float
) -> Tensor:
    r"""Returns the widths of :func:`hoeffding_widths` from sample variances (theory.md 6.8).

    ``sqrt(2 v_d log(2 G / failure) / n_d) + 7 range log(2 G / failure) / (3 (n_d - 1))``: shorter
    where losses vary little.

    Args:
        variances: Unbiased sample variances ``v_d``, shape ``(G,)``.
        num_samples: Independent samples ``n_d``, at least 2, shape ``(G,)``.
        loss_range: Largest possible loss less the smallest.
        failure: Probability in (0, 1) with which a width may be exceeded.

    Returns:
        Widths in the unit of the losses, shape ``(G,)``, float64.

    Raises:
        ValueError: If an argument is out of range.

    References:
        Maurer and Pontil, *Empirical Bernstein bounds and sample variance penalization*, COLT 2009,
        Theorem 4.

    Examples:
        >>> import torch
        >>> variances, counts = torch.tensor([0.01]), torch.tensor([1000])
        >>> bernstein_widths(variances, counts, loss_range=1.0, failure=0.1)
        tensor([0.0147], dtype=torch.float64)
    """
    count, log = _sample_arguments(num_samples, loss_range, failure / 2, least=2)
    check_shape("variances", variances, count.shape)
    check_not_negative("variances", variances.min().item())
    spread = (2 * variances.double() * log / count).sqrt()
    return spread + 7 * loss_range * log / (3 * (count - 1))


def held_out_bound(
    losses: Tensor,
    widths: Tensor,
    *,
    divergence: Divergence,
    radius: float,
    nominal: Tensor | None = None,
) -> Tensor:
    r"""Bounds the true risk of every mixture in a ball from held-out means (theory.md 6.7, 6.8).

    ``V(l_hat + w)``: at most ``V(l_hat) + max w``, and on the event of the widths at least
    ``<q, l>`` for the true losses ``l`` and all ``q`` in the ball at once.

    Args:
        losses: Held-out means ``l_hat`` by domain, shape ``(G,)``; of data that did not train.
        widths: ``w >= 0``, shape ``(G,)``, of :func:`hoeffding_widths` for instance.
        divergence: Of the ball.
        radius: Of the ball.
        nominal: Probabilities as for :func:`worst_case`; uniform if None.

    Returns:
        The bound, shape ``()``, float64.

    Raises:
        ValueError: If an argument is out of range.

    Examples:
        >>> import torch
        >>> from drgr.ambiguity import KL
        >>> losses, widths = torch.tensor([1.0, 2.0, 4.0]), torch.full((3,), 0.5)
        >>> held_out_bound(losses, widths, divergence=KL(), radius=0.1)
        tensor(3.3991, dtype=torch.float64)
    """
    check_shape("widths", widths, losses.shape)
    check_not_negative("widths", widths.min().item())
    raised = losses.detach().double() + widths.double()
    worst = worst_case(raised, divergence=divergence, radius=radius, nominal=nominal)
    return worst.value + worst.gap


class _Moments(NamedTuple):
    """Over the atoms with mass, float64, shape ``(...)``."""

    mean: Tensor
    deviation: Tensor
    top: Tensor
    bottom: Tensor
    bottom_mass: Tensor
    dtype: torch.dtype

    @property
    def longest_step(self) -> Tensor:
        """``s / (m - min l)``: the step along the standardised losses at which a weight is 0."""
        return _ratio(self.deviation, self.mean - self.bottom)

    def bounds(self, lower: Tensor, upper: Tensor) -> ExcessBounds:
        most = self.top - self.mean
        return ExcessBounds(lower.to(self.dtype), torch.minimum(upper, most).to(self.dtype))


def _moments(losses: Tensor, nominal: Tensor | None) -> _Moments:
    checked = checked_losses(losses.detach())
    probabilities = checked_nominal(nominal, checked)
    values, has_mass = checked.double(), probabilities > 0
    mean = (probabilities * values).sum(dim=-1)
    variance = (probabilities * (values - mean.unsqueeze(-1)).square()).sum(dim=-1)
    bottom = values.masked_fill(~has_mass, math.inf).amin(dim=-1)
    is_bottom = has_mass & (values == bottom.unsqueeze(-1))
    return _Moments(
        mean=mean,
        deviation=variance.sqrt(),
        top=values.masked_fill(~has_mass, -math.inf).amax(dim=-1),
        bottom=bottom,
        bottom_mass=(probabilities * is_bottom).sum(dim=-1),
        dtype=checked.dtype,
    )


def _ratio(top: Tensor, bottom: Tensor) -> Tensor:
    """Returns a ratio, 0 where both are 0."""
    return torch.where(bottom > 0, top / bottom, 0.0)


def _sample_arguments(
    num_samples: Tensor, loss_range: float, failure: float, *, least: int
) -> tuple[Tensor, float]:
    """Returns checked sample counts and ``log(G / failure)``."""
    check_shape("num_samples", num_samples, (None,))
    check_positive("loss_range", loss_range)
    if not 0 < failure < 1:
        raise ValueError(f"failure must lie in (0, 1), got {failure}")
    if num_samples.numel() == 0 or num_samples.min().item() < least:
        raise ValueError(
            f"num_samples must be at least {least} for every domain, got {num_samples.tolist()}"
        )
    return num_samples.double(), math.log(num_samples.numel() / failure)
