r"""How many experts each layer gets, and how many a token uses as training goes on.

Six shapes over the depth ``u = l / (L - 1)``, between the least ``a`` and the most ``b``:

    uniform     (a + b) / 2            ascending  a + (b - a) u
    pyramid     a + (b - a) (1 - |2u - 1|)
    valley      b - (b - a) (1 - |2u - 1|)
    descending  b - (b - a) u          wave       a + (b - a) (1 + sin(2 pi f u)) / 2

Whole counts are the nearest with the total asked for, so that shapes compare at equal size. Names
are DynaMoE's, whose sixth name and formulas are not published; these are derived.
"""

import math
from collections.abc import Sequence
from typing import Literal

from drgr._checks import check_positive
from drgr.budgets.token_budget import TokenBudget
from drgr.errors import InfeasibleBudgetError

LayerShape = Literal["uniform", "ascending", "descending", "pyramid", "valley", "wave"]

# Marginal distances that differ by less are ties: the sine is only so exact.
_DIGITS = 9


def layer_profile(
    shape: LayerShape, *, num_layers: int, minimum: int, maximum: int, frequency: float = 1.0
) -> tuple[float, ...]:
    """Returns the shape itself, before it is given a total.

    Args:
        shape: One of the six names.
        num_layers: ``L``, at least 1; the only layer has depth 0.
        minimum: ``a``, at least 0.
        maximum: ``b``, at least ``a``.
        frequency: ``f``, waves over the depth.

    Returns:
        One number for each layer, within ``[a, b]``.

    Raises:
        ValueError: If the shape is none of the six or a number is out of range.

    References:
        DynaMoE, arXiv 2603.01697 (the idea and most names).

    Examples:
        >>> layer_profile("pyramid", num_layers=5, minimum=2, maximum=6)
        (2.0, 4.0, 6.0, 4.0, 2.0)
    """
    check_positive("num_layers", num_layers)
    check_positive("frequency", frequency)
    if minimum < 0 or maximum < minimum:
        raise ValueError(
            f"minimum and maximum must satisfy 0 <= minimum <= maximum, got {minimum} and {maximum}"
        )
    depths = [layer / max(1, num_layers - 1) for layer in range(num_layers)]
    heights = [_height(shape, depth, frequency) for depth in depths]
    return tuple(minimum + (maximum - minimum) * height for height in heights)


def layer_counts(
    shape: LayerShape,
    *,
    num_layers: int,
    total: int,
    minimum: int,
    maximum: int,
    frequency: float = 1.0,
) -> tuple[int, ...]:
    r"""Returns whole experts for each layer: the nearest to a shape that add up to the total.

    .. math:: \min_n \sum_l (n_l - w_l)^2 \ \text{s.t.}\ \sum_l n_l = N, \ a \le n_l \le b

    with ``w`` the :func:`layer_profile`. Where ``w`` has the total itself this is rounding by
    largest remainders. Of equally near counts the first layers get more.

    Args:
        shape: One of the six names.
        num_layers: ``L``.
        total: Experts of all layers, ``N``.
        minimum: Fewest of a layer, ``a``.
        maximum: Most of a layer, ``b``.
        frequency: Waves over the depth.

    Returns:
        ``L`` whole numbers. Monotone shapes stay monotone.

    Raises:
        ValueError: If the shape is none of the six or a number is out of range.
        InfeasibleBudgetError: If the total is below ``L a`` or above ``L b``.

    Complexity:
        ``O(n log n)`` for ``n = L (b - a)``.

    References:
        DynaMoE, arXiv 2603.01697. Ibaraki, Katoh, *Resource Allocation Problems*, 1988 (that taking
        the smallest increments is optimal).

    Examples:
        >>> layer_counts("descending", num_layers=4, total=18, minimum=2, maximum=8)
        (8, 5, 3, 2)
    """
    profile = layer_profile(
        shape, num_layers=num_layers, minimum=minimum, maximum=maximum, frequency=frequency
    )
    if not num_layers * minimum <= total <= num_layers * maximum:
        raise InfeasibleBudgetError(
            f"total must be within num_layers times minimum and maximum, {num_layers * minimum} "
            f"and {num_layers * maximum}, got {total}; change the total or the bounds"
        )
    counts = [minimum] * num_layers
    # The increments of one layer grow, so the smallest of all are those that come first in each.
    increments = [
        (round(2 * (count - goal) + 1, _DIGITS), layer)
        for layer, goal in enumerate(profile)
        for count in range(minimum, maximum)
    ]
    for _, layer in sorted(increments)[: total - sum(counts)]:
        counts[layer] += 1
    return tuple(counts)


def progressive_budgets(
    step: int,
    *,
    num_layers: int,
    switch_step: int,
    first: Sequence[int],
    target: int = 1,
) -> tuple[TokenBudget, ...]:
    """Returns how many experts a token uses in each layer at a step of training.

    The lowest layers begin with more experts than the target and fall to it at one step; all other
    layers have the target throughout. At the switch keep the optimizer's state. With one expert a
    token, weigh its output by the probability before any renormalisation: renormalised it is 1, and
    the router gets no gradient.

    Args:
        step: Step of training, at least 0.
        num_layers: MoE layers, lowest first.
        switch_step: First step at which every layer has the target.
        first: Experts of a token in the lowest layers before that; never rising with the layer.
        target: Experts of a token afterwards, at least 1.

    Returns:
        For each layer a budget of just so many experts for each token.

    Raises:
        ValueError: If ``first`` is longer than the layers, rises, or goes below the target, or
            another number is out of range.

    References:
        Sigma-MoE-Tiny, arXiv 2512.16248: published as a list for each layer and a restart with
        another; the constants are not published.

    Examples:
        >>> early = progressive_budgets(0, num_layers=4, switch_step=900, first=[4, 2])
        >>> [budget.maximum for budget in early]
        [4, 2, 1, 1]
        >>> late = progressive_budgets(900, num_layers=4, switch_step=900, first=[4, 2])
        >>> [budget.average for budget in late]
        [1, 1, 1, 1]
    """
    _check_progress(step, num_layers, switch_step, first, target)
    counts = [target] * num_layers
    if step < switch_step:
        counts[: len(first)] = first
    return tuple(TokenBudget(minimum=count, maximum=count, average=count) for count in counts)


def _height(shape: LayerShape, depth: float, frequency: float) -> float:
    """Returns the height of a shape between 0 and 1."""
    match shape:
        case "uniform":
            return 0.5
        case "ascending":
            return depth
        case "descending":
            return 1 - depth
        case "pyramid":
            return 1 - abs(2 * depth - 1)
        case "valley":
            return abs(2 * depth - 1)
        case "wave":
            return (1 + math.sin(2 * math.pi * frequency * depth)) / 2
        case _:
            raise ValueError(
                "shape must be uniform, ascending, descending, pyramid, valley or wave, "
                f"got {shape!r}"
            )


def _check_progress(
    step: int, num_layers: int, switch_step: int, first: Sequence[int], target: int
) -> None:
    check_positive("num_layers", num_layers)
    check_positive("target", target)
    for name, number in (("step", step), ("switch_step", switch_step)):
        if number < 0:
            raise ValueError(f"{name} must be at least 0, got {number}")
    if len(first) > num_layers:
        raise ValueError(
            f"first must have at most num_layers = {num_layers} entries, got {len(first)}; "
            "give one for each of the lowest layers"
        )
    wrong = list(first) != sorted(first, reverse=True) or min(first, default=target) < target
    if wrong:
        raise ValueError(
            f"first must never rise from layer to layer nor go below target = {target}, "
            f"got {list(first)}; lower layers are the last to become sparse"
        )
