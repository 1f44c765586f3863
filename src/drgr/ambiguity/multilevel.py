"""Worst cases of a large batch, estimated without bias from small ones."""

from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from drgr._checks import check_shape
from drgr.ambiguity.divergence import Divergence
from drgr.ambiguity.spectral import Spectral
from drgr.ambiguity.worst_case import WorstCase, worst_case


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Multilevel:
    r"""Removes the bias of the worst case of a small batch, at the price of a random batch size.

    Let ``V_n`` be the expected worst case of ``n`` samples. It grows with ``n`` and stays below
    that of the population, so training on small batches minimises something smaller than it says.
    With ``n_j = 2^j smallest`` the differences ``V_{n_j} - V_{n_{j-1}}`` add up to the wanted
    ``V_{n_levels} - V_smallest``; each step estimates one of them, chosen at random:

    .. math:: J \in \{1, \dots, m\}, \quad P(J = j) = 2^{-j} \text{ for } j < m, \quad
              P(J = m) = 2^{1-m}, \qquad
              \bar V + \frac{W - \tfrac12 (H_1 + H_2)}{P(J)}

    where ``W`` is the worst case of the whole batch of ``2^J smallest`` samples, ``H_1`` and
    ``H_2`` those of its halves, and the first term the mean of those of its ``2^J`` parts of
    ``smallest`` samples. Value and gradient have exactly the expectation of those of a batch of
    ``2^levels smallest`` samples, at ``(1 + levels) smallest`` samples in expectation. The samples
    must be exchangeable: drawn independently, or at random without replacement, never sorted.

    The price is variance. With sample gradients of norm at most ``G`` the second moment of the
    estimated gradient is of order ``(1 + c levels / smallest) G^2``, where ``c`` is ``1 / alpha``
    for the conditional value at risk of level ``alpha`` and, for losses in a range of ``B``,
    ``1 + B / penalty`` for the chi-square penalty and ``exp(B / penalty)`` for the KL penalty. For
    balls there is no such bound: with rare large losses the variance under a KL ball grows nearly
    in proportion to the largest batch. Prefer a penalty.

    In several processes each may estimate on its own samples: the mean of the estimates has the
    same expectation. Generators of equal seeds make their batches equally large.

    Args:
        smallest: Number of samples in the smallest batch, at least 1.
        levels: How often it is doubled for the batch that is imitated, at least 1.

    Raises:
        ValueError: If an argument is below 1.

    References:
        Blanchet and Glynn, *Unbiased Monte Carlo for optimization and functions of expectations*,
        WSC 2015. Levy, Carmon, Duchi, Sidford, *Large-Scale Methods for Distributionally Robust
        Optimization*, NeurIPS 2020; there the first term is the first part alone. The
        mean over all parts has the same expectation and never a larger variance.

    Examples:
        >>> import torch
        >>> from drgr.ambiguity import KL, Multilevel
        >>> scheme = Multilevel(smallest=8, levels=7)
        >>> scheme.expected_batch_size
        64
        >>> generator = torch.Generator().manual_seed(0)
        >>> level = scheme.sample(generator)
        >>> losses = torch.rand(scheme.batch_size(level), generator=generator)
        >>> scheme.estimate(losses, level, divergence=KL(), penalty=1.0).shape
        torch.Size([])
    """

    smallest: int
    levels: int

    def __post_init__(self) -> None:
        """Checks the two numbers."""
        for name, value in (("smallest", self.smallest), ("levels", self.levels)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")

    @property
    def expected_batch_size(self) -> int:
        """Expected number of samples of a step, ``(1 + levels) * smallest``."""
        return (1 + self.levels) * self.smallest

    def sample(self, generator: torch.Generator | None = None) -> int:
        """Draws a level: coins are tossed until the first tail, at most ``levels - 1`` of them."""
        device = "cpu" if generator is None else generator.device
        coins = torch.randint(2, (self.levels - 1,), generator=generator, device=device)
        return 1 + int(coins.cumprod(dim=0).sum())

    def probability(self, level: int) -> float:
        """Returns ``P(J = level)``.

        Raises:
            ValueError: If ``level`` is not in ``1 .. levels``.
        """
        self._check_level(level)
        return 2.0 ** -min(level, self.levels - 1)

    def batch_size(self, level: int) -> int:
        """Returns the number of samples to draw, ``2^level * smallest``.

        Raises:
            ValueError: If ``level`` is not in ``1 .. levels``.
        """
        self._check_level(level)
        return self.smallest << level

    def estimate(
        self,
        losses: Tensor,
        level: int,
        *,
        divergence: Divergence | Spectral,
        radius: float | None = None,
        penalty: float | None = None,
    ) -> Tensor:
        """Estimates the worst case of a batch of ``2^levels * smallest`` samples.

        Args:
            losses: Losses of exchangeable samples, shape ``(batch_size(level),)``.
            level: What :meth:`sample` returned; drawn before, and independently of, the samples.
            divergence: As in :func:`worst_case`.
            radius: As in :func:`worst_case`.
            penalty: As in :func:`worst_case`.

        Returns:
            Scalar in the unit of the losses; float32 for half types, else their dtype. A single
            estimate may lie outside their range.

        Raises:
            TypeError: If losses are not floating-point tensors.
            ValueError: If a shape, the level or the size of the set is wrong, or losses are not
                finite.

        Gradients:
            Those of :func:`worst_case`: in the losses, weights that sum to 1, some of them
            negative.

        Numerics:
            Errors of the solves are multiplied by up to ``2^levels``; :meth:`worst_cases` shows
            their gaps and whether they are within tolerance.

        Complexity:
            That of the divergence on three batched problems of the size of the batch.
        """
        parts, halves, whole = self.worst_cases(
            losses, level, divergence=divergence, radius=radius, penalty=penalty
        )
        difference = whole.value - halves.value.mean()
        return parts.value.mean() + difference / self.probability(level)

    def worst_cases(
        self,
        losses: Tensor,
        level: int,
        *,
        divergence: Divergence | Spectral,
        radius: float | None = None,
        penalty: float | None = None,
    ) -> tuple[WorstCase, WorstCase, WorstCase]:
        """Returns what :meth:`estimate` combines; the arguments are the same.

        Returns:
            Worst cases of the parts, batch ``(2^level,)``; of the halves, ``(2,)``; of the whole.
        """
        check_shape("losses", losses, (self.batch_size(level),))

        def solve(batches: Tensor) -> WorstCase:
            return worst_case(batches, divergence=divergence, radius=radius, penalty=penalty)

        return (
            solve(losses.reshape(-1, self.smallest)),
            solve(losses.reshape(2, -1)),
            solve(losses),
        )

    def _check_level(self, level: int) -> None:
        if not 1 <= level <= self.levels:
            raise ValueError(
                f"level must lie in 1 .. {self.levels}, got {level}; take one from sample"
            )
