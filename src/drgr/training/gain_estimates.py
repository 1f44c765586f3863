"""Estimates of what a step on a domain gains: averaged, and compared with what came of it."""

from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor


@final
@dataclass(slots=True)
class GainAverage:
    """A mean with exponentially falling weights that starts without bias."""

    smoothing: float
    total: Tensor | None = None
    weight: float = 0.0

    def updated(self, value: Tensor) -> Tensor:
        """Takes in a value and returns the mean."""
        before = torch.zeros_like(value) if self.total is None else self.total
        self.total = self.smoothing * before + value
        self.weight = self.smoothing * self.weight + 1
        return self.total / self.weight

    def state_dict(self) -> dict[str, Any]:
        """Returns what a resumed run needs."""
        return {"total": self.total, "weight": self.weight}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores :meth:`state_dict`."""
        self.total, self.weight = state["total"], state["weight"]


@final
@dataclass(slots=True)
class Calibration:
    """Least-squares factor from predicted to observed falls of losses."""

    smoothing: float
    products: float = 0.0
    squares: float = 0.0
    predicted: Tensor | None = None
    before: Tensor | None = None

    def updated(self, losses: Tensor) -> float | None:
        """Compares the last prediction with what came; returns the factor, not below 0.

        None before the first comparison.
        """
        if self.predicted is not None and self.before is not None:
            observed = self.before - losses
            self.products = self.smoothing * self.products + float(observed @ self.predicted)
            self.squares = self.smoothing * self.squares + float(self.predicted @ self.predicted)
        return max(self.products, 0.0) / self.squares if self.squares > 0 else None

    def predict(self, fall: Tensor, losses: Tensor) -> None:
        """Keeps a prediction for the next comparison."""
        self.predicted, self.before = fall, losses

    def state_dict(self) -> dict[str, Any]:
        """Returns what a resumed run needs."""
        return {name: getattr(self, name) for name in self.__slots__}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores :meth:`state_dict`."""
        for name in self.__slots__:
            setattr(self, name, state[name])
