"""The best items where each is taken for one unit of one budget or left: the largest gains."""

import numpy as np
from numpy.typing import NDArray


class Exhausted(Exception):  # noqa: N818 - an outcome that the caller turns into its own error
    """No choice is inside the budget."""


def best_unit_items(
    values: NDArray[np.float64], costs: NDArray[np.int64], cap: int, *, exactly: bool
) -> NDArray[np.intp]:
    """Returns the option of each item, of two that cost 0 and 1 in either order.

    What taking an item gains is the difference of its values; the ``cap`` largest gains are best,
    those above 0 alone where less may be spent. Equal gains are taken in the order of the items.

    Args:
        values: Finite or ``-inf``, at most one ``-inf`` in a row, shape ``(N, 2)``.
        costs: 0 and 1, or 1 and 0, in each row, shape ``(N, 2)``.
        cap: Items that may be taken.
        exactly: Whether just as many must be taken.

    Raises:
        Exhausted: If more items must be taken than may, or fewer may than must.
    """
    rows = np.arange(len(values))
    dear = costs.argmax(axis=1)
    gain = values[rows, dear] - values[rows, 1 - dear]
    order = np.argsort(-gain, kind="stable")
    ranked = gain[order]
    num_forced, num_allowed = int((ranked == np.inf).sum()), int((ranked > -np.inf).sum())
    if num_forced > cap or (exactly and num_allowed < cap):
        raise Exhausted
    count = cap if exactly else min(cap, int((ranked > 0).sum()))
    options: NDArray[np.intp] = 1 - dear
    options[order[:count]] = dear[order[:count]]
    return options
