"""Directions whose noise is reduced by a memory of every batch."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from drgr.bilevel.single_loop.estimator import Directions, Memory, Start, implicit_directions
from drgr.bilevel.single_loop.oracle import Gradients, InnerTerms, Oracle, Point


@final
@dataclass(frozen=True, slots=True)
class SABA:
    """Reduces the noise of all five derivatives like SAGA: constant steps, no noise in the end.

    Each derivative is estimated by ``new_i - old_i + mean of old`` with the drawn batch's last
    value ``old_i``. The means are kept up by their changes, whose rounding adds up: take float64
    for long runs. Starts with one pass over all batches. Linear convergence where ``F(x, y*(x))``
    grows at least quadratically, O(1/T) elsewhere.

    Complexity:
        4 oracle calls a step. Memory of ``2 d_y + d_x`` for each inner and ``d_y + d_x`` for each
        outer batch: for small models only, unusable for experts.

    References:
        Dagreou, Ablin, Vaiter, Moreau, *A framework for bilevel optimization that enables
        stochastic and global variance reduction algorithms*, 2022. Defazio, Bach, Lacoste-Julien,
        *SAGA*, 2014.

    Examples:
        >>> import torch
        >>> from drgr.bilevel import FiniteSumProblem, SingleLoop
        >>> problem = FiniteSumProblem(
        ...     inner_loss=lambda x, y, value: (y - value * x).square() / 2,
        ...     outer_loss=lambda x, y, value: (y - value).square() / 2,
        ...     inner_batches=[1.0, 2.0, 3.0],
        ...     outer_batches=[3.0, 5.0],
        ... )
        >>> method = SingleLoop(
        ...     estimator=SABA(),
        ...     inner_optimizer=lambda params: torch.optim.SGD(params, lr=0.2),
        ...     auxiliary_step=0.2,
        ...     outer_step=0.05,
        ... )
        >>> zero = torch.tensor(0.0)
        >>> result = method.minimize(problem, zero, zero, num_steps=1000)
        >>> round(result.outer_params.item(), 3)
        2.0
    """

    def start(self, oracle: Oracle, point: Point) -> Start:
        """Fills the memory at the first point: one full pass."""
        memory: Memory = {}
        outer, inner = point.outer, point.inner
        _remember(
            memory,
            InnerTerms._fields,
            [oracle.inner_terms([index], point) for index in oracle.all_inner],
        )
        _remember(
            memory,
            Gradients._fields,
            [oracle.outer_gradients([index], outer, inner) for index in oracle.all_outer],
        )
        return Start(point.auxiliary, memory)

    def directions(
        self,
        oracle: Oracle,
        point: Point,
        memory: Memory,
        step: int,  # noqa: ARG002
    ) -> Iterator[Directions]:
        """Yields the three directions."""
        inner, outer = oracle.draw_inner(), oracle.draw_outer()
        terms = oracle.inner_terms([inner], point)
        gradients = oracle.outer_gradients([outer], point.outer, point.inner)
        reduced = implicit_directions(
            InnerTerms(*_reduced(memory, InnerTerms._fields, inner, terms)),
            Gradients(*_reduced(memory, Gradients._fields, outer, gradients)),
        )
        yield Directions(*reduced)


def _remember(memory: Memory, names: Sequence[str], rows: Sequence[tuple[Tensor, ...]]) -> None:
    for name, values in zip(names, zip(*rows, strict=True), strict=True):
        memory[name] = torch.stack(values)
        memory[f"mean {name}"] = memory[name].mean(dim=0)


def _reduced(
    memory: Memory, names: Sequence[str], index: int, values: tuple[Tensor, ...]
) -> Iterator[Tensor]:
    """Yields the estimates and puts the new values in the place of the old ones."""
    for name, value in zip(names, values, strict=True):
        rows, mean = memory[name], memory[f"mean {name}"]
        change = value - rows[index]
        yield mean + change
        rows[index] = value
        mean.add_(change, alpha=1 / len(rows))
