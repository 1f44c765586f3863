"""Causal language models with experts: small random ones, loaded ones, and what they cost.

Reading order: ``tiny`` (models for one CPU), ``pretrained`` (checkpoints), ``measure`` (FLOPs).
"""

from drgr.models.measure import measure_flops
from drgr.models.pretrained import load_pretrained
from drgr.models.tiny import tiny_olmoe, tiny_qwen3_moe

__all__ = ["load_pretrained", "measure_flops", "tiny_olmoe", "tiny_qwen3_moe"]
