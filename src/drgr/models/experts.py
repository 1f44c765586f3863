"""Gated experts as modules: the routed ones of a layer, and one that every token passes through."""

import math
from collections.abc import Callable
from typing import final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from drgr._checks import check_positive, check_shape
from drgr.models.grouped import grouped_experts
from drgr.routing import RoutingPlan

ExpertsFunction = Callable[[Tensor, RoutingPlan, Tensor, Tensor], Tensor]
"""Computes ``(hidden, plan, gate_up, down) -> (T, D)``, see :func:`reference_experts`."""


@final
class GatedExperts(nn.Module):
    """The routed experts of a layer, gated MLPs of one size without biases.

    Weights begin uniform in ``+-1 / sqrt(fan_in)``, as those of ``nn.Linear``.

    Args:
        num_experts: Number of experts ``E``.
        width: Width ``D`` of a token's vector.
        expert_width: Inner width ``I`` of an expert.
        compute: How they are computed: :func:`grouped_experts`, or :func:`reference_experts`.
        dtype: Dtype of the weights; the default one where it is ``None``.
        device: Where the weights live.

    Attributes:
        gate_up: Gate matrices above up matrices, shape ``(E, 2I, D)``.
        down: Down matrices, shape ``(E, D, I)``.

    Raises:
        ValueError: If a size is not positive.
    """

    def __init__(
        self,
        num_experts: int,
        *,
        width: int,
        expert_width: int,
        compute: ExpertsFunction = grouped_experts,
        dtype: torch.dtype | None = None,
        device: torch.device | None = None,
    ) -> None:
        super().__init__()
        sizes = {"num_experts": num_experts, "width": width, "expert_width": expert_width}
        for name, size in sizes.items():
            check_positive(name, size)
        gate_up = torch.empty(num_experts, 2 * expert_width, width, dtype=dtype, device=device)
        down = torch.empty(num_experts, width, expert_width, dtype=dtype, device=device)
        self.gate_up, self.down = nn.Parameter(gate_up), nn.Parameter(down)
        self._compute = compute
        self.reset_parameters()

    @property
    def num_experts(self) -> int:
        """Number of experts ``E``."""
        return self.gate_up.shape[0]

    @property
    def width(self) -> int:
        """Width ``D`` of a token's vector."""
        return self.gate_up.shape[2]

    def reset_parameters(self) -> None:
        """Draws all weights anew."""
        for weight in (self.gate_up, self.down):
            bound = 1 / math.sqrt(weight.shape[2])
            nn.init.uniform_(weight, -bound, bound)

    def check_tokens(self, hidden: Tensor) -> None:
        """Raises ``ValueError`` unless tokens ``(..., D)`` are of this width and dtype."""
        check_shape("hidden", hidden, (*hidden.shape[:-1], self.width))
        if hidden.dtype != self.down.dtype and not torch.is_autocast_enabled(hidden.device.type):
            raise ValueError(
                f"hidden must have the dtype of the experts, got {hidden.dtype} for "
                f"{self.down.dtype}; convert one of them, or use torch.autocast"
            )

    def forward(self, hidden: Tensor, plan: RoutingPlan) -> Tensor:
        """Adds up the weighted outputs of each token's experts.

        Args:
            hidden: Tokens, shape ``(T, D)``.
            plan: Who processes them.

        Returns:
            Shape ``(T, D)``, dtype of ``hidden``; zeros for a token without experts.

        Raises:
            ValueError: If ``hidden`` or the plan is of another shape, or ``hidden`` has not the
                dtype of the experts and there is no autocast.
        """
        self.check_tokens(hidden)
        check_shape("hidden", hidden, (None, None))
        check_shape("plan.expert_ids", plan.expert_ids, (hidden.shape[0], None))
        for name in ("keep", "combine_weights"):
            check_shape(f"plan.{name}", getattr(plan, name), plan.expert_ids.shape)
        return self._compute(hidden, plan, self.gate_up, self.down)


@final
class SharedExpert(nn.Module):
    r"""A gated MLP for every token, beside the routed experts.

    .. math:: g(x)\, D \big(\operatorname{silu}(G x) \odot U x\big), \qquad
              g(x) = \operatorname{sigmoid}(v \cdot x) \text{ or } 1 .

    Several shared experts are one of their widths together.

    Args:
        width: Width ``D`` of a token's vector.
        expert_width: Inner width ``I``.
        has_gate: Whether there is a gate ``g`` (Qwen2-MoE) or none (DeepSeekMoE).
        dtype: Dtype of the weights; the default one where it is ``None``.
        device: Where the weights live.

    References:
        Dai et al., *DeepSeekMoE*, arXiv 2401.06066; Qwen Team, *Qwen2 Technical Report*,
        arXiv 2407.10671.
    """

    def __init__(
        self,
        width: int,
        expert_width: int,
        *,
        has_gate: bool = False,
        dtype: torch.dtype | None = None,
        device: torch.device | None = None,
    ) -> None:
        super().__init__()
        for name, size in {"width": width, "expert_width": expert_width}.items():
            check_positive(name, size)
        place = {"dtype": dtype, "device": device}
        self.gate_up = nn.Linear(width, 2 * expert_width, bias=False, **place)
        self.down = nn.Linear(expert_width, width, bias=False, **place)
        self.gate = nn.Linear(width, 1, bias=False, **place) if has_gate else None

    def forward(self, hidden: Tensor) -> Tensor:
        """Maps tokens, shape ``(..., D)``, to outputs of the same shape and dtype."""
        gate, up = self.gate_up(hidden).chunk(2, dim=-1)
        output: Tensor = self.down(F.silu(gate) * up)
        if self.gate is not None:
            output = output * self.gate(hidden).sigmoid()
        return output.to(hidden.dtype)
