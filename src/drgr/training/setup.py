"""From a configuration to the objects of a run: the only place where the two meet."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, assert_never

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.nn.parallel import DistributedDataParallel

from drgr.budgets.flops import FlopModel
from drgr.collectives import world_size
from drgr.data import Corpus, check_sequence_length
from drgr.errors import ConfigError
from drgr.evaluation import ExpertBounds, average_mixture
from drgr.integrations.transformers import Attachment, attach, enable_checkpointing, find_sites
from drgr.models import load_pretrained, measure_flops, tiny_olmoe, tiny_qwen3_moe
from drgr.routing import (
    LinkGates,
    exchanged_bytes,
)
from drgr.routing.selection import SelectorFactory
from drgr.training.adversary import DomainAdversary
from drgr.training.adversary_setup import build_adversary, build_experts, check_robustness
from drgr.training.config import (
    PretrainedModelConfig,
    RunConfig,
    TinyModelConfig,
)
from drgr.training.controller_setup import build_controller
from drgr.training.expert_groups import ExpertAdversaries
from drgr.training.losses_setup import build_losses
from drgr.training.outer_loop import OuterLoop
from drgr.training.outer_setup import build_outer, check_outer, split_parameters
from drgr.training.scorer_setup import build_scorer
from drgr.training.selector_setup import ROUTED_ALONE, BudgetStage, build_selection
from drgr.training.step import StepSettings


@dataclass(frozen=True, slots=True, kw_only=True)
class RunObjects:
    """Everything that a run works with.

    Attributes:
        config: Where it came from.
        corpus: What training reads.
        unseen: Domains that only the final evaluation reads; None where there are none.
        attachment: The model with its routing policies.
        forward_model: The model, or its data-parallel wrapper.
        optimizer: AdamW over the parameters of the inner level.
        adversary: Domain weights.
        experts: Weights of experts as groups; None where domains are.
        outer: The outer loop; None where it has no variable.
        settings: What a step needs.
        bounds: Experts that a token may have once training has ended.
        stages: Experts that a token may have from which step on.
        flops: What the model costs.
        group: The processes of the run; ``None`` for one process.
    """

    config: RunConfig
    corpus: Corpus
    unseen: Corpus | None
    attachment: Attachment
    forward_model: nn.Module
    optimizer: torch.optim.Optimizer
    adversary: DomainAdversary
    experts: ExpertAdversaries | None
    outer: OuterLoop | None
    settings: StepSettings
    bounds: ExpertBounds
    stages: tuple[BudgetStage, ...]
    flops: FlopModel
    group: ProcessGroup | None

    @property
    def device(self) -> torch.device:
        """Where the model lives."""
        return next(self.attachment.model.parameters()).device

    def exchanged_bytes(self, assignments: float) -> dict[str, float]:
        """Predicts what expert parallelism would send, in bytes of each direction of a step."""
        dtype = self.settings.autocast or next(self.attachment.model.parameters()).dtype
        forward, backward = exchanged_bytes(
            assignments,
            width=self.attachment.width,
            bytes_per_value=dtype.itemsize,
            gradient_checkpointing=self.config.training.gradient_checkpointing,
        )
        return {"forward": forward, "backward": backward}


def build_run(config: RunConfig, corpus: Corpus) -> RunObjects:
    """Builds the objects of a run, checking what only shows when settings meet data and model.

    Raises:
        ConfigError: If settings clash with each other, with the corpus or with the processes.
        DataError: If a domain is shorter than a sequence.
        UnknownRouterError: If the model cannot be attached to.
    """
    _check_batch_split(config)
    check_robustness(config.robustness)
    check_outer(config)
    check_sequence_length(corpus, config.data.sequence_length)
    corpus, unseen = split_domains(config, corpus)
    sampling = sampling_weights(config, corpus)
    device = choose_device(config)
    torch.manual_seed(config.training.seed)
    model = _build_model(config, corpus).to(device)
    if config.training.gradient_checkpointing:
        enable_checkpointing(model)
    experts = {site.name: site.experts for site in find_sites(model)}
    flops = measure_flops(model, experts)
    selection = build_selection(
        config.routing, flops, num_layers=len(experts), steps=config.training.steps
    )
    # A group of its own keeps the selection's collectives in order among themselves, whatever the
    # gradient engine sends meanwhile.
    group = dist.new_group() if world_size() > 1 else None
    gates = _link_gates(config, len(corpus.domains), experts, device)
    attachment = _attach(config, model, selection.build, link_gates=gates, group=group)
    flops = measure_flops(model, experts)  # again, with what scorers added
    settings = _step_settings(config, attachment, device, group)
    adversary = build_adversary(config, corpus, sampling)
    inner, _ = split_parameters(model, config.outer)
    optimizer = torch.optim.AdamW(
        inner,
        lr=config.training.learning_rate,
        betas=(config.training.beta1, config.training.beta2),
        weight_decay=config.training.weight_decay,
    )
    return RunObjects(
        config=config,
        corpus=corpus,
        unseen=unseen,
        attachment=attachment,
        forward_model=_forward_model(config, model, device),
        optimizer=optimizer,
        adversary=adversary,
        experts=build_experts(config, attachment),
        outer=build_outer(
            config,
            attachment,
            corpus,
            step=settings,
            flops=flops,
            adversary=adversary,
            optimizer=optimizer,
        ),
        settings=settings,
        bounds=selection.bounds,
        stages=selection.stages,
        flops=flops,
        group=group,
    )


def split_domains(config: RunConfig, corpus: Corpus) -> tuple[Corpus, Corpus | None]:
    """Returns what training reads of a corpus, and what only the final evaluation does.

    Raises:
        ConfigError: If an unseen domain is not one of the corpus, or all of them are unseen.
    """
    unseen = config.data.unseen
    if not unseen:
        return corpus, None
    seen = [name for name in corpus.domains if name not in unseen]
    if unknown := [name for name in unseen if name not in corpus.domains]:
        raise ConfigError(
            f"data.unseen must name domains of corpus {corpus.name}, {list(corpus.domains)}, got "
            f"{unknown}"
        )
    if not seen:
        raise ConfigError(
            f"data.unseen must leave training at least one domain of corpus {corpus.name}, got all "
            f"of {list(corpus.domains)}"
        )
    return corpus.restricted(seen), corpus.restricted(unseen)


def sampling_weights(config: RunConfig, corpus: Corpus) -> Tensor:
    """Returns the base share of each domain in the batches, shape ``(G,)``, float64, summing to 1.

    Args:
        config: The configuration.
        corpus: What training reads, without unseen domains.

    Raises:
        ConfigError: If the configured domains are not those of the corpus, or all shares are zero.
    """
    sampling = config.data.sampling
    if sampling == "uniform":
        return torch.full((len(corpus.domains),), 1 / len(corpus.domains), dtype=torch.float64)
    if sampling == "natural":
        declared = corpus.declared_weights()
        natural = corpus.natural_weights() if declared is None else declared
        return torch.tensor(natural, dtype=torch.float64)
    if isinstance(sampling, str):
        return average_mixture(Path(sampling), corpus.domains)
    # A recipe's mixture names every domain; the share of one that is unseen counts for nothing.
    named = set(sampling) - set(config.data.unseen)
    if named != set(corpus.domains):
        raise ConfigError(
            f"data.sampling must name the domains of corpus {corpus.name}, {list(corpus.domains)}, "
            f"got {list(sampling)}"
        )
    shares = torch.tensor([sampling[name] for name in corpus.domains], dtype=torch.float64)
    if not shares.sum() > 0:
        raise ConfigError("data.sampling must give at least one domain a share above 0, got all 0")
    return shares / shares.sum()


def choose_device(config: RunConfig) -> torch.device:
    """Returns the device of this process.

    Raises:
        ConfigError: If a GPU is asked for and there is none.
    """
    wanted = config.training.device
    if wanted == "cuda" and not torch.cuda.is_available():
        raise ConfigError(
            "training.device is cuda, but PyTorch finds no CUDA device; use auto or cpu"
        )
    if wanted == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    torch.cuda.set_device(device)
    return device


def autocast_dtype(config: RunConfig, device: torch.device) -> torch.dtype | None:
    """Returns the dtype of matrix products, or ``None`` where none is changed."""
    precision = config.training.precision
    if precision == "auto":
        precision = "bfloat16" if device.type == "cuda" else "float32"
    return torch.bfloat16 if precision == "bfloat16" else None


def _check_batch_split(config: RunConfig) -> None:
    parts = world_size() * config.training.accumulation
    if config.training.batch_size % parts:
        raise ConfigError(
            f"training.batch_size must be a multiple of processes x training.accumulation, got "
            f"{config.training.batch_size} for {world_size()} x {config.training.accumulation}"
        )


def _build_model(config: RunConfig, corpus: Corpus) -> Any:
    model = config.model
    match model:
        case PretrainedModelConfig(path=path):
            loaded = load_pretrained(path)
            _check_vocabulary(loaded, corpus, path)
            return loaded
        case TinyModelConfig():
            return _build_tiny(config, model, corpus.vocabulary_size)
        case _:
            assert_never(model)


def _build_tiny(config: RunConfig, model: TinyModelConfig, vocabulary_size: int) -> Any:
    build = tiny_olmoe if model.kind == "tiny-olmoe" else tiny_qwen3_moe
    try:
        return build(
            vocabulary_size=vocabulary_size,
            hidden_size=model.hidden_size,
            expert_size=model.expert_size,
            num_layers=model.num_layers,
            num_heads=model.num_heads,
            num_experts=model.num_experts,
            max_positions=max(512, config.data.sequence_length),
            seed=config.training.seed,
        )
    except ValueError as error:
        raise ConfigError(f"model: {error}") from error


def _check_vocabulary(model: Any, corpus: Corpus, path: str) -> None:
    if corpus.vocabulary_size > model.config.vocab_size:
        raise ConfigError(
            f"model {path} knows {model.config.vocab_size} tokens, but corpus {corpus.name} has "
            f"{corpus.vocabulary_size}; set data.tokenizer to the model's own tokenizer"
        )


def _link_gates(
    config: RunConfig, num_domains: int, experts: Mapping[str, Any], device: torch.device
) -> LinkGates | None:
    if not config.routing.link_gates:
        return None
    return LinkGates(
        num_layers=len(experts),
        num_sources=num_domains,
        num_experts=next(iter(experts.values())).num_experts,
        device=device,
    )


def _attach(
    config: RunConfig,
    model: nn.Module,
    selector: SelectorFactory,
    *,
    link_gates: LinkGates | None,
    group: ProcessGroup | None,
) -> Attachment:
    try:
        return attach(
            model,
            selector=selector,
            scorer=build_scorer(config.routing.scores),
            controller=build_controller(config.routing.controller),
            link_gates=link_gates,
            group=group,
        )
    except ValueError as error:
        raise ConfigError(f"routing.budget: {error}") from error


def _forward_model(config: RunConfig, model: Any, device: torch.device) -> nn.Module:
    if config.training.compile:
        model.compile()
    if world_size() == 1:
        return model  # type: ignore[no-any-return]
    return DistributedDataParallel(model, device_ids=[device] if device.type == "cuda" else None)


def _step_settings(
    config: RunConfig, attachment: Attachment, device: torch.device, group: ProcessGroup | None
) -> StepSettings:
    traffic = config.routing.traffic
    return StepSettings(
        batch_size=config.training.batch_size,
        accumulation=config.training.accumulation,
        sequence_length=config.data.sequence_length,
        seed=config.training.seed,
        losses=build_losses(config.routing, attachment, seed=config.training.seed),
        traffic_coefficient=traffic.coefficient if traffic.measure else None,
        clip_norm=config.training.clip_norm,
        autocast=autocast_dtype(config, device),
        routed_alone=config.routing.selection.kind in ROUTED_ALONE,
        group=group,
    )


def resolve_cache(cache: Path | None) -> Path:
    """Returns the cache directory: the one given, else ``DRGR_CACHE``, else the platform's."""
    from platformdirs import user_cache_path  # noqa: PLC0415 - an optional dependency

    if cache is not None:
        return cache
    configured = os.environ.get("DRGR_CACHE")
    return Path(configured) if configured else user_cache_path("drgr")
