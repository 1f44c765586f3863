"""Diagonals close to that of the Hessian, to precondition with."""

import torch
from torch import Tensor

from drgr._checks import check_not_negative, check_positive
from drgr.bilevel.products import HvpMode, Loss, second_derivatives
from drgr.bilevel.structures import Parameters, layout_of, named_leaves


def hutchinson_diagonal(
    inner_loss: Loss,
    outer_params: Parameters,
    inner_params: Parameters,
    *,
    num_probes: int = 10,
    floor: float = 1e-3,
    hvp: HvpMode = "double-backward",
    generator: torch.Generator | None = None,
) -> Tensor:
    """Estimates the absolute diagonal of the Hessian from products with random signs.

    ``E[v * (H v)]`` over signs ``v`` is the diagonal; exact with one probe where ``H`` is diagonal.

    Args:
        inner_loss: Scalar of the outer and the inner parameters.
        outer_params: Parameters of the outer problem.
        inner_params: Parameters of the inner problem, ``d_y`` entries.
        num_probes: Products to take, at least 1.
        floor: Least entry, as a share of the mean entry, in [0, inf).
        hvp: How to take them.
        generator: Draws the signs; None takes a fixed seed.

    Returns:
        The diagonal, positive, shape ``(d_y,)``; ones where the Hessian is 0.

    Examples:
        >>> scales, y = torch.tensor([1.0, 4.0]), torch.zeros(2)
        >>> hutchinson_diagonal(lambda x, y: (scales * (y - x) ** 2).sum() / 2, y, y)
        tensor([1., 4.])
    """
    check_positive("num_probes", num_probes)
    check_not_negative("floor", floor)
    outer, inner = (
        layout_of("outer_params", outer_params),
        layout_of("inner_params", inner_params),
    )
    point = inner.vector(inner_params)
    products = second_derivatives(
        hvp,
        lambda x, y: inner_loss(outer.structure(x), inner.structure(y)),
        outer.vector(outer_params),
        point,
    )
    generator = generator or torch.Generator(point.device).manual_seed(0)
    total = torch.zeros_like(point)
    for _ in range(num_probes):
        bits = torch.randint(0, 2, point.shape, generator=generator, device=point.device)
        signs = (2 * bits - 1).to(point.dtype)
        total += signs * products.hessian(signs)
    diagonal = (total / num_probes).abs()
    mean = diagonal.mean()
    if not bool(mean > 0):
        return torch.ones_like(diagonal)
    tiny = torch.finfo(diagonal.dtype).eps
    return diagonal.clamp_min(mean * max(floor, tiny))


def adam_diagonal(optimizer: torch.optim.Optimizer, inner_params: Parameters) -> Tensor:
    """Returns ``sqrt(v_hat) + eps`` of Adam's second moments, a diagonal that training paid for.

    Args:
        optimizer: An optimizer with ``exp_avg_sq`` (Adam, AdamW) that took at least one step.
        inner_params: The parameters it trains, ``d_y`` entries; the very tensors.

    Returns:
        Positive, shape ``(d_y,)``.

    Raises:
        ValueError: If a parameter has no second moment in the optimizer.

    Examples:
        >>> weight = torch.ones(2, requires_grad=True)
        >>> optimizer = torch.optim.Adam([weight])
        >>> (weight * torch.tensor([3.0, 5.0])).sum().backward()
        >>> optimizer.step()
        >>> adam_diagonal(optimizer, weight)
        tensor([3.0000, 5.0000])
    """
    layout = layout_of("inner_params", inner_params)
    groups = {parameter: group for group in optimizer.param_groups for parameter in group["params"]}
    parts: list[Tensor] = []
    for path, parameter in named_leaves(inner_params, "inner_params"):
        state = optimizer.state.get(parameter, {})
        if "exp_avg_sq" not in state:
            raise ValueError(
                f"{path} has no second moment in {type(optimizer).__name__}; "
                "pass the tensors that an Adam or AdamW has stepped"
            )
        group = groups[parameter]
        correction = 1 - group["betas"][1] ** float(state["step"])
        root = (state["exp_avg_sq"] / correction).sqrt() + group["eps"]
        parts.append(root.reshape(-1).to(layout.dtype))
    return torch.cat(parts)
