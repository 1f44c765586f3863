"""Fixtures that every test folder may use: seeding, and tiny models of the five MoE families."""

import importlib.util
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

FAMILIES = ("mixtral", "qwen3_moe", "olmoe", "deepseek_v3", "gpt_oss")

# One scale for all families. The wide initializer keeps every expert's share of the output well
# above float32 rounding, so that a test which compares outputs can see a single expert.
SHARED_FIELDS: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
    "pad_token_id": None,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
}

# Eight experts and two MoE layers in every family. On purpose different: the dense first layer,
# shared expert and latent attention of DeepSeek-V3, the sliding window and biases of gpt-oss.
FAMILY_FIELDS: dict[str, dict[str, Any]] = {
    "mixtral": {"num_local_experts": 8, "intermediate_size": 16},
    "qwen3_moe": {
        "num_experts": 8,
        "moe_intermediate_size": 16,
        "intermediate_size": 48,
        "head_dim": 8,
        "norm_topk_prob": True,
    },
    "olmoe": {"num_experts": 8, "intermediate_size": 16},
    "deepseek_v3": {
        "num_hidden_layers": 3,
        "first_k_dense_replace": 1,
        "num_key_value_heads": 4,
        "n_routed_experts": 8,
        "n_shared_experts": 1,
        "n_group": 1,
        "topk_group": 1,
        "moe_intermediate_size": 16,
        "intermediate_size": 48,
        "q_lora_rank": 16,
        "kv_lora_rank": 16,
        "qk_rope_head_dim": 4,
        "qk_nope_head_dim": 8,
        "v_head_dim": 8,
        "num_mtp_layers": 0,
    },
    "gpt_oss": {
        "num_local_experts": 8,
        "intermediate_size": 16,
        "head_dim": 8,
        "sliding_window": 16,
    },
}

# Names that ``build_family`` knows beside FAMILIES: group-limited routing of DeepSeek-V3.
VARIANT_FIELDS: dict[str, tuple[str, dict[str, Any]]] = {
    "deepseek_v3_grouped": ("deepseek_v3", {"n_group": 2, "topk_group": 1}),
}


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    """One thread a process: faster for tiny tensors, and sums have one order on every machine."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def seed_from_test_name(request: pytest.FixtureRequest) -> int:
    """Seeds torch and numpy from the test's name: the order of the tests does not matter."""
    seed = zlib.crc32(request.node.nodeid.encode())
    torch.manual_seed(seed)
    np.random.seed(seed)  # noqa: NPY002 - libraries under test may use the global generator
    return seed


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    """Name of one MoE family; a test that takes it runs once for each of the five."""
    return request.param


@pytest.fixture(scope="session")
def build_family() -> Callable[..., nn.Module]:
    """Builder of a random tiny causal LM in training mode: ``build_family(name, **options)``.

    Options: ``seed=0``, ``attn_implementation``, ``experts_implementation``; every other keyword
    overrides a field of the configuration. The name is one of FAMILIES or VARIANT_FIELDS.
    """
    return _build_family


def _build_family(
    name: str,
    *,
    seed: int = 0,
    attn_implementation: str | None = None,
    experts_implementation: str | None = None,
    **fields: Any,
) -> nn.Module:
    # Imported here: tests of the mathematical core run without transformers.
    from transformers import AutoConfig, AutoModelForCausalLM

    model_type, variant = VARIANT_FIELDS.get(name, (name, {}))
    merged = {**SHARED_FIELDS, **FAMILY_FIELDS[model_type], **variant, **fields}
    config = AutoConfig.for_model(model_type, **merged)
    implementations = {
        "attn_implementation": attn_implementation,
        "experts_implementation": experts_implementation,
    }
    chosen = {key: value for key, value in implementations.items() if value is not None}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return AutoModelForCausalLM.from_config(config, **chosen).train()


@pytest.fixture(scope="session")
def run_processes() -> Callable[..., list[Any]]:
    """Runner of a function in several processes: ``run_processes(function, num_processes, *args)``.

    The function stands at module level; its results come back in the order of ranks.
    """
    return _load("processes").run_processes


@pytest.fixture(scope="session")
def runs() -> ModuleType:
    """The helpers of ``tests/small_runs.py``."""
    return _load("small_runs")


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The cache of the whole session: the fixture corpus is prepared once."""
    return tmp_path_factory.getbasetemp() / "drgr-cache"


@pytest.fixture(scope="session")
def corpus(runs: ModuleType, cache: Path) -> Any:
    """The committed fixture corpus of four domains."""
    return runs.prepare(cache)


def _load(name: str) -> ModuleType:
    """Loads a file of this folder by its path: tests are not importable by name."""
    path = Path(__file__).with_name(f"{name}.py")
    spec = importlib.util.spec_from_file_location(f"{name}_of_tests", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules.setdefault(spec.name, module)
    spec.loader.exec_module(module)
    return module
