"""Small random MoE language models: large enough to learn text on a CPU within minutes."""

from collections.abc import Callable

import torch
from transformers import (
    OlmoeConfig,
    OlmoeForCausalLM,
    PreTrainedModel,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from drgr._checks import check_positive
from drgr.models.pretrained import use_cache_for_generation_only


def tiny_olmoe(
    *,
    vocabulary_size: int,
    hidden_size: int = 192,
    expert_size: int = 192,
    num_layers: int = 4,
    num_heads: int = 4,
    num_experts: int = 8,
    experts_per_token: int = 2,
    max_positions: int = 512,
    seed: int,
) -> PreTrainedModel:
    """Builds an OLMoE: softmax over all experts, the chosen weights not renormalised.

    Args:
        vocabulary_size: Number of token ids.
        hidden_size: Width of the residual stream.
        expert_size: Inner width of one expert (three matrices: gate, up, down).
        num_layers: Decoder layers, each with an MoE block.
        num_heads: Attention heads; ``hidden_size`` is divided among them.
        num_experts: Experts in a layer.
        experts_per_token: Experts that the router chooses for a token in a layer.
        max_positions: Longest sequence, in tokens.
        seed: Decides the weights alone; the global random state is left as it was.

    Returns:
        A float32 model on the CPU, in training mode. It has no special tokens: generation runs to
        the requested length unless the caller names an end token.

    Raises:
        ValueError: If a size is not positive, or sizes do not fit together.

    References:
        Muennighoff et al., OLMoE: Open Mixture-of-Experts Language Models, 2024 (arXiv 2409.02060).
    """
    _check_sizes(vocabulary_size, num_layers, max_positions)
    _check_widths(hidden_size, expert_size, num_heads)
    _check_experts(num_experts, experts_per_token)
    config = OlmoeConfig(
        vocab_size=vocabulary_size,
        hidden_size=hidden_size,
        intermediate_size=expert_size,
        num_hidden_layers=num_layers,
        num_attention_heads=num_heads,
        num_experts=num_experts,
        num_experts_per_tok=experts_per_token,
        max_position_embeddings=max_positions,
        pad_token_id=None,
        eos_token_id=None,
    )
    return _build_random(lambda: OlmoeForCausalLM(config), seed=seed)


def tiny_qwen3_moe(
    *,
    vocabulary_size: int,
    hidden_size: int = 192,
    expert_size: int = 192,
    num_layers: int = 4,
    num_heads: int = 4,
    num_experts: int = 8,
    experts_per_token: int = 2,
    max_positions: int = 512,
    seed: int,
) -> PreTrainedModel:
    """Builds a Qwen3-MoE: chosen weights renormalised, normed queries and keys, shared key heads.

    Two query heads share a key head where ``num_heads`` is even.

    Args:
        vocabulary_size: Number of token ids.
        hidden_size: Width of the residual stream.
        expert_size: Inner width of one expert (three matrices: gate, up, down).
        num_layers: Decoder layers, each with an MoE block.
        num_heads: Query heads; ``hidden_size`` is divided among them.
        num_experts: Experts in a layer.
        experts_per_token: Experts that the router chooses for a token in a layer.
        max_positions: Longest sequence, in tokens.
        seed: Decides the weights alone; the global random state is left as it was.

    Returns:
        A float32 model on the CPU, in training mode, without special tokens.

    Raises:
        ValueError: If a size is not positive, or sizes do not fit together.

    References:
        Yang et al., Qwen3 Technical Report, 2025 (arXiv 2505.09388).
    """
    _check_sizes(vocabulary_size, num_layers, max_positions)
    _check_widths(hidden_size, expert_size, num_heads)
    _check_experts(num_experts, experts_per_token)
    config = Qwen3MoeConfig(
        vocab_size=vocabulary_size,
        hidden_size=hidden_size,
        intermediate_size=expert_size,  # of dense layers; there are none
        moe_intermediate_size=expert_size,
        num_hidden_layers=num_layers,
        num_attention_heads=num_heads,
        num_key_value_heads=num_heads // 2 if num_heads % 2 == 0 else num_heads,
        num_experts=num_experts,
        num_experts_per_tok=experts_per_token,
        norm_topk_prob=True,
        max_position_embeddings=max_positions,
    )
    return _build_random(lambda: Qwen3MoeForCausalLM(config), seed=seed)


def _check_sizes(vocabulary_size: int, num_layers: int, max_positions: int) -> None:
    check_positive("vocabulary_size", vocabulary_size)
    check_positive("num_layers", num_layers)
    check_positive("max_positions", max_positions)


def _check_widths(hidden_size: int, expert_size: int, num_heads: int) -> None:
    check_positive("hidden_size", hidden_size)
    check_positive("expert_size", expert_size)
    check_positive("num_heads", num_heads)
    if hidden_size % (2 * num_heads) != 0:
        raise ValueError(
            f"hidden_size must be a multiple of 2 * num_heads = {2 * num_heads} (rotary positions "
            f"turn pairs), got {hidden_size}; change hidden_size or num_heads"
        )
    # Grouped matrix products need rows of whole 16-byte blocks: four float32 values.
    for name, width in (("hidden_size", hidden_size), ("expert_size", expert_size)):
        if width % 4 != 0:
            raise ValueError(
                f"{name} must be a multiple of 4 for grouped matrix products, got {width}; "
                f"use {width + 4 - width % 4}"
            )


def _check_experts(num_experts: int, experts_per_token: int) -> None:
    check_positive("num_experts", num_experts)
    check_positive("experts_per_token", experts_per_token)
    if experts_per_token > num_experts:
        raise ValueError(
            f"experts_per_token must be at most num_experts = {num_experts}, "
            f"got {experts_per_token}; lower it or add experts"
        )


def _build_random(build: Callable[[], PreTrainedModel], *, seed: int) -> PreTrainedModel:
    with torch.random.fork_rng(devices=[]):
        # Only the CPU's generator draws here; torch.manual_seed would reset every device's.
        torch.default_generator.manual_seed(seed)
        model = build()
    model.train()
    return use_cache_for_generation_only(model)
