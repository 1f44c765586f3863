r"""Whole choices in the forward pass, a smooth surrogate in the backward pass.

    b = (a + G) / tau, G ~ Gumbel(0, 1)       z = argmax <z, b> inside the budgets
    gates = z + phat - stopgrad(phat), phat = softmax(b)

The gradient goes through the probabilities of the same noise and temperature as the choice, so
that they concentrate on it as the temperature falls.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from drgr._checks import check_positive

# Uniform numbers are multiples of 2^-53; half of one keeps both u and 1 - u away from 0.
_HALF_STEP = 2.0**-54


class GumbelChoice(NamedTuple):
    """A whole choice with the gradient of its surrogate."""

    gates: Tensor
    """One-hot rows with the surrogate's gradient, shape ``(N, K)``, float64."""
    choice: Tensor
    """The option of each item, int64, shape ``(N,)``."""


def gumbel_noise(
    shape: tuple[int, ...],
    *,
    num_samples: int,
    generator: torch.Generator,
    antithetic: bool = False,
) -> Tensor:
    r"""Draws standard Gumbel noise, ``G = -log(-log u)``.

    Args:
        shape: Shape of one sample.
        num_samples: Samples ``S``, at least 1; even where antithetic.
        generator: Source of randomness, on the CPU.
        antithetic: Whether samples come in pairs from ``u`` and ``1 - u``, the second half of the
            samples mirroring the first. Each is still Gumbel noise; ``-G`` would not be.

    Returns:
        Shape ``(S, *shape)``, float64.

    Raises:
        ValueError: If ``num_samples`` is below 1, or odd where antithetic.

    Complexity:
        Linear in the size.

    Examples:
        >>> import torch
        >>> noise = gumbel_noise(
        ...     (2, 3), num_samples=4, generator=torch.Generator().manual_seed(0), antithetic=True
        ... )
        >>> u = torch.exp(-torch.exp(-noise))
        >>> noise.shape, bool(torch.allclose(u[:2] + u[2:], torch.ones(1, dtype=u.dtype)))
        (torch.Size([4, 2, 3]), True)
    """
    check_positive("num_samples", num_samples)
    if antithetic and num_samples % 2:
        raise ValueError(
            f"num_samples must be even where antithetic, got {num_samples}; "
            f"take {num_samples + 1} or antithetic=False"
        )
    drawn = num_samples // 2 if antithetic else num_samples
    uniform = torch.rand((drawn, *shape), dtype=torch.float64, generator=generator) + _HALF_STEP
    if antithetic:
        uniform = torch.cat([uniform, 1 - uniform])
    return -torch.log(-torch.log(uniform))


def straight_through(
    logits: Tensor, noise: Tensor, *, temperature: float, choose: Callable[[Tensor], Tensor]
) -> GumbelChoice:
    r"""Chooses by perturbed logits, with the gradient of their softmax.

    The gradient of ``<w, gates>`` in the logits is ``phat (w - <phat, w>) / tau`` for each item.

    Args:
        logits: Logits ``a``, finite or ``-inf``, shape ``(N, K)``; gradients reach them.
        noise: One sample of :func:`gumbel_noise`, shape ``(N, K)``.
        temperature: ``tau``, above 0.
        choose: Maps perturbed logits ``(N, K)`` to the option of each item, int64 ``(N,)``; for
            instance the best inside a budget (:class:`ChoiceKnapsack`).

    Returns:
        The gates, whose values are exactly 0 and 1, and the choice.

    Raises:
        ValueError: If the temperature is not above 0 or shapes differ.

    Complexity:
        ``O(N K)`` and that of ``choose``.

    References:
        RCO, arXiv 2605.00649. Jang, Gu, Poole, *Categorical Reparameterization with
        Gumbel-Softmax*, 2017. Bengio, Leonard, Courville, 2013 (straight-through).

    Examples:
        >>> import torch
        >>> logits = torch.tensor([[0.0, 1.0], [2.0, 0.0]], requires_grad=True)
        >>> drawn = straight_through(
        ...     logits, torch.zeros(2, 2), temperature=1.0, choose=lambda b: b.argmax(dim=1)
        ... )
        >>> drawn.gates[:, 1].sum().backward()
        >>> drawn.choice, logits.grad[:, 1]
        (tensor([1, 0]), tensor([0.1966, 0.1050]))
    """
    check_positive("temperature", temperature)
    if logits.shape != noise.shape:
        raise ValueError(
            f"noise must have the shape of logits, {tuple(logits.shape)}, got {tuple(noise.shape)}"
        )
    perturbed = (logits.double() + noise) / temperature
    choice = choose(perturbed.detach())
    chosen = torch.nn.functional.one_hot(choice, logits.shape[-1]).double()
    soft = torch.softmax(perturbed, dim=-1)
    return GumbelChoice(chosen + (soft - soft.detach()), choice)
