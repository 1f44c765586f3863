"""What routing sparsity costs in loss and saves in communication.

Every function evaluates one statement of ``docs/theory.md``, whose number its docstring names.
"""

import math

import torch
from torch import Tensor

from drgr._checks import check_not_negative, check_positive, check_shape


def output_change(before: Tensor, after: Tensor, norms: Tensor) -> Tensor:
    r"""Bounds how far other gates move the output of a layer (theory.md 7.1).

    Let ``y_t = sum_e pi_te f_e(t)``. Then ``|y_t - y'_t| <= sum_e |pi_te - pi'_te| |f_e(t)|``,
    whatever the reason: closed links, another selection, a projection onto a budget.

    Args:
        before: ``pi``, 0 where an expert does not run, shape ``(T, E)``.
        after: ``pi'``, likewise.
        norms: ``|f_e(t)|`` or bounds on it, shape ``(T, E)``.

    Returns:
        Shape ``(T,)``, dtype of the gates.

    Raises:
        ValueError: If a shape is wrong or a norm negative.

    Examples:
        >>> import torch
        >>> before, after = torch.tensor([[0.75, 0.25, 0.0]]), torch.tensor([[0.75, 0.0, 0.25]])
        >>> output_change(before, after, torch.ones(1, 3))
        tensor([0.5000])
    """
    check_shape("before", before, (None, None))
    for name, tensor in (("after", after), ("norms", norms)):
        check_shape(name, tensor, before.shape)
    check_not_negative("norms", norms.min().item() if norms.numel() else 0.0)
    return ((before - after).abs() * norms).sum(dim=-1)


def truncation_error(
    gates: Tensor, kept: Tensor, norms: Tensor, *, renormalised: bool = False
) -> Tensor:
    r"""Bounds how far dropping experts moves the output of a layer (theory.md 7.1).

    Let ``y_t = sum_e pi_te f_e(t)`` and sum over kept experts only. The change is at most ``sum_e
    pi_te |f_e(t)|`` over the dropped ones; if the kept gates are scaled up to the old sum, at most
    that plus ``m / (1 - m)`` times the same sum over the kept ones, with ``m`` the dropped share.

    Args:
        gates: ``pi >= 0``, shape ``(T, E)``.
        kept: Experts that run, shape ``(T, E)``, bool.
        norms: ``|f_e(t)|`` or bounds on it, shape ``(T, E)``.
        renormalised: Whether kept gates are scaled up to the sum of all.

    Returns:
        Shape ``(T,)``, dtype of ``gates``; ``inf`` for a token of which a renormalised plan keeps
        no gate above 0 while it drops some.

    Raises:
        ValueError: If a shape is wrong or a number negative.

    Examples:
        >>> import torch
        >>> gates, kept = torch.tensor([[0.75, 0.25]]), torch.tensor([[True, False]])
        >>> truncation_error(gates, kept, torch.ones(1, 2))
        tensor([0.2500])
        >>> truncation_error(gates, kept, torch.ones(1, 2), renormalised=True)
        tensor([0.5000])
    """
    check_shape("gates", gates, (None, None))
    for name, tensor in (("gates", gates), ("norms", norms)):
        check_shape(name, tensor, gates.shape)
        check_not_negative(name, tensor.min().item() if tensor.numel() else 0.0)
    check_shape("kept", kept, gates.shape)
    outputs = gates * norms
    dropped = outputs.masked_fill(kept, 0.0).sum(dim=-1)
    if not renormalised:
        return dropped
    lost = gates.masked_fill(kept, 0.0).sum(dim=-1)
    left = gates.masked_fill(~kept, 0.0).sum(dim=-1)
    scaled_up = lost / left * outputs.masked_fill(~kept, 0.0).sum(dim=-1)
    return torch.where(lost > 0, dropped + scaled_up.nan_to_num(nan=math.inf), 0.0)


def loss_change(errors: Tensor, lipschitz: Tensor) -> Tensor:
    r"""Bounds the change of a loss by those of the outputs of its layers (theory.md 7.2).

    ``sum_j Lambda_j e_j``.

    Args:
        errors: ``e_j``, the error of the output of layer ``j`` on the same input, shape ``(L,)``.
        lipschitz: ``Lambda_j``, the Lipschitz constant of the loss in that output with the layers
            above already changed, shape ``(L,)``. Finite only if those select the same experts for
            nearby inputs.

    Returns:
        Shape ``()``.

    Raises:
        ValueError: If shapes differ or a number is negative.

    Examples:
        >>> import torch
        >>> loss_change(torch.tensor([0.1, 0.2]), torch.tensor([2.0, 1.0]))
        tensor(0.4000)
    """
    check_shape("errors", errors, (None,))
    check_shape("lipschitz", lipschitz, errors.shape)
    for name, tensor in (("errors", errors), ("lipschitz", lipschitz)):
        check_not_negative(name, tensor.min().item() if tensor.numel() else 0.0)
    return torch.dot(errors, lipschitz)


def loss_rise(slopes: Tensor, changes: Tensor, *, smoothness: float = 0.0) -> Tensor:
    r"""Bounds by how much changed outputs raise a loss (theory.md 7.3).

    ``sum_t |dL/dy_t| e_t + beta / 2 sum_t e_t^2``.

    Args:
        slopes: ``|dL/dy_t|`` before the change, shape ``(T,)``.
        changes: ``e_t``, of :func:`output_change` for instance, shape ``(T,)``.
        smoothness: ``beta``, the Lipschitz constant of ``dL/dy`` in the outputs of all tokens.

    Returns:
        Shape ``()``.

    Raises:
        ValueError: If shapes differ or a number is negative.

    Examples:
        >>> import torch
        >>> loss_rise(torch.tensor([1.0, 2.0]), torch.tensor([0.5, 0.25]))
        tensor(1.)
    """
    check_shape("slopes", slopes, (None,))
    check_shape("changes", changes, slopes.shape)
    for name, tensor in (("slopes", slopes), ("changes", changes)):
        check_not_negative(name, tensor.min().item() if tensor.numel() else 0.0)
    check_not_negative("smoothness", smoothness)
    return torch.dot(slopes, changes) + smoothness / 2 * changes.square().sum()


def closing_cost(
    traffic: Tensor,
    closed: Tensor,
    *,
    largest_norm: float,
    squared_errors: float = 0.0,
    smoothness: float = 0.0,
) -> Tensor:
    r"""Bounds by how much closing links raises a loss, from their gradient traffic (theory.md 7.3).

    ``b sum_closed A_re + beta / 2 sum_t e_t^2``. So the links with the least traffic are the
    cheapest to close.

    Args:
        traffic: ``A_re = sum_t |dL/dy_t| pi_te`` over the tokens of source ``r``, before closing,
            shape ``(R, E)``.
        closed: Links to close, shape ``(R, E)``, bool. The gates that stay keep their values, and
            no other expert takes the free place; where one does, take :func:`loss_rise`.
        largest_norm: ``b``, the largest ``|f_e(t)|``.
        squared_errors: ``sum_t e_t^2`` with ``e_t`` of :func:`truncation_error`.
        smoothness: ``beta``, the Lipschitz constant of ``dL/dy`` in the outputs of all tokens.

    Returns:
        Shape ``()``, dtype of ``traffic``.

    Raises:
        ValueError: If a shape is wrong or a number negative.

    Examples:
        >>> import torch
        >>> traffic = torch.tensor([[1.0, 0.1], [0.2, 2.0]])
        >>> closing_cost(traffic, traffic < 0.5, largest_norm=2.0)
        tensor(0.6000)
    """
    check_shape("closed", closed, traffic.shape)
    check_not_negative("traffic", traffic.min().item() if traffic.numel() else 0.0)
    check_not_negative("largest_norm", largest_norm)
    check_not_negative("squared_errors", squared_errors)
    check_not_negative("smoothness", smoothness)
    first_order = largest_norm * traffic.masked_fill(~closed, 0.0).sum()
    return first_order + smoothness / 2 * squared_errors


def most_bytes(
    num_tokens: Tensor,
    open_links: Tensor,
    *,
    max_experts: int,
    width: int,
    bytes_per_value: int,
    num_transfers: int = 4,
) -> int:
    r"""Bounds the bytes that tokens and gradients move in a step of one layer (theory.md 7.5).

    ``transfers * width * bytes * sum_r T_r min(K, s_r)``.

    Args:
        num_tokens: ``T_r``, tokens of each source, shape ``(R,)``, integer.
        open_links: ``s_r``, experts to which a source has an open link, shape ``(R,)``, integer.
        max_experts: ``K``, most experts of a token.
        width: Values sent for an assignment.
        bytes_per_value: Bytes of each.
        num_transfers: Times that an assignment crosses a link: to the expert and back, in the
            forward and in the backward pass; 6 if the forward pass is repeated, 2 if only one
            direction counts.

    Raises:
        ValueError: If a shape is wrong or a number out of range.

    Examples:
        >>> import torch
        >>> tokens, links = torch.tensor([10, 10]), torch.tensor([1, 4])
        >>> most_bytes(tokens, links, max_experts=2, width=8, bytes_per_value=2)
        1920
    """
    check_shape("num_tokens", num_tokens, (None,))
    check_shape("open_links", open_links, num_tokens.shape)
    for name, tensor in (("num_tokens", num_tokens), ("open_links", open_links)):
        check_not_negative(name, tensor.min().item() if tensor.numel() else 0.0)
    for name, value in (
        ("max_experts", max_experts),
        ("width", width),
        ("bytes_per_value", bytes_per_value),
        ("num_transfers", num_transfers),
    ):
        check_positive(name, value)
    assignments = int((num_tokens * open_links.clamp_max(max_experts)).sum())
    return num_transfers * assignments * width * bytes_per_value


def most_open_links(*, slope: float, mapping: float, penalty: float) -> float:
    r"""Bounds how many groups a proximal step leaves open (theory.md 7.6).

    ``((|h| + |G|) / omega)^2``: with ``x+ = prox(x - alpha h)`` for ``sum_g omega_g |x_g|``, and
    ``G = (x - x+) / alpha``, which is 0 at a stationary point.

    Args:
        slope: ``|h|``, norm of the hypergradient in the gates.
        mapping: ``|G|``.
        penalty: ``omega > 0``, the least ``omega_g`` of the groups.

    Raises:
        ValueError: If a number is out of range.

    Examples:
        >>> most_open_links(slope=2.0, mapping=0.0, penalty=0.5)
        16.0
    """
    check_not_negative("slope", slope)
    check_not_negative("mapping", mapping)
    check_positive("penalty", penalty)
    return ((slope + mapping) / penalty) ** 2
