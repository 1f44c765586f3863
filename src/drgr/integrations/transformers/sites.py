"""Where a transformers model routes: every MoE block, its router and its experts."""

from dataclasses import dataclass
from typing import Any

from torch import nn

from drgr.errors import UnknownRouterError

_ROUTER_ATTRIBUTES = ("gate", "router")
# Left on experts by the decorator that lets transformers exchange their implementation.
_DISPATCH_MARKS = ("config", "has_gate", "has_bias", "is_transposed")


@dataclass(frozen=True, slots=True, kw_only=True)
class MoeSite:
    """One MoE block of a model.

    Attributes:
        name: Dotted name of the block.
        router: The module that returns the routing triple.
        experts: The module that computes the experts.
        num_experts: Number of experts ``E``.
    """

    name: str
    router: nn.Module
    experts: Any
    num_experts: int

    @property
    def width(self) -> int:
        """Width ``D`` of a token's vector."""
        return self.router.get_parameter("weight").shape[1]


def find_sites(model: nn.Module) -> tuple[MoeSite, ...]:
    """Finds every MoE block, in the order of the model's modules.

    A block is any module with ``experts`` that transformers can dispatch (its decorator leaves a
    mark) and a router named ``gate`` or ``router``.

    Raises:
        UnknownRouterError: If there is none, a block has no router, or its experts are spread over
            processes by transformers' own expert parallelism.
    """
    sites = []
    for name, block in model.named_modules():
        experts = getattr(block, "experts", None)
        if isinstance(experts, nn.Module) and all(hasattr(experts, key) for key in _DISPATCH_MARKS):
            sites.append(_site(name, block, experts))
    if not sites:
        raise UnknownRouterError(
            f"{type(model).__name__} has no MoE layer that can be attached to (a block with "
            f"`experts` and a `gate` or `router`); use an MoE model such as OLMoE or Qwen3-MoE"
        )
    return tuple(sites)


def _site(name: str, block: nn.Module, experts: Any) -> MoeSite:
    routers = [getattr(block, key) for key in _ROUTER_ATTRIBUTES if hasattr(block, key)]
    if len(routers) != 1 or not isinstance(routers[0], nn.Module):
        raise UnknownRouterError(
            f"{name} ({type(block).__name__}) has experts but not exactly one router named "
            f"{' or '.join(_ROUTER_ATTRIBUTES)}; its routing cannot be attached to"
        )
    router = routers[0]
    # Each process then holds some of the experts only, and counts those.
    is_local = getattr(router, "num_experts", experts.num_experts) != experts.num_experts
    if is_local or getattr(experts, "_is_expert_parallel", False):
        raise UnknownRouterError(
            f"{name}: its experts are spread over processes by expert parallelism, which this "
            f"version does not support; load the model with data parallelism only"
        )
    return MoeSite(name=name, router=router, experts=experts, num_experts=experts.num_experts)
