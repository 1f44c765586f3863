r"""A coefficient that falls while its loss falls and rises when the loss rises.

After ``warmup`` steps at ``lambda_0``, each window of ``W`` steps begins with

.. math:: \rho = \frac{\text{mean loss of the last } W \text{ steps}}
                      {\text{mean loss of the } W \text{ before}} , \qquad
          \rho \leftarrow \max(\rho, 1 + r) \text{ if } \rho > 1 , \qquad
          \rho \leftarrow \min(\rho,\; m \lambda_0 / \lambda) ,

and over the window ``lambda`` moves linearly to ``rho`` times itself.
"""

import math
from collections.abc import Mapping
from typing import final

from drgr._checks import check_not_negative, check_positive


@final
class AdaptiveWeight:
    """Holds the coefficient of one loss, the chunk sparsity loss for instance.

    Args:
        initial: The coefficient ``lambda_0`` above 0.
        warmup: Steps at ``lambda_0``; at least two windows.
        window: Steps ``W`` of a window.
        smallest_rise: By which share ``r`` the coefficient rises at least, when the loss rose.
        largest: How many times ``lambda_0`` the coefficient may be, ``m``.

    Raises:
        ValueError: If an argument is out of range.

    References:
        Song et al., *BlockFFN*, 2025 (arXiv:2507.08771); the rule is that of the authors' program,
        with its constants as defaults.
    """

    def __init__(
        self,
        initial: float,
        *,
        warmup: int = 1000,
        window: int = 100,
        smallest_rise: float = 0.025,
        largest: float = 4.0,
    ) -> None:
        check_positive("initial", initial)
        check_positive("window", window)
        check_not_negative("smallest_rise", smallest_rise)
        if not (math.isfinite(largest) and largest >= 1):
            raise ValueError(f"largest must be a finite number of at least 1, got {largest}")
        if warmup < 2 * window:
            raise ValueError(
                f"warmup must be at least two windows, {2 * window} steps, got {warmup}; raise it "
                f"or shorten the window"
            )
        self._initial, self._warmup, self._window = initial, warmup, window
        self._smallest_rise, self._largest = smallest_rise, largest
        self._start = self._target = initial
        self._step = 0
        self._losses: list[float] = []

    @property
    def value(self) -> float:
        """The coefficient of the next step."""
        done = (self._step - self._warmup) % self._window if self._step >= self._warmup else 0
        return self._start + (self._target - self._start) * done / self._window

    def update(self, loss: float) -> None:
        """Takes in the loss of one optimizer step, the same on every process.

        Raises:
            ValueError: If ``loss`` is negative or not finite.
        """
        check_not_negative("loss", loss)
        self._losses = [*self._losses, loss][-2 * self._window :]
        self._step += 1
        if self._step >= self._warmup and (self._step - self._warmup) % self._window == 0:
            self._start = self._target
            self._target = self._start * self._factor()

    def _factor(self) -> float:
        """Returns ``rho`` of the last two windows."""
        before = math.fsum(self._losses[: self._window])
        last = math.fsum(self._losses[self._window :])
        cap = self._largest * self._initial / self._start
        if last == 0:
            return 1.0  # From a coefficient of 0 there would be no way up.
        if before == 0:
            return cap
        ratio = last / before
        if ratio > 1:
            ratio = max(ratio, 1 + self._smallest_rise)
        return min(ratio, cap)

    def state_dict(self) -> dict[str, list[float]]:
        """Returns what a resumed run needs."""
        return {
            "progress": [float(self._step), self._start, self._target],
            "losses": list(self._losses),
        }

    def load_state_dict(self, state: Mapping[str, list[float]]) -> None:
        """Restores :meth:`state_dict`."""
        step, self._start, self._target = state["progress"]
        self._step = int(step)
        self._losses = list(state["losses"])
