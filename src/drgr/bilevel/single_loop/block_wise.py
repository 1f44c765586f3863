"""Directions of the blocks that a batch touched, such as the experts of its tokens."""

from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor

from drgr.bilevel.single_loop.estimator import Directions, Memory, Start
from drgr.bilevel.single_loop.oracle import Oracle, Point
from drgr.bilevel.structures import Parameters, named_leaves


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class BlockWise:
    """SOBA that moves only the blocks of ``y`` and ``z`` that the inner batch touched.

    A block is an entry of ``inner_params``, a dict, list or tuple: one expert, say, or the weights
    that all share. The others stay bit for bit, and so does what the inner optimizer knows of
    them. The outer gradient and the damping of a touched block are divided by the share of batches
    that touch it, which makes each direction unbiased over the batches.

    Args:
        touched: ``batch -> keys`` of the blocks on which the inner loss of that batch depends.

    Raises:
        ValueError: When a run starts, if ``inner_params`` has no entries to be blocks, a key is
            none of theirs, or no batch touches a block; during steps, if a batch has a gradient
            outside the blocks that it touches.

    Complexity:
        4 oracle calls a step; vectors of full size come and go within one.

    References:
        The structure of Hu, Qiu, Guo, Zhang, Yang, *Blockwise stochastic variance-reduced methods
        with parallel speedup for multi-block bilevel optimization*, 2023, without their variance
        reduction.

    Examples:
        >>> import torch
        >>> from drgr.bilevel import FiniteSumProblem, SingleLoop
        >>> problem = FiniteSumProblem(
        ...     inner_loss=lambda x, y, expert: (y[expert] - x).square(),
        ...     outer_loss=lambda x, y, batch: (y[0] - 1).square() + (y[1] - 3).square(),
        ...     inner_batches=range(2),
        ...     outer_batches=range(1),
        ... )
        >>> method = SingleLoop(
        ...     estimator=BlockWise(touched=lambda expert: [expert]),
        ...     inner_optimizer=lambda params: torch.optim.SGD(params, lr=0.3),
        ...     auxiliary_step=0.2,
        ...     outer_step=0.005,
        ... )
        >>> zero = torch.tensor(0.0)
        >>> result = method.minimize(problem, zero, [zero, zero], num_steps=1500)
        >>> abs(result.outer_params.item() - 2) < 0.2
        True
    """

    touched: Callable[[Any], Iterable[Hashable]]

    def start(self, oracle: Oracle, point: Point) -> Start:
        """Counts how many batches touch each block."""
        sizes = _block_sizes(oracle.inner_layout.like)
        counts = dict.fromkeys(sizes, 0)
        for batch in oracle.problem.inner_batches:
            for key in _known(self.touched(batch), sizes):
                counts[key] += 1
        for key, count in counts.items():
            if count == 0:
                raise ValueError(
                    f"no inner batch touches block {key!r}; leave it out of inner_params"
                )
        shares = torch.tensor(list(counts.values()), dtype=point.inner.dtype)
        shares = shares.to(point.inner.device) / len(oracle.all_inner)
        return Start(point.auxiliary, {"shares": shares})

    def directions(
        self, oracle: Oracle, point: Point, memory: Memory, step: int
    ) -> Iterator[Directions]:
        """Yields the directions, 0 outside the touched blocks."""
        index = oracle.draw_inner()
        blocks = _block_sizes(oracle.inner_layout.like)
        keys = _known(self.touched(oracle.problem.inner_batches[index]), blocks)
        is_touched = [key in keys for key in blocks]
        sizes = torch.tensor([sum(leaves) for leaves in blocks.values()])
        mask = torch.tensor(is_touched).repeat_interleave(sizes).to(point.inner.device)
        inner = oracle.inner_terms([index], point)
        _check_untouched(inner.gradient, mask, index, step)
        outer = oracle.outer_gradients([oracle.draw_outer()], point.outer, point.inner)
        weights = memory["shares"].repeat_interleave(sizes.to(point.inner.device))
        damped = oracle.damping * point.auxiliary
        difference = inner.hessian - damped + (damped - outer.by_inner) / weights
        yield Directions(
            inner=inner.gradient,
            auxiliary=torch.where(mask, difference, 0.0),
            outer=outer.by_outer - inner.cross,
            touched=[
                moves
                for moves, leaves in zip(is_touched, blocks.values(), strict=True)
                for _ in leaves
            ],
        )


def _block_sizes(params: Parameters) -> dict[Hashable, list[int]]:
    """Returns the sizes of the tensors of each block."""
    if isinstance(params, Mapping):
        entries: dict[Hashable, Any] = dict(params)
    elif isinstance(params, (list, tuple)):
        entries = dict(enumerate(params))
    else:
        raise ValueError(
            "inner_params must be a dict, list or tuple of blocks, "
            f"got {type(params).__name__}; put the tensors of each expert in an entry"
        )
    return {
        key: [leaf.numel() for _, leaf in named_leaves(entry)] for key, entry in entries.items()
    }


def _known(keys: Iterable[Hashable], blocks: Mapping[Hashable, Any]) -> set[Hashable]:
    found = set(keys)
    for key in found:
        if key not in blocks:
            raise ValueError(f"touched must return keys of inner_params, got {key!r}")
    return found


def _check_untouched(gradient: Tensor, mask: Tensor, index: int, step: int) -> None:
    if bool((gradient[~mask] != 0).any()):
        raise ValueError(
            f"step {step}: inner batch {index} has a gradient outside the blocks that touched() "
            "names; name them, or penalise a block on the batches that touch it alone"
        )
