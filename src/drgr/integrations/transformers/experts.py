"""Expert computation that pays only for the assignments that run.

A candidate that is not kept carries the id ``num_experts``. transformers' own grouped path reads
uninitialised memory for such ids unless a private flag is set, so this path removes them before any
matrix product, and :func:`check_skipping` compares it with the eager reference when it is attached.
"""

from dataclasses import dataclass
from typing import Any, final

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from drgr.errors import UnknownRouterError

IMPLEMENTATION = "drgr"
"""Name under which transformers finds :func:`sparse_experts_forward`."""

_NUM_TRIAL_TOKENS = 16


@final
@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ExpertActivations:
    """What the experts of one block computed inside, before their down-projections.

    Attributes:
        rows: One row for each assignment that ran, ordered by expert, shape ``(N, D)``, with
            gradient.
        order: The candidate that each row is of, ``t K + k``, shape ``(N,)``.
        num_tokens: Number of tokens ``T``.
        top_k: Candidates ``K`` of a token.
    """

    rows: Tensor
    order: Tensor
    num_tokens: int
    top_k: int

    def by_token(self) -> Tensor:
        """Returns the activations of each token's candidates, ``(T, K, D)``; 0 for skipped ones."""
        width = self.rows.shape[1]
        empty = self.rows.new_zeros(self.num_tokens * self.top_k, width)
        return empty.index_copy(0, self.order, self.rows).view(self.num_tokens, self.top_k, width)


def register() -> None:
    """Makes the implementation known to transformers; calling it again changes nothing."""
    ALL_EXPERTS_FUNCTIONS.register(IMPLEMENTATION, sparse_experts_forward)


def sparse_experts_forward(
    experts: Any,
    hidden_states: Tensor,
    top_k_index: Tensor,
    top_k_weights: Tensor,
) -> Tensor:
    """Computes ``y_t = sum_k w_tk expert_{i_tk}(x_t)`` over the candidates with a real expert id.

    Args:
        experts: A module decorated by transformers' ``use_experts_implementation``. A callable
            ``watch_activations`` on it is shown the :class:`ExpertActivations`.
        hidden_states: Tokens, shape ``(T, D)``.
        top_k_index: Expert ids, shape ``(T, K)``; ``num_experts`` marks a candidate that is
            skipped.
        top_k_weights: Combine weights, shape ``(T, K)``.

    Returns:
        Shape ``(T, D)``, dtype of ``hidden_states``. A token without experts gives zeros.

    Gradients:
        Equal to those with the skipped candidates computed and weighted by zero.

    Complexity:
        Memory and time in the number of candidates kept. Group sizes are read by the host, once.
    """
    num_experts, top_k = experts.num_experts, top_k_index.shape[1]
    flat = top_k_index.reshape(-1)
    order = flat.argsort(stable=True)
    sizes: list[int] = torch.bincount(flat, minlength=num_experts + 1)[:num_experts].tolist()
    order = order[: sum(sizes)]
    token = order // top_k

    rows = hidden_states.index_select(0, token)
    bias = _Biases(experts, flat[order]) if experts.has_bias else None
    if experts.has_gate:
        up = _linear(rows, experts.gate_up_proj, sizes, transposed=experts.is_transposed)
        inner = experts._apply_gate(up if bias is None else up + bias("gate_up_proj_bias"))
    else:
        up = _linear(rows, experts.up_proj, sizes, transposed=experts.is_transposed)
        inner = experts.act_fn(up if bias is None else up + bias("up_proj_bias"))
    watch = getattr(experts, "watch_activations", None)
    if watch is not None:
        watch(
            ExpertActivations(
                rows=inner, order=order, num_tokens=flat.numel() // top_k, top_k=top_k
            )
        )
    out = _linear(inner, experts.down_proj, sizes, transposed=experts.is_transposed)
    if bias is not None:
        out = out + bias("down_proj_bias")
    if getattr(experts, "has_post_expert_norm", False):
        out = experts.post_expert_norm(out)
    weighted = out * top_k_weights.reshape(-1).index_select(0, order).unsqueeze(1)
    result = torch.zeros_like(hidden_states, dtype=weighted.dtype)
    return result.index_add(0, token, weighted).to(hidden_states.dtype)


class _Biases:
    """Gathers the bias row of each assignment's expert."""

    def __init__(self, experts: nn.Module, expert_of_row: Tensor) -> None:
        self._experts = experts
        self._expert_of_row = expert_of_row

    def __call__(self, name: str) -> Tensor:
        return self._experts.get_parameter(name).index_select(0, self._expert_of_row)


def _linear(rows: Tensor, weight: Tensor, sizes: list[int], *, transposed: bool) -> Tensor:
    """Applies ``weight[e]`` to the ``sizes[e]`` consecutive rows of expert ``e``.

    ``weight`` is ``(E, out, in)``, or ``(E, in, out)`` where ``transposed``. On a GPU it is one
    grouped product; elsewhere one product per expert, which is as fast there and knows every dtype.
    """
    if rows.is_cuda and weight.dtype in (torch.bfloat16, torch.float16, torch.float32):
        return _grouped_linear(rows, weight if transposed else weight.transpose(1, 2), sizes)
    parts = []
    # unbind, not weight[e]: its backward builds one stacked gradient instead of E dense ones.
    for part, expert in zip(rows.split(sizes), weight.unbind(0), strict=True):
        parts.append(part @ expert if transposed else F.linear(part, expert))
    return torch.cat(parts)


def _grouped_linear(rows: Tensor, weight: Tensor, sizes: list[int]) -> Tensor:
    """Multiplies rows ``(S, in)`` with weights ``(E, in, out)`` in one grouped product.

    Autocast is applied here because PyTorch's operator ignores it.
    """
    if torch.is_autocast_enabled(rows.device.type):
        dtype = torch.get_autocast_dtype(rows.device.type)
        rows, weight = rows.to(dtype), weight.to(dtype)
    offsets = torch.tensor(sizes, device=rows.device).cumsum(0, dtype=torch.int32)
    return F.grouped_mm(rows.to(weight.dtype), weight, offs=offsets)


def check_skipping(experts: Any, name: str, *, implementation: str = IMPLEMENTATION) -> None:
    """Compares skipped candidates with candidates of weight zero, in outputs and all gradients.

    The reference is the model's own eager code. The module is left as it was.

    Args:
        experts: The experts module of one MoE block.
        name: Its dotted name, for messages.
        implementation: Name of the registered computation that skips.

    Raises:
        UnknownRouterError: If any output or gradient differs beyond rounding.
    """
    weight = experts.down_proj
    width = weight.shape[2] if experts.is_transposed else weight.shape[1]
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(_NUM_TRIAL_TOKENS, width, generator=generator)
    hidden = hidden.to(weight.device, weight.dtype).requires_grad_()
    top_k = min(3, experts.num_experts)
    expert_ids = torch.rand(_NUM_TRIAL_TOKENS, experts.num_experts, generator=generator)
    expert_ids = expert_ids.argsort(dim=1)[:, :top_k].to(weight.device)
    keep = (torch.rand(expert_ids.shape, generator=generator) < 0.6).to(weight.device)
    weights = torch.rand(expert_ids.shape, generator=generator).to(weight.device, weight.dtype)
    weights = (weights * keep).requires_grad_()

    skipped = expert_ids.masked_fill(~keep, experts.num_experts)
    ours = _output_and_gradients(experts, implementation, hidden, skipped, weights)
    reference = _output_and_gradients(experts, "eager", hidden, expert_ids, weights)
    # A skipped candidate sends no gradient to its weight; a zero-weight one does, and the router
    # discards it, so only kept entries are compared.
    ours["weights"], reference["weights"] = ours["weights"] * keep, reference["weights"] * keep
    tolerance = {torch.float64: 1e-9, torch.float32: 1e-4}.get(weight.dtype, 5e-2)
    for key, expected in reference.items():
        scale = float(expected.detach().abs().max()) or 1.0
        error = float((ours[key] - expected).detach().abs().max()) / scale
        if not error <= tolerance:
            raise UnknownRouterError(
                f"{name}: skipping experts must equal giving them weight 0, but {key} differs by "
                f"{error:.2e} of its largest entry (limit {tolerance:.0e}); "
                f"{type(experts).__name__} has a layout that this version does not support"
            )


def _output_and_gradients(
    experts: Any, implementation: str, hidden: Tensor, expert_ids: Tensor, weights: Tensor
) -> dict[str, Tensor]:
    """Runs one implementation and returns its output and the gradients of every input."""
    previous = experts.config._experts_implementation
    experts.config._experts_implementation = implementation
    try:
        with torch.enable_grad():
            output = experts(hidden, expert_ids, weights)
            names = ["hidden_states", "weights"]
            inputs = [hidden, weights]
            for key, parameter in experts.named_parameters():
                if parameter.requires_grad:
                    names.append(key)
                    inputs.append(parameter)
            target = output.float().square().sum()
            gradients = torch.autograd.grad(target, inputs, materialize_grads=True)
    finally:
        experts.config._experts_implementation = previous
    return {"output": output.detach(), **dict(zip(names, gradients, strict=True))}
