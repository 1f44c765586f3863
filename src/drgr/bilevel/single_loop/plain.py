"""Directions on fresh batches."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import final

from drgr.bilevel.single_loop.estimator import Directions, Memory, Start, drawn_directions
from drgr.bilevel.single_loop.oracle import Oracle, Point


@final
@dataclass(frozen=True, slots=True)
class SOBA:
    """Moves ``y``, ``z`` and ``x`` at once along the three directions on one pair of batches.

    ``D_y = grad_y g``, ``D_z = H z - grad_y F``, ``D_x = grad_x F - J z``; each is unbiased at the
    current point. Step sizes that fall like ``(t + 1)^(-1/2)`` bring the squared gradient of
    ``F(x, y*(x))`` down like ``t^(-1/2)`` up to a logarithm.

    Complexity:
        4 oracle calls a step, no memory beside ``z``.

    References:
        Dagreou, Ablin, Vaiter, Moreau, *A framework for bilevel optimization that enables
        stochastic and global variance reduction algorithms*, 2022.

    Examples:
        >>> import torch
        >>> from drgr.bilevel import FiniteSumProblem, SingleLoop
        >>> problem = FiniteSumProblem(
        ...     inner_loss=lambda x, y, batch: (y - 2 * x).square().sum(),
        ...     outer_loss=lambda x, y, batch: (y - 3).square().sum(),
        ...     inner_batches=range(1),
        ...     outer_batches=range(1),
        ... )
        >>> method = SingleLoop(
        ...     estimator=SOBA(),
        ...     inner_optimizer=lambda params: torch.optim.SGD(params, lr=0.3),
        ...     auxiliary_step=0.3,
        ...     outer_step=0.02,
        ... )
        >>> result = method.minimize(problem, torch.zeros(1), torch.zeros(1), num_steps=200)
        >>> round(result.outer_params.item(), 3), result.calls.total
        (1.5, 800)
    """

    def start(self, oracle: Oracle, point: Point) -> Start:  # noqa: ARG002
        """Begins at ``z = 0`` and remembers nothing."""
        return Start(point.auxiliary, {})

    def directions(
        self,
        oracle: Oracle,
        point: Point,
        memory: Memory,  # noqa: ARG002
        step: int,  # noqa: ARG002
    ) -> Iterator[Directions]:
        """Yields the three directions."""
        yield Directions(*drawn_directions(oracle, point))
