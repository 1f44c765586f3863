r"""Gates of the links between sources and experts: weights that can close a link for good.

Each layer has one gate for each link (source, expert). A gate above 0 scales what the expert gives
to tokens of that source, :math:`\pi_{te} \leftarrow g_{r(t) e}\, \pi_{te}`; a gate of exactly 0
takes the link out of the plan: those tokens cannot select the expert, so they neither travel to it
nor send it a gradient. Which experts are selected depends on which links are open, and on nothing
else of the gates, so that a loss is differentiable in them.

Weights that a router normalises are not normalised again after gating: a common factor on all gates
of a source would otherwise change nothing but the penalty on them, and the gate of a token's only
expert would have no gradient. They are normalised over the experts that were selected, which a
closed link is not.

A source with fewer open links than the budget's minimum gives its tokens what is open; their unused
assignments go to tokens that can use them, or are not spent.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal, final

import torch
from torch import Tensor

from drgr._checks import check_positive, check_shape
from drgr.numerics import block_soft_threshold, soft_threshold

GateGroup = Literal["link", "source", "expert"]
"""What is closed together: single links, all links of a source, or all links to an expert."""


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class LayerGates:
    """The gates of one layer as a forward pass sees them.

    Attributes:
        values: Gates, shape ``(G, E)``, with gradient.
        is_open: Which links may be used, bool, shape ``(G, E)``.
    """

    values: Tensor
    is_open: Tensor

    def usable(self, source: Tensor | None) -> Tensor:
        """Returns which experts tokens may select, bool, shape ``(T, E)``.

        Args:
            source: Source of each token, int64, shape ``(T,)``. Where it is not known (``None``),
                a link that is open for any source may be used; the shape is then ``(1, E)``.
        """
        if source is None:
            return self.is_open.any(dim=0, keepdim=True)
        return self.is_open[source]

    def scale(self, weights: Tensor, expert_ids: Tensor, source: Tensor | None) -> Tensor:
        """Multiplies combine weights ``(T, K)`` by the gates of their links.

        Args:
            weights: Combine weights.
            expert_ids: Their experts in ``[0, E)``, int64, shape ``(T, K)``.
            source: Source of each token; where it is not known, every gate is 1.
        """
        if source is None:
            return weights
        return weights * self.values[source.unsqueeze(1), expert_ids].to(weights.dtype)


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class GateStep:
    """A step of the gates that was computed and not yet taken.

    Attributes:
        values: Gates after the step, shape ``(L, G, E)``, not negative.
        is_open: Which links are open after it, bool, shape ``(L, G, E)``.
        closed: Links that it closes.
        kept: Links that it would have closed, had they not been the last of their source.
    """

    values: Tensor
    is_open: Tensor
    closed: Tensor
    kept: Tensor


def proximal_gates(
    values: Tensor,
    is_open: Tensor,
    point: Tensor,
    *,
    threshold: float | Tensor,
    group: GateGroup = "link",
) -> GateStep:
    r"""Shrinks groups of gates towards 0 and closes those that do not pay for themselves.

    The proximal map of a group norm on gates that are not negative,

    .. math:: \operatorname*{argmin}_{x \ge 0}\ \tfrac12 \|x - v\|_2^2 + \sum_b t_b \|x_b\|_2 ,

    which is the soft threshold of :math:`\max(v, 0)` in blocks. Links that are closed stay closed.
    A source keeps at least one link of each layer: where all of its links would close, the one
    with the largest ``v`` stays, at ``v`` if that is above 0, else where it was.

    Args:
        values: Gates now, shape ``(L, G, E)``.
        is_open: Which links are open now, bool, shape ``(L, G, E)``.
        point: Where the step starts, ``v``, for instance gates less step size times gradient,
            shape ``(L, G, E)``; its entries at closed links are ignored.
        threshold: Thresholds ``t >= 0`` (step size times weight), a number or a tensor that
            broadcasts to ``(L, G, E)``, with size 1 in the dimension of a group.
        group: What a block holds: a single link, the links of a source ``(E,)`` or those to an
            expert ``(G,)``.

    Returns:
        The step. Nothing is changed.

    Raises:
        ValueError: If shapes do not fit, ``threshold`` is negative, or ``point`` is not finite.

    Complexity:
        O(L G E).
    """
    check_shape("is_open", is_open, tuple(values.shape))
    check_shape("point", point, tuple(values.shape))
    values, start = values.detach(), torch.where(is_open, point.detach(), 0.0)
    if group == "link":
        moved = soft_threshold(start.clamp_min(0), threshold=threshold)
    else:
        dim = 2 if group == "source" else 1
        moved = block_soft_threshold(start.clamp_min(0), threshold=threshold, dim=dim)
    survives = moved > 0
    is_last = ~survives.any(dim=2, keepdim=True)
    best = torch.where(is_open, start, -torch.inf).argmax(dim=2, keepdim=True)
    kept = torch.zeros_like(is_open).scatter_(2, best, is_last)
    moved = torch.where(kept, torch.where(start > 0, start, values), moved)
    after = survives | kept
    return GateStep(
        values=moved.to(values.dtype), is_open=after, closed=is_open & ~after, kept=kept
    )


@final
class LinkGates:
    """The gates of every layer, all 1 to begin with, and which links are open.

    Gates change by :meth:`take` and links by it, :meth:`close` and :meth:`reopen` only: a closed
    link is never opened by the way.

    Args:
        num_layers: Number of layers ``L``.
        num_sources: Number of sources ``G``.
        num_experts: Number of experts ``E`` of a layer.
        device: Where they live.
    """

    def __init__(
        self,
        *,
        num_layers: int,
        num_sources: int,
        num_experts: int,
        device: torch.device | None = None,
    ) -> None:
        shape = (num_layers, num_sources, num_experts)
        if min(shape) < 1:
            raise ValueError(f"link gates need at least one layer, source and expert, got {shape}")
        self._values = torch.ones(shape, device=device, requires_grad=True)
        self._current = self._values
        self._is_open = torch.ones(shape, dtype=torch.bool, device=device)

    @property
    def values(self) -> Tensor:
        """Gates, shape ``(L, G, E)``, float32: a leaf that requires a gradient."""
        return self._current

    @property
    def is_open(self) -> Tensor:
        """Which links are open, bool, shape ``(L, G, E)``; never one whose gate is exactly 0."""
        return self._is_open & (self._current.detach() != 0)

    def layer(self, number: int) -> LayerGates:
        """Returns the gates of one layer."""
        values = self._current[number]
        is_open = self._is_open[number] & (values.detach() != 0)
        return LayerGates(values=values, is_open=is_open)

    @contextmanager
    def replaced(self, values: Tensor) -> Iterator[None]:
        """Uses other gates for the forward passes inside, as finite differences need.

        Raises:
            ValueError: If the shape differs.
        """
        check_shape("values", values, tuple(self._values.shape))
        previous, self._current = self._current, values
        try:
            yield
        finally:
            self._current = previous

    def propose(
        self, point: Tensor, *, threshold: float | Tensor, group: GateGroup = "link"
    ) -> GateStep:
        """Returns the step of :func:`proximal_gates` from here, without taking it."""
        return proximal_gates(self._values, self.is_open, point, threshold=threshold, group=group)

    def take(self, step: GateStep) -> None:
        """Moves to the gates of a step.

        Raises:
            ValueError: If it would open a link, or leave a source without one: then it was computed
                from other gates.
        """
        check_shape("step.values", step.values, tuple(self._values.shape))
        if bool((step.is_open & ~self.is_open).any()):
            raise ValueError(
                "a step must not open links that are closed; compute it from the gates as they "
                "are now, or reopen links by reopen"
            )
        self._set(step.values, step.is_open & (step.values != 0))

    def close(self, links: Tensor) -> None:
        """Closes links, bool, shape ``(L, G, E)``.

        Raises:
            ValueError: If a source would be left without an open link; nothing is changed.
        """
        check_shape("links", links, tuple(self._values.shape))
        self._set(self._values.detach(), self.is_open & ~links)

    def reopen(self, links: Tensor, *, value: float = 1.0) -> None:
        """Opens closed links, bool, shape ``(L, G, E)``, at the gate ``value``, above 0.

        Raises:
            ValueError: If ``value`` is not a finite number above 0, or the shape differs.
        """
        check_shape("links", links, tuple(self._values.shape))
        check_positive("value", value)
        reopened = links & ~self.is_open
        self._set(torch.where(reopened, value, self._values.detach()), self.is_open | reopened)

    def state_dict(self, number: int) -> dict[str, Tensor]:
        """Returns the state of one layer."""
        return {
            "values": self._values.detach()[number].clone(),
            "is_open": self.is_open[number].clone(),
        }

    def load_state_dict(self, number: int, state: Mapping[str, Tensor]) -> None:
        """Restores :meth:`state_dict` of one layer.

        Raises:
            ValueError: If the numbers of sources or experts differ.
        """
        for name in ("values", "is_open"):
            check_shape(f"link gates {name}", state[name], tuple(self._values.shape[1:]))
        with torch.no_grad():
            self._values[number] = state["values"].to(self._values)
            self._is_open[number] = state["is_open"].to(self._is_open)

    def _set(self, values: Tensor, is_open: Tensor) -> None:
        lonely = (~is_open.any(dim=2)).nonzero()
        if len(lonely) > 0:
            layer, source = lonely[0].tolist()
            raise ValueError(
                f"every source must keep an open link in every layer, got none for source "
                f"{source} in layer {layer}; leave its best one open"
            )
        with torch.no_grad():
            self._values.copy_(torch.where(is_open, values.to(self._values), 0.0))
            self._is_open.copy_(is_open)
