r"""Gated experts computed in groups: tokens sorted by expert, one product for each expert.

Expert by expert, rows are gathered, multiplied, weighted and added to where they belong, so that
what one expert needs stays in the cache. Nothing as large as all assignments by the width of a
token is ever held. The weight is applied to the inner vector, which gives its own gradient in the
backward pass without the output:

.. math:: \frac{\partial L}{\partial w_{tk}} = \langle D_e^\top \partial L / \partial y_t,\,
          h_{tk} \rangle, \qquad h_{tk} = \operatorname{silu}(G_e x_t) \odot U_e x_t .
"""

from dataclasses import dataclass
from functools import partial
from typing import Any, final

import torch
import torch.nn.functional as F
from torch import Tensor

from drgr.routing import RoutingPlan

_GROUPED_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
# Strides that the grouped product accepts are multiples of this.
_ALIGNMENT_BYTES = 16


# Group sizes are data: traced, they would be constants, and every batch would compile anew.
@torch.compiler.disable  # type: ignore[untyped-decorator]
def grouped_experts(hidden: Tensor, plan: RoutingPlan, gate_up: Tensor, down: Tensor) -> Tensor:
    """Computes what :func:`reference_experts` does, paying only for what is kept.

    On a GPU it is two grouped products, elsewhere two products for each expert.

    Args:
        hidden: Tokens, shape ``(T, D)``.
        plan: Expert ids in ``[0, E)``, weights and ``keep`` of ``K`` candidates for each token.
            What is not kept is not read.
        gate_up: Gate matrices above up matrices, shape ``(E, 2I, D)``.
        down: Down matrices, shape ``(E, D, I)``.

    Returns:
        Shape ``(T, D)``, dtype of ``hidden``; zeros for a token without experts.

    Raises:
        ValueError: If a candidate that is kept names no expert.

    Gradients:
        Of any order in reverse mode, through ``torch.func.grad`` too; second derivatives cost the
        memory of a plain computation. For forward mode take the reference.

    Numerics:
        Any floating-point dtype, or that of autocast; sums over experts in float32 at least. On
        the CPU results are the same in every run; on a GPU additions may change their order.

    Compilation:
        Left out of a graph of ``torch.compile``, which breaks in two here.

    Complexity:
        Time in the number ``S`` of candidates kept. Keeps ``S`` rows of ``2I`` for the backward
        pass. Group sizes are read by the host, once.
    """
    groups, order = _grouped_by_expert(plan, gate_up.shape[0])
    weights = plan.combine_weights.reshape(-1).index_select(0, order)
    dtype, device = hidden.dtype, hidden.device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
    rows, weights, gate_up, down = (part.to(dtype) for part in (hidden, weights, gate_up, down))
    with torch.autocast(device, enabled=False):
        if _has_grouped_product(gate_up) and _has_grouped_product(down):
            output = _composed(rows, weights, gate_up, down, groups=groups)
        else:
            output, _ = _Grouped.apply(rows, weights, gate_up, down, groups)  # type: ignore[no-untyped-call]
    return output.to(hidden.dtype)


@final
@dataclass(frozen=True, slots=True)
class _Groups:
    """Assignments sorted by expert: the token of each, int64, shape ``(S,)``, and group sizes."""

    token: Tensor
    sizes: list[int]

    def split(self, *rows: Tensor) -> list[tuple[Tensor, ...]]:
        """Splits tensors with a row for each assignment into the parts of the experts."""
        return [part.split(self.sizes) for part in rows]


def _grouped_by_expert(plan: RoutingPlan, num_experts: int) -> tuple[_Groups, Tensor]:
    """Returns the groups, and the place of each assignment in the flat plan, shape ``(S,)``."""
    flat = plan.expert_ids.masked_fill(~plan.keep, num_experts).reshape(-1)
    counts: list[int] = torch.bincount(flat, minlength=num_experts + 1).tolist()
    if len(counts) > num_experts + 1:
        raise ValueError(
            f"expert_ids must lie below the number of experts, got {len(counts) - 1} for "
            f"{num_experts} experts; pass the plan of a router with as many experts"
        )
    sizes = counts[:num_experts]
    order = flat.argsort(stable=True)[: sum(sizes)]
    token = torch.div(order, plan.keep.shape[1], rounding_mode="floor")
    return _Groups(token, sizes), order


def _has_grouped_product(weight: Tensor) -> bool:
    """Whether ``F.grouped_mm`` takes the weight and is the faster choice, which it is on a GPU."""
    widths = weight.shape[1:]
    is_aligned = all(width * weight.dtype.itemsize % _ALIGNMENT_BYTES == 0 for width in widths)
    return weight.is_cuda and weight.dtype in _GROUPED_DTYPES and is_aligned


def _composed(
    hidden: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor, *, groups: _Groups
) -> Tensor:
    """Composes the grouped computation of operators that autograd knows."""
    rows = hidden.index_select(0, groups.token)
    gate, up = _linear(rows, gate_up, groups.sizes).chunk(2, dim=1)
    inner = F.silu(gate) * up * weights.unsqueeze(1)
    output = _linear(inner, down, groups.sizes).to(_sum_dtype(hidden))
    total = torch.zeros_like(hidden, dtype=output.dtype).index_add(0, groups.token, output)
    return total.to(hidden.dtype)


def _linear(rows: Tensor, weight: Tensor, sizes: list[int]) -> Tensor:
    """Applies ``weight[e]``, shape ``(out, in)``, to the ``sizes[e]`` rows of expert ``e``."""
    if _has_grouped_product(weight):
        offsets = torch.tensor(sizes, device=rows.device).cumsum(0, dtype=torch.int32)
        return F.grouped_mm(rows, weight.transpose(1, 2), offs=offsets)
    # unbind, not weight[e]: its backward builds one stacked gradient instead of E dense ones.
    parts = zip(rows.split(sizes), weight.unbind(0), strict=True)
    return torch.cat([F.linear(part, matrix) for part, matrix in parts])


def _sum_dtype(hidden: Tensor) -> torch.dtype:
    return torch.promote_types(hidden.dtype, torch.float32)


class _Grouped(torch.autograd.Function):
    """The grouped computation expert by expert, with the backward pass written out."""

    @staticmethod
    def forward(
        hidden: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor, groups: _Groups
    ) -> tuple[Tensor, Tensor]:
        """Returns the output and, for the backward pass, the products with ``gate_up``."""
        width = down.shape[2]
        total = torch.zeros_like(hidden, dtype=_sum_dtype(hidden))
        products = hidden.new_empty(groups.token.shape[0], 2 * width)
        for mine, weight, product, inner_matrix, outer_matrix in zip(
            *groups.split(groups.token, weights.unsqueeze(1), products),
            *(gate_up.unbind(0), down.unbind(0)),
            strict=True,
        ):
            torch.mm(hidden.index_select(0, mine), inner_matrix.t(), out=product)
            gate, up = product.chunk(2, dim=1)
            inner = F.silu(gate).mul_(up).mul_(weight)
            output = torch.mm(inner, outer_matrix.t())
            total.index_add_(0, mine, output.to(total.dtype))
        return total.to(hidden.dtype), products

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        """Keeps the arguments and the products."""
        *arguments, groups = inputs
        ctx.groups = groups
        ctx.mark_non_differentiable(output[1])
        # Else zeros of the size of the products would be made for a gradient they do not have.
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*arguments, output[1])

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor | None, ...]:
        """Returns the gradients of tokens, weights and matrices."""
        gradient: Tensor | None = gradients[0]
        if gradient is None:
            return None, None, None, None, None
        *arguments, products = ctx.saved_tensors
        groups: _Groups = ctx.groups
        with torch.autocast(gradient.device.type, enabled=False):
            if torch.is_grad_enabled():
                pull_back = torch.func.vjp(partial(_composed, groups=groups), *arguments)[1]
                return (*pull_back(gradient), None)
            needed = ctx.needs_input_grad[:4]
            return (*_gradients(gradient, arguments, products, groups, needed), None)


def _gradients(
    gradient: Tensor,
    arguments: list[Tensor],
    products: Tensor,
    groups: _Groups,
    needed: tuple[bool, ...],
) -> tuple[Tensor | None, ...]:
    """Returns the gradients of the first four arguments of the forward pass, if needed."""
    hidden, weights, gate_up, down = arguments
    into_hidden = torch.zeros_like(hidden, dtype=_sum_dtype(hidden)) if needed[0] else None
    into_weights = torch.empty_like(weights)
    # Each matrix is written once, also that of an expert without tokens: a product of no rows is 0.
    into_gate_up = torch.empty_like(gate_up) if needed[2] else None
    into_down = torch.empty_like(down) if needed[3] else None
    parts = groups.split(groups.token, weights.unsqueeze(1), products, into_weights)
    for expert, (mine, weight, product, into_weight) in enumerate(zip(*parts, strict=True)):
        gate, up = product.chunk(2, dim=1)
        activated = F.silu(gate)
        inner = activated * up
        into_output = gradient.index_select(0, mine)
        into_inner = torch.mm(into_output, down[expert])
        torch.linalg.vecdot(into_inner, inner, out=into_weight)
        into_inner.mul_(weight)
        if into_down is not None:
            torch.mm(into_output.t(), inner.mul_(weight), out=into_down[expert])
        into_product = torch.empty_like(product)
        into_gate, into_up = into_product.chunk(2, dim=1)
        torch.mul(into_inner, activated, out=into_up)
        into_inner.mul_(up)
        torch.ops.aten.silu_backward.grad_input(into_inner, gate, grad_input=into_gate)
        if into_gate_up is not None:
            rows = hidden.index_select(0, mine)
            torch.mm(into_product.t(), rows, out=into_gate_up[expert])
        if into_hidden is not None:
            into_rows = torch.mm(into_product, gate_up[expert])
            into_hidden.index_add_(0, mine, into_rows.to(into_hidden.dtype))
    if into_hidden is not None:
        into_hidden = into_hidden.to(hidden.dtype)
    return into_hidden, into_weights, into_gate_up, into_down
