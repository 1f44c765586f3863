"""The ways to train: what is drawn, and what the losses of what was drawn count.

All take the same number of steps. Only the second stage of JTT starts from errors of a model; its
first stage and its pass over the training split are taken from its steps.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal, final

import torch
from torch import Tensor

from benchmarks.real_groups.data import Samples
from benchmarks.real_groups.model import Fit, Ledger, Training, errors, fit
from drgr.ambiguity import KL, CVaR, RobustLoss
from drgr.budgets.flops import FORWARD_PASSES_PER_STEP
from drgr.training.adversary import DomainAdversary

# Of the steps: before them DRGR counts groups alike.
BEGIN = 0.1
REFRESH_EVERY = 10
SMOOTHING = 0.9
# Of the steps, for the model whose errors count more afterwards.
FIRST_STAGE = 0.2

Setting = Mapping[str, float]


@final
@dataclass(frozen=True, slots=True)
class Fixed:
    """The same draws and the same factors on the losses at every step, each of shape ``(N,)``."""

    drawn: Tensor
    factors: Tensor

    def shares(self, _step: int) -> Tensor:
        return self.drawn

    def objective(self, losses: Tensor, rows: Tensor) -> Tensor:
        return (self.factors[rows] * losses).mean()


@final
class GroupDro:
    """Exponentiated gradient of the adversary, one step a batch, on the objective.

    The factors multiply the means of groups, as in Sagawa et al., *Distributionally Robust Neural
    Networks*, ICLR 2020, algorithm 1. The loss of a group that is not in a batch counts as 0.
    """

    def __init__(self, groups: Tensor, num_groups: int, *, rate: float, drawn: Tensor) -> None:
        self._groups = groups
        self._drawn = drawn
        self._rate = rate
        self.weights = torch.full((num_groups,), 1 / num_groups)

    def shares(self, _step: int) -> Tensor:
        return self._drawn

    def objective(self, losses: Tensor, rows: Tensor) -> Tensor:
        means = group_means(losses, self._groups[rows], len(self.weights))
        self.weights = torch.softmax(self.weights.log() + self._rate * means.detach(), dim=0)
        return (self.weights * means).sum()


@final
class Tail:
    """CVaR over the samples of a batch: the mean of the largest losses, without any group."""

    def __init__(self, num_samples: int, *, level: float) -> None:
        self._drawn = torch.ones(num_samples)
        self._robust = RobustLoss(CVaR(level))

    def shares(self, _step: int) -> Tensor:
        return self._drawn

    def objective(self, losses: Tensor, _rows: Tensor) -> Tensor:
        value: Tensor = self._robust(losses)
        return value


@final
class Drgr:
    """KL weights of the training losses of groups, from ``begin`` on; before, groups count alike.

    On the objective, samples are drawn as they are and the loss of a group's sample has the factor
    weight over share, so that a rare group's few samples are not repeated; on the sampling, groups
    are drawn by their weights.
    """

    def __init__(
        self,
        groups: Tensor,
        num_groups: int,
        *,
        penalty: float,
        begin: int,
        apply_to: Literal["objective", "sampling"],
    ) -> None:
        self._groups = groups
        self._begin = begin
        self._counts = torch.bincount(groups, minlength=num_groups).double()
        uniform = torch.full_like(self._counts, 1 / num_groups)
        self.adversary = DomainAdversary(
            divergence=KL(),
            penalty=penalty,
            radius=None,
            sampling=uniform if apply_to == "sampling" else self._counts,
            nominal=uniform,
            apply_to=apply_to,
            unit=torch.ones_like(uniform),
            smoothing=SMOOTHING,
            reference=None,
        )
        self._drawn = self._shares()

    def shares(self, step: int) -> Tensor:
        if step >= self._begin and (step - self._begin) % REFRESH_EVERY == 0:
            self.adversary.refresh()
            self._drawn = self._shares()
        return self._drawn

    def objective(self, losses: Tensor, rows: Tensor) -> Tensor:
        groups = self._groups[rows]
        sums, counts = group_sums(losses.detach(), groups, len(self._counts))
        self.adversary.observe(sums, counts)
        return (self.adversary.weights.objective[groups].float() * losses).mean()

    def _shares(self) -> Tensor:
        return (self.adversary.weights.sampling / self._counts)[self._groups].float()


def group_sums(losses: Tensor, groups: Tensor, num_groups: int) -> tuple[Tensor, Tensor]:
    """Returns sums of losses and counts of samples by group, each of shape ``(G,)``."""
    sums = losses.new_zeros(num_groups).index_add(0, groups, losses)
    return sums, torch.bincount(groups, minlength=num_groups)


def group_means(losses: Tensor, groups: Tensor, num_groups: int) -> Tensor:
    """Returns the mean loss of each group, shape ``(G,)``; 0 where there is no sample."""
    sums, counts = group_sums(losses, groups, num_groups)
    return sums / counts.clamp_min(1)


def balanced(groups: Tensor, num_groups: int) -> Tensor:
    """Returns shares of samples by which every group is drawn equally often, shape ``(N,)``."""
    counts = torch.bincount(groups, minlength=num_groups)
    return 1 / (num_groups * counts[groups].float())


def inverse_frequency(groups: Tensor, num_groups: int, *, power: float) -> Tensor:
    """Returns factors in proportion to ``n_g^-power`` with mean 1 over the samples, ``(N,)``."""
    counts = torch.bincount(groups, minlength=num_groups)
    factors = counts[groups].float().pow(-power)
    return factors / factors.mean()


def upsampled(wrong: Tensor, *, factor: float) -> Tensor:
    """Returns shares by which wrong samples are drawn ``factor`` times as often, shape ``(N,)``."""
    return torch.where(wrong, factor, 1.0)


def train_erm(samples: Samples, _groups: int, training: Training, setting: Setting) -> Fit:
    """Empirical risk: every sample alike."""
    ones = torch.ones(len(samples.labels))
    return fit(samples, Fixed(ones, ones), _decayed(training, setting))


def train_weighted(samples: Samples, groups: int, training: Training, setting: Setting) -> Fit:
    """Inverse group frequency, or a power of it, on the objective."""
    ones = torch.ones(len(samples.labels))
    factors = inverse_frequency(samples.groups, groups, power=setting["power"])
    return fit(samples, Fixed(ones, factors), training)


def train_balanced(samples: Samples, groups: int, training: Training, setting: Setting) -> Fit:
    """Every group drawn equally often."""
    ones = torch.ones(len(samples.labels))
    rule = Fixed(balanced(samples.groups, groups), ones)
    return fit(samples, rule, _decayed(training, setting))


def train_group_dro(samples: Samples, groups: int, training: Training, setting: Setting) -> Fit:
    """Group DRO on groups that are drawn equally often."""
    drawn = balanced(samples.groups, groups)
    rule = GroupDro(samples.groups, groups, rate=setting["rate"], drawn=drawn)
    return fit(samples, rule, training)


def train_group_dro_as_drawn(
    samples: Samples, groups: int, training: Training, setting: Setting
) -> Fit:
    """Group DRO on samples as they are."""
    drawn = torch.ones(len(samples.labels))
    rule = GroupDro(samples.groups, groups, rate=setting["rate"], drawn=drawn)
    return fit(samples, rule, training)


def train_tail(samples: Samples, _groups: int, training: Training, setting: Setting) -> Fit:
    return fit(samples, Tail(len(samples.labels), level=setting["level"]), training)


def train_drgr(samples: Samples, groups: int, training: Training, setting: Setting) -> Fit:
    """DRGR with its weights on the objective."""
    return fit(samples, _drgr(samples, groups, training, setting, "objective"), training)


def train_drgr_draws(samples: Samples, groups: int, training: Training, setting: Setting) -> Fit:
    """DRGR with its weights on the draws."""
    return fit(samples, _drgr(samples, groups, training, setting, "sampling"), training)


def _drgr(
    samples: Samples,
    groups: int,
    training: Training,
    setting: Setting,
    apply_to: Literal["objective", "sampling"],
) -> Drgr:
    begin = round(BEGIN * training.steps)
    penalty = setting["penalty"]
    return Drgr(samples.groups, groups, penalty=penalty, begin=begin, apply_to=apply_to)


def train_jtt(samples: Samples, _groups: int, training: Training, setting: Setting) -> Fit:
    """Just train twice: errors of a first model are drawn more often for a second, fresh one.

    Liu et al., *Just Train Twice*, ICML 2021. No group label is used.
    """
    first, second = jtt_stages(training, len(samples.labels))
    ones, ledger = torch.ones(len(samples.labels)), Ledger()
    short = dataclasses.replace(training, steps=first)
    found = errors(fit(samples, Fixed(ones, ones), short, ledger=ledger), samples)
    rest = dataclasses.replace(training, steps=second)
    drawn = upsampled(found, factor=setting["factor"])
    return fit(samples, Fixed(drawn, ones), rest, ledger=ledger)


def jtt_stages(training: Training, num_samples: int) -> tuple[int, int]:
    """Returns the steps of the two stages, which with the pass between them cost all steps.

    Raises:
        ValueError: If the steps do not suffice.
    """
    first = max(1, round(FIRST_STAGE * training.steps))
    passes = math.ceil(num_samples / (FORWARD_PASSES_PER_STEP * training.batch_size))
    second = training.steps - first - passes
    if second < 1:
        raise ValueError(
            f"steps must exceed {first + passes} for two stages over {num_samples} samples, got "
            f"{training.steps}; raise the steps or the batch size"
        )
    return first, second


def _decayed(training: Training, setting: Setting) -> Training:
    return dataclasses.replace(training, weight_decay=setting["weight_decay"])


Train = Callable[[Samples, int, Training, Setting], Fit]


@final
@dataclass(frozen=True, slots=True)
class Method:
    """A way to train.

    Attributes:
        train: Takes the training split, the number of groups, the training and a setting.
        trials: Settings to choose from, equally many for each method.
        knows_groups: Whether training looks at the groups; the choice of a setting always does.
    """

    name: str
    train: Train
    trials: tuple[Setting, ...]
    knows_groups: bool


def _settings(name: str, *values: float) -> tuple[Setting, ...]:
    return tuple({name: value} for value in values)


OURS = "DRGR"
ON_DRAWS = OURS + ", weights on the draws"
DECAYS = _settings("weight_decay", 0.01, 0.1, 1.0, 3.0, 10.0)
RATES = _settings("rate", 0.003, 0.01, 0.03, 0.1, 0.3)
PENALTIES = _settings("penalty", 0.05, 0.1, 0.2, 0.4, 0.8)
POWERS = _settings("power", 0.5, 0.75, 1.0, 1.25, 1.5)
FACTORS = _settings("factor", 5.0, 20.0, 50.0, 100.0, 200.0)
LEVELS = _settings("level", 0.05, 0.1, 0.2, 0.4, 0.7)


METHODS = (
    Method("ERM", train_erm, DECAYS, knows_groups=False),
    Method("up-weighting", train_weighted, POWERS, knows_groups=True),
    Method("group-balanced sampling", train_balanced, DECAYS, knows_groups=True),
    Method("group DRO, balanced draws", train_group_dro, RATES, knows_groups=True),
    Method("group DRO, draws as given", train_group_dro_as_drawn, RATES, knows_groups=True),
    Method("JTT", train_jtt, FACTORS, knows_groups=False),
    Method("CVaR of samples", train_tail, LEVELS, knows_groups=False),
    Method(OURS, train_drgr, PENALTIES, knows_groups=True),
    Method(ON_DRAWS, train_drgr_draws, PENALTIES, knows_groups=True),
)
