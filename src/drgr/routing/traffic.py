r"""Gradient traffic: how much gradient flows from each source to each expert, and its penalty.

A *source* is where a token comes from, a domain for instance. Its traffic to expert ``e`` is

.. math:: A_{re} = \sum_{t \in r} \Big\| \frac{\partial L}{\partial y_t} \Big\|_2 \pi_{te} ,

with ``y_t`` the output of the MoE block for token ``t`` and ``pi`` its combine weights. The norms
are at hand in the backward pass only. :func:`tap_traffic` measures them there and adds the
gradient of the penalty, in closed form, to that of the weights: one pass, no second derivatives.
"""

from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor

from drgr._checks import check_not_negative, check_shape


def gradient_traffic(
    norms: Tensor,
    source: Tensor,
    expert_ids: Tensor,
    weights: Tensor,
    *,
    num_sources: int,
    num_experts: int,
) -> Tensor:
    r"""Adds up the gradient that flows from each source to each expert.

    Args:
        norms: Norm of each token's gradient ``||dL/dy_t||``, shape ``(T,)``.
        source: Source of each token in ``[0, G)``, int64, shape ``(T,)``.
        expert_ids: Candidate experts, int64, shape ``(T, K)``; ``E`` marks one that is skipped.
        weights: Combine weights ``pi``, shape ``(T, K)``; those of skipped candidates are ignored.
        num_sources: Number of sources ``G``.
        num_experts: Number of experts ``E``.

    Returns:
        Traffic ``A``, shape ``(G, E)``, float64, detached, in the unit of ``norms``.

    Raises:
        ValueError: If shapes do not fit.

    Complexity:
        O(T K + G E) time and memory.
    """
    check_shape("norms", norms, (expert_ids.shape[0],))
    check_shape("source", source, (expert_ids.shape[0],))
    check_shape("weights", weights, tuple(expert_ids.shape))
    mass = norms.detach().double().unsqueeze(1) * weights.detach().double()
    link = source.unsqueeze(1) * (num_experts + 1) + expert_ids
    traffic = mass.new_zeros(num_sources * (num_experts + 1))
    traffic.index_add_(0, link.reshape(-1), mass.reshape(-1))
    return traffic.view(num_sources, num_experts + 1)[:, :num_experts]


def congestion(traffic: Tensor, links: Tensor | None = None) -> Tensor:
    """Returns the traffic of the busiest link over that of the mean link.

    Args:
        traffic: Traffic ``A >= 0``, shape ``(..., G, E)``.
        links: Which links exist, bool, shape ``(..., G, E)``; all by default.

    Returns:
        Shape ``(...)``, float64: 1 where all links carry the same, the number of links where one
        carries everything, and 1 where there is no traffic at all. Links of a source without
        traffic (a domain absent from the batch) are left out.
    """
    relative, counted = _relative_to_mean(traffic, links)
    busiest = relative.flatten(-2).amax(dim=-1)
    return torch.where(counted.flatten(-2).any(dim=-1), busiest, 1.0)


def traffic_penalty(
    traffic: Tensor,
    *,
    coefficient: float = 1.0,
    links: Tensor | None = None,
    link_weights: Tensor | None = None,
) -> Tensor:
    r"""Returns what uneven traffic costs.

    .. math:: P = \frac{\gamma}{2} \sum_{l} w_l \Big( \frac{A_l}{\bar A} \Big)^2 , \qquad
              \bar A = \frac1n \sum_l A_l ,

    over the ``n`` links that exist and whose source has traffic. It depends on how traffic is
    spread, not on how much there is: it is the same for every multiple of the loss.

    Args:
        traffic: Traffic ``A >= 0``, shape ``(..., G, E)``.
        coefficient: The coefficient ``gamma``, at least 0.
        links: Which links exist, bool, shape ``(..., G, E)``; all by default.
        link_weights: Weights ``w >= 0``, shape ``(..., G, E)``; by default ``1 / n`` each, at which
            the penalty is ``gamma / 2`` for even traffic, whatever the number of links.

    Returns:
        Shape ``(...)``, float64; 0 where there is no traffic.

    Raises:
        ValueError: If ``coefficient`` is negative or not finite.
    """
    check_not_negative("coefficient", coefficient)
    relative, counted = _relative_to_mean(traffic, links)
    weights = _link_weights(counted, link_weights)
    return coefficient / 2 * (weights * relative.square()).sum(dim=(-2, -1))


def traffic_penalty_gradient(
    traffic: Tensor,
    *,
    coefficient: float = 1.0,
    links: Tensor | None = None,
    link_weights: Tensor | None = None,
) -> Tensor:
    r"""Returns the gradient of :func:`traffic_penalty` with respect to the traffic.

    .. math:: \frac{\partial P}{\partial A_j} = \frac{\gamma}{\bar A} \Big( w_j \frac{A_j}{\bar A}
              - \frac1n \sum_l w_l \Big( \frac{A_l}{\bar A} \Big)^2 \Big)

    It is orthogonal to the traffic, because the penalty does not change with scale.

    Args:
        traffic: Traffic ``A >= 0``, shape ``(..., G, E)``.
        coefficient: The coefficient ``gamma``, at least 0.
        links: Which links exist, bool, shape ``(..., G, E)``; all by default.
        link_weights: As for :func:`traffic_penalty`.

    Returns:
        Shape ``(..., G, E)``, float64; 0 for links that do not count, and where there is no
        traffic.

    Raises:
        ValueError: If ``coefficient`` is negative or not finite.
    """
    check_not_negative("coefficient", coefficient)
    relative, counted = _relative_to_mean(traffic, links)
    weights = _link_weights(counted, link_weights)
    number = counted.sum(dim=(-2, -1), keepdim=True)
    excess = (weights * relative.square()).sum(dim=(-2, -1), keepdim=True) / number.clamp_min(1)
    total = torch.where(counted, traffic.detach().double(), 0.0).sum(dim=(-2, -1), keepdim=True)
    scale = coefficient * number / torch.where(number > 0, total, 1.0)
    return torch.where(counted, scale * (weights * relative - excess), 0.0)


def exchanged_bytes(
    assignments: float,
    *,
    width: int,
    bytes_per_value: int,
    gradient_checkpointing: bool = False,
) -> tuple[float, float]:
    """Predicts what expert parallelism would send for a plan, forward and backward.

    Each assignment sends one token's vector to its expert (dispatch) and one back (combine); the
    backward pass sends the gradient of each. Every link is counted as one between devices: where
    ``P`` devices hold equal parts, about ``(P - 1) / P`` of it is.

    Args:
        assignments: Pairs (token, expert) that run.
        width: Width ``D`` of a token's vector.
        bytes_per_value: Bytes of one of its values, 2 for bfloat16.
        gradient_checkpointing: Whether the forward pass is repeated in the backward pass, with its
            exchange.

    Returns:
        Bytes of the forward and of the backward pass, without expert ids.

    Raises:
        ValueError: If a count is negative or not finite.
    """
    check_not_negative("assignments", assignments)
    check_not_negative("width", width)
    check_not_negative("bytes_per_value", bytes_per_value)
    once = 2.0 * assignments * width * bytes_per_value
    return once, 2 * once if gradient_checkpointing else once


@final
@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TrafficMeter:
    """Where the backward pass of one layer adds its traffic, and what that costs.

    Attributes:
        traffic: Receives the traffic, shape ``(G, E)``, float64; added to in place.
        coefficient: The coefficient ``gamma`` of :func:`traffic_penalty` for each forward pass.
        links: Which links exist, bool, shape ``(G, E)``; ``None`` where all do.
        link_weights: Weights of the penalty, shape ``(G, E)``; ``None`` for ``1 / n``.
    """

    traffic: Tensor
    coefficient: float = 0.0
    links: Tensor | None = None
    link_weights: Tensor | None = None

    def __post_init__(self) -> None:
        check_not_negative("coefficient", self.coefficient)


def tap_traffic(
    output: Tensor, weights: Tensor, *, source: Tensor, expert_ids: Tensor, meter: TrafficMeter
) -> Tensor:
    """Returns ``output`` itself, having its backward pass measure traffic and pay for it.

    When the gradient of ``output`` arrives, its norms are taken as constants, the traffic of this
    pass is added to ``meter.traffic``, and the gradient of the penalty is added to that of
    ``weights``. With a coefficient of 0 no gradient changes, not even by rounding.

    Args:
        output: Combined expert output ``y``, shape ``(T, D)``.
        weights: Combine weights that made it, shape ``(T, K)``.
        source: Source of each token in ``[0, G)``, int64, shape ``(T,)``.
        expert_ids: Candidate experts, int64, shape ``(T, K)``; ``E`` marks one that is skipped.
        meter: Where traffic goes and what it costs.

    Returns:
        ``output``, shape and dtype unchanged. Nothing is measured where its gradient is never
        computed.

    Raises:
        RuntimeError: In a backward pass with ``create_graph`` and a coefficient above 0: the
            penalty's gradient has no second derivatives.

    Gradients:
        The penalty's gradient does not scale with the loss: where the loss is multiplied by a
        factor (a loss scaler, a number of processes), so must be the coefficient. It is that of
        this pass and process alone; data parallelism averages it like any gradient.

    Numerics:
        Norms in float32 at least, sums in float64.

    Complexity:
        O(T (D + K)) time in the backward pass; holds ``weights`` and ``expert_ids`` until then,
        outside of the tensors that gradient checkpointing drops and recomputes.
    """
    plan = _TappedPlan(weights.detach(), source, expert_ids)
    tapped: Tensor = _Tap.apply(output, weights, plan, meter)  # type: ignore[no-untyped-call]
    return tapped


@final
@dataclass(frozen=True, slots=True)
class _TappedPlan:
    """A plan as the backward pass needs it.

    It is kept on the node of the graph as a plain object, not as saved tensors: the node then
    counts its pass once, also where gradient checkpointing recomputes the tensors around it.
    """

    weights: Tensor
    source: Tensor
    expert_ids: Tensor


class _Tap(torch.autograd.Function):
    """The identity on the output; its backward pass is where the traffic is."""

    @staticmethod
    def forward(
        ctx: Any, output: Tensor, weights: Tensor, plan: _TappedPlan, meter: TrafficMeter
    ) -> Tensor:
        """Keeps the plan for the backward pass."""
        del weights
        ctx.plan, ctx.meter = plan, meter
        # Unlike a view, it may be modified in place by the block.
        return output.detach()

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor | None, ...]:
        """Measures the gradient and passes it on."""
        (gradient,) = gradients
        plan: _TappedPlan = ctx.plan
        meter: TrafficMeter = ctx.meter
        if meter.coefficient > 0 and torch.is_grad_enabled():
            raise RuntimeError(
                f"the traffic penalty has no second derivatives, got coefficient "
                f"{meter.coefficient} in a backward pass with create_graph; record traffic with "
                f"coefficient 0 there"
            )
        with torch.no_grad():
            added = _measure(gradient, plan, meter)
        return gradient, added if ctx.needs_input_grad[1] else None, None, None


def _measure(gradient: Tensor, plan: _TappedPlan, meter: TrafficMeter) -> Tensor | None:
    """Adds one pass's traffic; returns the penalty's gradient with respect to the weights."""
    dtype = torch.promote_types(gradient.dtype, torch.float32)
    norms = torch.linalg.vector_norm(gradient.flatten(1), dim=1, dtype=dtype).double()
    num_sources, num_experts = meter.traffic.shape
    traffic = gradient_traffic(
        norms,
        plan.source,
        plan.expert_ids,
        plan.weights,
        num_sources=num_sources,
        num_experts=num_experts,
    )
    meter.traffic.add_(traffic)
    if meter.coefficient == 0:
        return None
    slope = traffic_penalty_gradient(
        traffic,
        coefficient=meter.coefficient,
        links=meter.links,
        link_weights=meter.link_weights,
    )
    # A column of zeros for candidates that are skipped.
    padded = torch.cat([slope, slope.new_zeros(num_sources, 1)], dim=1)
    added: Tensor = norms.unsqueeze(1) * padded[plan.source.unsqueeze(1), plan.expert_ids]
    return added.to(plan.weights.dtype)


def _relative_to_mean(traffic: Tensor, links: Tensor | None) -> tuple[Tensor, Tensor]:
    """Returns ``A / mean(A)`` over the links that count, 0 for others, and which count."""
    amounts = traffic.double()
    # Comparisons that what is not a number fails: it counts, and shows.
    counted = ~(amounts.detach().sum(dim=-1, keepdim=True) <= 0).expand_as(amounts)
    if links is not None:
        counted = counted & links
    amounts = torch.where(counted, amounts, 0.0)
    total = amounts.sum(dim=(-2, -1), keepdim=True)
    is_none = total <= 0
    counted = counted & ~is_none
    number = counted.sum(dim=(-2, -1), keepdim=True)
    return amounts * number / torch.where(is_none, 1.0, total), counted


def _link_weights(counted: Tensor, link_weights: Tensor | None) -> Tensor:
    if link_weights is not None:
        return torch.where(counted, link_weights.double(), 0.0)
    return counted / counted.sum(dim=(-2, -1), keepdim=True).clamp_min(1)
