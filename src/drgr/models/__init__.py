"""Models with experts: a layer for one's own, small language models, loaded ones, what they cost.

Reading order: ``reference`` (the formula), ``grouped`` (the same, fast),
``experts`` (modules), ``moe_layer`` (routed inside a budget), ``measure`` (FLOPs). These need torch
only. ``tiny`` (models for one CPU) and ``pretrained`` (checkpoints) need transformers, which is
imported when they are first asked for.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from drgr.models.experts import ExpertsFunction, GatedExperts, SharedExpert
from drgr.models.grouped import grouped_experts
from drgr.models.measure import measure_flops
from drgr.models.moe_layer import MoELayer
from drgr.models.reference import reference_experts

if TYPE_CHECKING:
    from drgr.models.pretrained import load_pretrained
    from drgr.models.tiny import tiny_olmoe, tiny_qwen3_moe

__all__ = [
    "ExpertsFunction",
    "GatedExperts",
    "MoELayer",
    "SharedExpert",
    "grouped_experts",
    "load_pretrained",
    "measure_flops",
    "reference_experts",
    "tiny_olmoe",
    "tiny_qwen3_moe",
]

_WITH_TRANSFORMERS = {
    "load_pretrained": "drgr.models.pretrained",
    "tiny_olmoe": "drgr.models.tiny",
    "tiny_qwen3_moe": "drgr.models.tiny",
}


def __getattr__(name: str) -> Any:
    if name not in _WITH_TRANSFORMERS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_WITH_TRANSFORMERS[name]), name)
