"""From settings to adversaries over domains and over experts."""

import math

import torch
from torch import Tensor

from drgr.ambiguity import KL, ChiSquare, load_reference_losses
from drgr.data import Corpus
from drgr.errors import ConfigError
from drgr.integrations.transformers import Attachment
from drgr.training.adversary import DomainAdversary
from drgr.training.config import RobustnessConfig, RunConfig
from drgr.training.expert_groups import ExpertAdversaries


def check_robustness(settings: RobustnessConfig) -> None:
    """Checks settings of the adversary against each other.

    Raises:
        ConfigError: If experts are to be weighed by what they do not have, or an excess is to be
            clipped that there is none of.
    """
    fits = (
        settings.apply_to == "objective"
        and settings.losses == "train"
        and settings.unit == "nats-per-token"
        and settings.reference is None
    )
    if settings.groups == "experts" and not fits:
        raise ConfigError(
            "robustness.groups experts needs apply_to objective, losses train, unit nats-per-token "
            f"and no reference, got {settings.apply_to}, {settings.losses}, {settings.unit} and "
            f"{settings.reference}"
        )
    if settings.clip_excess and settings.reference is None:
        raise ConfigError(
            "robustness.clip_excess needs a reference to exceed, got reference null; name the "
            "evaluation.json of a reference run"
        )


def build_adversary(config: RunConfig, corpus: Corpus, sampling: Tensor) -> DomainAdversary:
    """Returns the adversary over the corpus's domains."""
    settings = config.robustness
    num_domains = len(corpus.domains)
    unit = torch.ones(num_domains, dtype=torch.float64)
    if settings.unit == "bits-per-byte":
        # One tokenizer serves all splits, so the ratio of the largest split is used.
        ratios = [corpus.bytes_per_token("train", domain) for domain in corpus.domains]
        unit = 1 / (torch.tensor(ratios, dtype=torch.float64) * math.log(2))
    reference = None
    if settings.reference is not None:
        reference = load_reference_losses(settings.reference, corpus.domains)
    return _adversary(settings, sampling, unit=unit, reference=reference)


def _adversary(
    settings: RobustnessConfig, sampling: Tensor, *, unit: Tensor, reference: Tensor | None
) -> DomainAdversary:
    """Returns an adversary over groups that are drawn with given shares."""
    uniform = torch.full_like(sampling, 1 / len(sampling))
    return DomainAdversary(
        divergence=KL() if settings.divergence == "kl" else ChiSquare(),
        penalty=settings.penalty,
        radius=settings.radius,
        sampling=sampling,
        nominal={"uniform": uniform, "sampling": sampling, "previous": None}[settings.nominal],
        # Weights of experts are applied token by token, not by what is drawn.
        apply_to=settings.apply_to if settings.groups == "domains" else "nothing",
        unit=unit,
        smoothing=settings.smoothing,
        reference=reference,
        clip_excess=settings.clip_excess,
        uniform_share=settings.uniform_share,
    )


def build_experts(config: RunConfig, attachment: Attachment) -> ExpertAdversaries | None:
    """Returns the adversary over the experts of each layer; None where domains are the groups."""
    if config.robustness.groups == "domains":
        return None
    num_experts = attachment.num_experts
    uniform = torch.full((num_experts,), 1 / num_experts, dtype=torch.float64)
    return ExpertAdversaries(
        [
            _adversary(config.robustness, uniform, unit=torch.ones_like(uniform), reference=None)
            for _ in attachment.layer_names
        ]
    )
