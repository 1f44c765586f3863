"""A transformers MoE model with routing policies attached. Made by ``attach`` in attaching.py."""

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from pathlib import Path
from typing import Any, final

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from drgr._checks import check_shape
from drgr.integrations.transformers.attached_layer import AttachedLayer, replayed
from drgr.integrations.transformers.expert_gates import expert_gates
from drgr.integrations.transformers.experts import IMPLEMENTATION, ExpertActivations
from drgr.integrations.transformers.padding import padding_mask
from drgr.integrations.transformers.sources import (
    Source,
    check_source,
    sequence_length,
    token_sources,
)
from drgr.routing import LayerRouting, LinkGates, RoutingPolicy, TrafficMeter, tap_traffic

ROUTING_FILE = "routing.safetensors"
"""Name of the file that holds the routing state beside a saved model."""


@final
class Attachment:
    """A model whose MoE layers route inside a budget. Made by :func:`attach`.

    The model's parameters, ``state_dict`` keys, ``output_router_logits`` and ``save_pretrained``
    are untouched; the state of the routing is here, in :meth:`state_dict`.

    Attributes:
        model: The model.
        link_gates: Gates of the links between sources and experts; ``None`` without any.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: tuple[AttachedLayer, ...],
        link_gates: LinkGates | None = None,
        implementation: str = IMPLEMENTATION,
    ) -> None:
        self.model = model
        self.link_gates = link_gates
        self._layers = layers
        self._valid: Tensor | None = None
        self._sequence_length: int | None = None
        self._given_source: Source | None = None
        self._source: Tensor | None = None
        self._records: list[list[LayerRouting]] = []
        self._meters: list[tuple[TrafficMeter, ...]] = []
        # Read on every pass, since checkpointing may be switched on after attaching.
        self._checkpointed: list[Any] = [
            module for module in model.modules() if hasattr(module, "gradient_checkpointing")
        ]
        base = getattr(model, "base_model", model)
        self._handles: list[RemovableHandle] = [
            base.register_forward_pre_hook(self._read_call, with_kwargs=True)
        ]
        for number, layer in enumerate(layers):
            route, tap = partial(self._route, number), partial(self._tap, number)
            self._handles.append(layer.site.router.register_forward_hook(route))
            self._handles.append(layer.site.experts.register_forward_hook(tap))
        config = layers[0].site.experts.config
        self._previous_implementation = config._experts_implementation
        config._experts_implementation = implementation

    @property
    def layer_names(self) -> tuple[str, ...]:
        """Dotted names of the MoE blocks, in the model's order."""
        return tuple(layer.site.name for layer in self._layers)

    @property
    def policies(self) -> tuple[RoutingPolicy, ...]:
        """The routing policy of each layer."""
        return tuple(layer.policy for layer in self._layers)

    @property
    def num_experts(self) -> int:
        """Number of experts ``E`` of a layer."""
        return self._layers[0].site.num_experts

    @property
    def width(self) -> int:
        """Width ``D`` of a token's vector, as experts receive it."""
        return self._layers[0].site.width

    @property
    def router_weights(self) -> tuple[Tensor, ...]:
        """The router rows of each layer, shape ``(E, D)``."""
        return tuple(layer.site.router.get_parameter("weight") for layer in self._layers)

    def coupled_weights(self) -> list[tuple[Tensor, Tensor]]:
        """Returns the router rows of each layer and its experts' gate projections.

        Shapes ``(E, d)`` and ``(E, D, d)``; gradients reach the parameters of both.

        Raises:
            UnknownRouterError: If the experts have no gate projection that can be told.
        """
        gates = [expert_gates(layer.site.experts, layer.site.name) for layer in self._layers]
        return list(zip(self.router_weights, gates, strict=True))

    @property
    def open_links(self) -> Tensor | None:
        """Which links are open, bool, shape ``(L, G, E)``; ``None`` without link gates."""
        return None if self.link_gates is None else self.link_gates.is_open

    @contextmanager
    def from_source(self, source: Source) -> Iterator[None]:
        """Says where the tokens of the forward passes inside come from, a domain for instance.

        It determines which gates apply. A pass whose source is not known has every gate at 1 and
        may use each link that is open for any source.

        Args:
            source: One source for all tokens, or int64 tensors of one source a sequence, shape
                ``(B,)``, or a token, shape ``(B, S)``.

        Raises:
            TypeError: If it is neither.
            ValueError: If it has another number of dimensions; in the forward pass, if its shape is
                not that of the batch or a source is out of range.
        """
        check_source(source)
        previous, self._given_source = self._given_source, source
        try:
            yield
        finally:
            self._given_source = previous

    @contextmanager
    def record_traffic(self, *, num_sources: int, coefficient: float = 0.0) -> Iterator[Tensor]:
        """Yields a tensor that receives the gradient traffic of the forward passes inside.

        Their backward passes fill it, also after the end of the context. Forward passes must know
        their sources, see :meth:`from_source`. Padding has no traffic, and recomputation under
        gradient checkpointing adds none.

        Args:
            num_sources: Number of sources ``G``.
            coefficient: Coefficient of each layer's :func:`drgr.routing.traffic_penalty`; its
                gradient joins that of the combine weights.

        Returns:
            Zeros to begin with, shape ``(L, G, E)``, float64, see
            :func:`drgr.routing.gradient_traffic`.

        Raises:
            ValueError: If there are link gates of another number of sources.
        """
        device = next(self.model.parameters()).device
        shape = (len(self._layers), num_sources, self.num_experts)
        traffic = torch.zeros(shape, dtype=torch.float64, device=device)
        links = self.open_links
        if links is not None:
            check_shape("link gates", links, shape)
        meters = tuple(
            TrafficMeter(
                traffic=part,
                coefficient=coefficient,
                links=None if links is None else links[number],
            )
            for number, part in enumerate(traffic)
        )
        self._meters.append(meters)
        try:
            yield traffic
        finally:
            self._meters.remove(meters)

    @contextmanager
    def record(self) -> Iterator[list[LayerRouting]]:
        """Yields a list that receives one :class:`LayerRouting` a layer for each forward pass.

        Recomputation under gradient checkpointing adds nothing to it.
        """
        records: list[LayerRouting] = []
        self._records.append(records)
        try:
            yield records
        finally:
            self._records.remove(records)

    @contextmanager
    def record_activations(self) -> Iterator[list[ExpertActivations]]:
        """Yields a list that receives what experts compute inside, one entry a layer and pass.

        Recomputation under gradient checkpointing adds nothing to it. Do not nest it.
        """
        seen: list[ExpertActivations] = []

        def watch(activations: ExpertActivations) -> None:
            # Kept as it is: under checkpointing, any operation here would have to run again.
            if not _is_recomputed():
                seen.append(activations)

        for layer in self._layers:
            layer.site.experts.watch_activations = watch
        try:
            yield seen
        finally:
            for layer in self._layers:
                del layer.site.experts.watch_activations

    def replay(self, records: list[LayerRouting]) -> AbstractContextManager[None]:
        """Routes passes over the same batch as a recorded one; weights follow from new scores."""
        return replayed(self._layers, records)

    @property
    def needs_losses(self) -> bool:
        """Whether a scorer learns from the value of the loss, see :meth:`surrogates`."""
        return any(layer.needs_losses for layer in self._layers)

    def surrogates(self, records: list[LayerRouting], losses: Tensor) -> list[Tensor]:
        """Returns the surrogate loss of each layer whose scorer has one, to add to the loss.

        Args:
            records: Those of one training pass of this model.
            losses: See :meth:`drgr.routing.scores.Scorer.surrogate`.

        Raises:
            ValueError: If ``records`` are not those of one forward pass of this model.
        """
        self._check_records(records)
        pairs = zip(self._layers, records, strict=True)
        return [layer.surrogate(routing, losses) for layer, routing in pairs if layer.needs_losses]

    def observe(self, records: list[LayerRouting]) -> None:
        """Shows one training micro-batch to every layer's controller and batch price.

        Raises:
            ValueError: If ``records`` are not those of one forward pass of this model.
        """
        self._check_records(records)
        for layer, routing in zip(self._layers, records, strict=True):
            layer.observe(routing)

    def update(self) -> None:
        """Moves all prices; call once after each optimizer step."""
        for layer in self._layers:
            layer.update()

    def state_dict(self) -> dict[str, Any]:
        """Returns the prices of every layer, and its link gates, by the name of its block."""
        state: dict[str, Any] = {}
        for number, layer in enumerate(self._layers):
            state[layer.site.name] = layer.state_dict()
            if self.link_gates is not None:
                state[layer.site.name]["link_gates"] = self.link_gates.state_dict(number)
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores :meth:`state_dict`.

        Raises:
            ValueError: If the layers differ, or only one of the two has link gates, or the state
                is that of another kind of controller, selector or scorer.
        """
        if set(state) != set(self.layer_names):
            raise ValueError(
                f"routing state must have the layers {sorted(self.layer_names)}, got "
                f"{sorted(state)}; it belongs to another model"
            )
        for number, layer in enumerate(self._layers):
            parts = state[layer.site.name]
            if ("link_gates" in parts) != (self.link_gates is not None):
                raise ValueError(
                    f"routing state of {layer.site.name} has "
                    f"{'' if self.link_gates is None else 'no '}link gates, but the model was "
                    f"attached with{'out' if self.link_gates is None else ''} them; attach alike"
                )
            layer.load_state_dict(parts)
            if self.link_gates is not None:
                self.link_gates.load_state_dict(number, parts["link_gates"])

    def save(self, directory: Path) -> None:
        """Writes the routing state as ``routing.safetensors``, beside a saved model."""
        flat = {
            f"{layer}/{part}/{name}": tensor.cpu()
            for layer, parts in self.state_dict().items()
            for part, state in parts.items()
            for name, tensor in state.items()
        }
        save_file(flat, directory / ROUTING_FILE)

    def load(self, directory: Path) -> None:
        """Reads what :meth:`save` wrote.

        Raises:
            ValueError: If it belongs to another model or another kind of controller.
            FileNotFoundError: If ``directory`` has no routing state.
        """
        state: dict[str, Any] = {
            name: {"controller": {}, "selector": {}} for name in self.layer_names
        }
        for key, tensor in load_file(directory / ROUTING_FILE).items():
            layer, part, name = key.split("/")
            state.setdefault(layer, {}).setdefault(part, {})[name] = tensor
        self.load_state_dict(state)

    def detach(self) -> None:
        """Removes every hook; the model behaves as if it had never been attached to."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        for layer in self._layers:
            layer.rule.remove()
        self._layers[0].site.experts.config._experts_implementation = self._previous_implementation

    def _check_records(self, records: list[LayerRouting]) -> None:
        if tuple(routing.name for routing in records) != self.layer_names:
            raise ValueError(
                f"records must hold one entry for each of the {len(self._layers)} MoE layers in "
                f"order, got {[routing.name for routing in records]}; record one forward pass at "
                f"a time"
            )

    def _read_call(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Reads the padding mask of a forward pass, and spreads its source over its tokens."""
        self._valid = padding_mask(module, args, kwargs)
        self._sequence_length = sequence_length(module, args, kwargs)
        self._source = None
        if self._given_source is not None:
            known = [meters[0].traffic.shape[0] for meters in self._meters]
            known += [] if self.link_gates is None else [self.link_gates.values.shape[1]]
            num_sources = min(known, default=None)
            self._source = token_sources(self._given_source, num_sources, module, (args, kwargs))

    def _tap(
        self, number: int, experts: nn.Module, args: tuple[Any, ...], output: Tensor
    ) -> Tensor:
        """Lets the backward pass of a layer's experts measure what flows through them."""
        del experts
        # The node of the pass that is being recomputed does that already.
        if not self._meters or not torch.is_grad_enabled() or _is_recomputed():
            return output
        if self._source is None:
            raise ValueError(
                "record_traffic needs the source of each token, got none; run the forward pass "
                "inside of attachment.from_source(...)"
            )
        _, expert_ids, weights = args
        for meters in self._meters:
            output = tap_traffic(
                output, weights, source=self._source, expert_ids=expert_ids, meter=meters[number]
            )
        return output

    def _route(
        self, number: int, router: nn.Module, args: tuple[Any, ...], output: tuple[Any, ...]
    ) -> tuple[Any, ...]:
        """Replaces the router's weights and indices by those of the policy."""
        del router
        layer = self._layers[number]
        logits, weights, _, *rest = output
        hidden = args[0].reshape(-1, args[0].shape[-1])
        if _is_recomputed():
            routing = layer.take_pending(logits)
            combine = layer.recomputed_weights(hidden, logits, routing)
        else:
            routing = layer.decide(
                hidden,
                logits,
                valid=self._valid,
                source=self._source,
                gates=None if self.link_gates is None else self.link_gates.layer(number),
                sequence_length=self._sequence_length,
            )
            self._deliver(layer, logits, routing)
            combine = routing.plan.combine_weights
        plan = routing.plan
        expert_ids = plan.expert_ids.masked_fill(~plan.keep, layer.site.num_experts)
        return (logits, combine.to(weights.dtype), expert_ids, *rest)

    def _deliver(self, layer: AttachedLayer, logits: Tensor, routing: LayerRouting) -> None:
        for records in self._records:
            records.append(routing)
        is_checkpointed = any(module.gradient_checkpointing for module in self._checkpointed)
        if layer.site.router.training and is_checkpointed:
            if not torch.is_grad_enabled() and (self._records or self._meters):
                raise ValueError(
                    "gradient checkpointing must not be reentrant while routing is recorded: the "
                    "router's gradient would be lost; enable it with use_reentrant=False"
                )
            layer.pending.append((logits.detach(), routing))


def _is_recomputed() -> bool:
    """Whether a backward pass is running: a forward pass inside of it is one of checkpointing."""
    return torch._C._current_graph_task_id() != -1
