r"""Descent that stays on the budgets: project the gradient, step, retract, transport the momentum.

    g <- P(g) at a          a <- R(a - step)          m <- P_new(m)

The step is that of Adam or of gradient descent with momentum. Adam scales each coordinate for
itself, which leaves the tangent plane; that the budgets are met is the retraction's doing.
"""

from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from drgr._checks import check_positive, check_share
from drgr.budgets.static.choices import ChoiceBudgets
from drgr.budgets.static.retraction import Retraction, retract
from drgr.budgets.static.tangent import normal_basis, project_tangent, transport


@final
@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class DescentState:
    """A point on the budgets with the moments of the optimizer, all float64 ``(N, K)``."""

    logits: Tensor
    momentum: Tensor
    """First moment, a tangent vector at ``logits``."""
    second_moment: Tensor
    num_steps: int
    retraction: Retraction
    """The last one; its status tells whether the budgets are met."""


def start_descent(logits: Tensor, budgets: ChoiceBudgets) -> DescentState:
    """Returns the state of an optimizer that starts at the retraction of given logits.

    Args:
        logits: Logits, finite or ``-inf``, shape ``(N, K)``; zeros favour no option.
        budgets: The budgets.

    Raises:
        ValueError: If the logits do not fit the budgets.
        InfeasibleBudgetError: If a limit is out of reach.

    Examples:
        >>> import torch
        >>> budgets = ChoiceBudgets(torch.tensor([[0.0, 1.0], [0.0, 1.0]]), 1.0)
        >>> start_descent(torch.zeros(2, 2), budgets).retraction.status.name
        'CONVERGED'
    """
    found = retract(logits, budgets)
    zero = torch.zeros_like(found.logits)
    return DescentState(
        logits=found.logits, momentum=zero, second_moment=zero, num_steps=0, retraction=found
    )


def riemannian_adam(
    state: DescentState,
    gradient: Tensor,
    budgets: ChoiceBudgets,
    *,
    learning_rate: float,
    betas: tuple[float, float] = (0.9, 0.999),
    epsilon: float = 1e-8,
) -> DescentState:
    r"""Takes a step of Adam on the projected gradient, then retracts and transports.

    With ``g`` the projected gradient: ``m = b_1 m + (1 - b_1) g``, ``v = b_2 v + (1 - b_2) g^2``,
    ``a - rate mhat / (sqrt(vhat) + epsilon)`` with moments corrected for their start at 0.

    Args:
        state: Where the last step ended.
        gradient: Gradient of the loss in the logits, finite, shape ``(N, K)``.
        budgets: The budgets.
        learning_rate: Above 0, in logits.
        betas: ``b_1`` and ``b_2``, each in ``[0, 1)``.
        epsilon: Above 0.

    Returns:
        The next state; see the status of its ``retraction``.

    Raises:
        ValueError: If a number is out of range or the gradient is not finite.

    Complexity:
        That of :func:`retract` and :func:`normal_basis`, the latter twice.

    References:
        RCO, arXiv 2605.00649.

    Examples:
        >>> import torch
        >>> budgets = ChoiceBudgets(torch.tensor([[0.0, 1.0], [0.0, 1.0]]), 1.0)
        >>> state = start_descent(torch.zeros(2, 2), budgets)
        >>> gain = torch.tensor([[0.0, -1.0], [0.0, 0.0]])
        >>> for _ in range(20):
        ...     state = riemannian_adam(state, gain, budgets, learning_rate=0.1)
        >>> torch.softmax(state.logits, dim=1)[:, 1].round(decimals=2)
        tensor([0.8800, 0.1200], dtype=torch.float64)
    """
    check_positive("learning_rate", learning_rate)
    check_positive("epsilon", epsilon)
    for name, beta in zip(("betas[0]", "betas[1]"), betas, strict=True):
        check_share(name, beta)
    tangent = _tangent(state, gradient, budgets)
    steps = state.num_steps + 1
    momentum = betas[0] * state.momentum + (1 - betas[0]) * tangent
    second = betas[1] * state.second_moment + (1 - betas[1]) * tangent.square()
    scale = (second / (1 - betas[1] ** steps)).sqrt() + epsilon
    step = learning_rate / (1 - betas[0] ** steps) * momentum / scale
    return _moved(state, budgets, step=step, momentum=momentum, second=second)


def riemannian_sgd(
    state: DescentState,
    gradient: Tensor,
    budgets: ChoiceBudgets,
    *,
    learning_rate: float,
    momentum: float = 0.0,
) -> DescentState:
    r"""Takes a step of descent with heavy-ball momentum, ``m = mu m + g``, ``a - rate m``.

    Args:
        state: Where the last step ended.
        gradient: Gradient of the loss in the logits, finite, shape ``(N, K)``.
        budgets: The budgets.
        learning_rate: Above 0, in logits per unit of gradient.
        momentum: ``mu``, in ``[0, 1)``.

    Returns:
        The next state; see the status of its ``retraction``.

    Raises:
        ValueError: If a number is out of range or the gradient is not finite.

    Complexity:
        That of :func:`retract` and :func:`normal_basis`, the latter twice.

    References:
        Absil, Mahony, Sepulchre, *Optimization Algorithms on Matrix Manifolds*, 2008, chapter 4.

    Examples:
        >>> import torch
        >>> budgets = ChoiceBudgets(torch.tensor([[0.0, 1.0], [0.0, 1.0]]), 1.0)
        >>> state = start_descent(torch.zeros(2, 2), budgets)
        >>> gain = torch.tensor([[0.0, -1.0], [0.0, 0.0]])
        >>> for _ in range(20):
        ...     state = riemannian_sgd(state, gain, budgets, learning_rate=0.2)
        >>> torch.softmax(state.logits, dim=1)[:, 1].round(decimals=2)
        tensor([0.8800, 0.1200], dtype=torch.float64)
    """
    check_positive("learning_rate", learning_rate)
    check_share("momentum", momentum)
    velocity = momentum * state.momentum + _tangent(state, gradient, budgets)
    return _moved(
        state,
        budgets,
        step=learning_rate * velocity,
        momentum=velocity,
        second=state.second_moment,
    )


def _tangent(state: DescentState, gradient: Tensor, budgets: ChoiceBudgets) -> Tensor:
    if not bool(gradient.isfinite().all()):
        index = tuple((~gradient.isfinite()).nonzero()[0].tolist())
        raise ValueError(
            f"gradient must be finite, got {gradient[index].item()} at index {index}; "
            "rescale the loss or lower the learning rate"
        )
    return project_tangent(gradient, normal_basis(state.logits, budgets))


def _moved(
    state: DescentState, budgets: ChoiceBudgets, *, step: Tensor, momentum: Tensor, second: Tensor
) -> DescentState:
    found = retract(state.logits - step, budgets)
    return DescentState(
        logits=found.logits,
        momentum=transport(momentum, normal_basis(found.logits, budgets)),
        second_moment=second,
        num_steps=state.num_steps + 1,
        retraction=found,
    )
