"""Where a layer stands in its model, for what is built differently from layer to layer."""

from dataclasses import dataclass
from typing import final

import torch


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class LayerPlace:
    """One MoE layer of a model.

    Attributes:
        number: Its position among the MoE layers, from 0.
        num_layers: Number of MoE layers.
        num_experts: Number of experts ``E``.
        width: Width ``D`` of a token's vector.
        device: Where the layer lives.
    """

    number: int
    num_layers: int
    num_experts: int
    width: int
    device: torch.device
