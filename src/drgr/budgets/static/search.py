r"""The search over logits: sample whole choices, differentiate through them, stay on the budgets.

repeat: tau = tau_0 (tau_1 / tau_0)^(s / (S - 1))
        g = mean over Gumbel samples of d loss(gates) / da
        a <- Adam along the budgets
at the end: the best choice for log p, without noise, or the best sample
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, final

import torch
from torch import Tensor

from drgr._checks import check_not_negative, check_positive
from drgr.budgets.static.choice_knapsack import ChoiceKnapsack
from drgr.budgets.static.choices import ChoiceBudgets
from drgr.budgets.static.gumbel import gumbel_noise, straight_through
from drgr.budgets.static.optimizer import DescentState, riemannian_adam, start_descent
from drgr.budgets.static.relaxation import Relaxation
from drgr.errors import NonFiniteLossError

GatesLoss = Callable[[Tensor], Tensor]


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class SearchSettings:
    """How long and how boldly to search; the defaults are those published for expert pruning.

    Args:
        num_steps: Steps of Adam.
        learning_rate: In logits.
        first_temperature: Of the Gumbel noise at the first step.
        last_temperature: At the last; in between it falls exponentially.
        num_samples: Choices sampled in a step, each one evaluation of the loss.
        antithetic: Whether samples come in mirrored pairs.
        entropy_weight: Weight of the mean entropy of the choices, added to the loss; above 0 it
            makes them decide sooner.

    Raises:
        ValueError: If a number is out of range.

    References:
        RCO, arXiv 2605.00649.

    Examples:
        >>> SearchSettings(num_steps=50).temperature(49)
        0.05
    """

    num_steps: int = 200
    learning_rate: float = 0.1
    first_temperature: float = 1.0
    last_temperature: float = 0.05
    num_samples: int = 4
    antithetic: bool = True
    entropy_weight: float = 0.0

    def __post_init__(self) -> None:
        for name in ("num_steps", "learning_rate", "last_temperature", "num_samples"):
            check_positive(name, getattr(self, name))
        check_not_negative("entropy_weight", self.entropy_weight)
        if not self.last_temperature <= self.first_temperature < float("inf"):
            raise ValueError(
                f"first_temperature must be finite and at least last_temperature, "
                f"{self.last_temperature}, got {self.first_temperature}; noise must not grow"
            )
        if self.antithetic and self.num_samples % 2:
            raise ValueError(
                f"num_samples must be even where antithetic, got {self.num_samples}; "
                f"take {self.num_samples + 1} or antithetic=False"
            )

    def temperature(self, step: int) -> float:
        """Returns the temperature of a step, counted from 0."""
        done = step / max(1, self.num_steps - 1)
        fall = self.last_temperature / self.first_temperature
        return max(self.last_temperature, self.first_temperature * float(fall**done))


class Sample(NamedTuple):
    """A sampled choice, which is inside the budgets, with its loss."""

    options: Tensor
    loss: float


@final
@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class SearchResult:
    """Where a search ended."""

    state: DescentState
    losses: tuple[float, ...]
    """Mean loss of the sampled choices of each step."""
    best: Sample | None
    """The sample of least loss; None without any."""


def search(
    loss_of_gates: GatesLoss,
    relaxation: Relaxation,
    knapsack: ChoiceKnapsack,
    settings: SearchSettings,
    *,
    generator: torch.Generator,
) -> SearchResult:
    """Runs the steps; ends early where a retraction does not converge, which its status tells."""
    budgets = relaxation.budgets or _no_budgets(relaxation.logits)
    state = start_descent(relaxation.logits, budgets)
    losses: list[float] = []
    best: Sample | None = None
    for step in range(settings.num_steps):
        if not state.retraction.status.succeeded:
            break
        noise = gumbel_noise(
            (relaxation.num_items, state.logits.shape[1]),
            num_samples=settings.num_samples,
            antithetic=settings.antithetic,
            generator=generator,
        )
        samples, gradient = _sampled_gradient(
            loss_of_gates,
            state.logits,
            noise,
            knapsack,
            temperature=settings.temperature(step),
            entropy_weight=settings.entropy_weight,
        )
        losses.append(sum(sample.loss for sample in samples) / len(samples))
        best = min([*samples, *([best] if best else [])], key=lambda sample: sample.loss)
        state = riemannian_adam(state, gradient, budgets, learning_rate=settings.learning_rate)
    return SearchResult(state=state, losses=tuple(losses), best=best)


def checked_loss(loss_of_gates: GatesLoss, gates: Tensor) -> Tensor:
    """Returns the loss of gates after checking that it is one finite number.

    Raises:
        ValueError: If it is not a scalar.
        NonFiniteLossError: If it is not finite.
    """
    loss = loss_of_gates(gates)
    if loss.dim() != 0:
        raise ValueError(
            f"loss_of_gates must return a scalar, got shape {tuple(loss.shape)}; take the mean"
        )
    if not bool(loss.isfinite()):
        raise NonFiniteLossError(
            f"loss_of_gates must return a finite loss, got {loss.item()}; "
            "check the model under the gates that it was given"
        )
    return loss


def gradient_of_gates(loss: Tensor, variable: Tensor) -> Tensor:
    """Returns the gradient of a loss in the logits or gates that it came from.

    Raises:
        ValueError: If the loss does not depend on them.
    """
    if not loss.requires_grad:
        raise ValueError(
            "loss_of_gates must be differentiable in the gates, got a loss without a gradient; "
            "multiply by the gates, and neither detach nor round them"
        )
    (gradient,) = torch.autograd.grad(loss, variable, allow_unused=True)
    if gradient is None:
        raise ValueError(
            "loss_of_gates must depend on the gates, got a loss that uses other variables only; "
            "multiply the outputs of experts by their gates"
        )
    return gradient


def _no_budgets(logits: Tensor) -> ChoiceBudgets:
    return ChoiceBudgets(logits.new_zeros(0, *logits.shape), logits.new_zeros(0))


def _sampled_gradient(
    loss_of_gates: GatesLoss,
    logits: Tensor,
    noise: Tensor,
    knapsack: ChoiceKnapsack,
    *,
    temperature: float,
    entropy_weight: float,
) -> tuple[list[Sample], Tensor]:
    """Returns the samples and the gradient of their mean loss in all logits, one at a time."""
    num_samples, num_items = noise.shape[:2]
    gradient, samples = torch.zeros_like(logits), []
    for draw in noise:
        leaf = logits.detach().requires_grad_()
        drawn = straight_through(
            leaf[:num_items],
            draw,
            temperature=temperature,
            choose=lambda perturbed: knapsack.best(perturbed).options,
        )
        loss = checked_loss(loss_of_gates, drawn.gates)
        gradient += gradient_of_gates(loss, leaf) / num_samples
        samples.append(Sample(drawn.choice, loss.item()))
    if entropy_weight:
        leaf = logits.detach().requires_grad_()
        entropy = mean_entropy(leaf[:num_items])
        gradient += entropy_weight * torch.autograd.grad(entropy, leaf)[0]
    return samples, gradient


def mean_entropy(logits: Tensor) -> Tensor:
    """Returns the mean entropy of the choices in nats, options of probability 0 adding nothing."""
    allowed = logits > -torch.inf
    probabilities = torch.softmax(logits, dim=-1)
    logs = torch.log_softmax(torch.where(allowed, logits, -1e4), dim=-1)
    terms = torch.where(allowed, probabilities * logs, 0.0)
    return -terms.sum(dim=-1).mean()
