"""The inner parameters as one vector that a torch optimizer moves."""

import copy
from collections.abc import Mapping
from typing import Any, final

import torch
from torch import Tensor

from drgr.bilevel.inner_level import InnerOptimizer
from drgr.bilevel.single_loop.basis import Basis
from drgr.bilevel.structures import Layout, named_leaves


@final
class InnerVariable:
    """One flat vector; the optimizer trains views of it, or coordinates in a subspace.

    Args:
        layout: Of the inner parameters.
        vector: First value, shape ``(d,)``; changes in place.
        make_optimizer: Makes the optimizer.
        num_coordinates: Entries to train in place of the parameters; None trains these.

    Raises:
        ValueError: If the optimizer calls for losses.
    """

    def __init__(
        self,
        layout: Layout,
        vector: Tensor,
        make_optimizer: InnerOptimizer,
        num_coordinates: int | None,
    ) -> None:
        self.vector = vector
        self._make = make_optimizer
        self._shapes = [leaf.shape for _, leaf in named_leaves(layout.like)]
        self._num_coordinates = num_coordinates or 0
        if num_coordinates is None:
            self._trained = [part.detach() for part in self._parts(vector)]
        else:
            self._trained = [vector.new_zeros(num_coordinates)]
        for tensor in self._trained:
            tensor.requires_grad_()
        self.renew_optimizer()

    @property
    def state_numel(self) -> int:
        """Entries of the optimizer's state, and of the coordinates."""
        states = (tensor for state in self._optimizer.state.values() for tensor in state.values())
        count = sum(tensor.numel() for tensor in states if isinstance(tensor, Tensor))
        return count + self._num_coordinates

    def renew_optimizer(self) -> None:
        """Forgets what the optimizer knows."""
        self._optimizer = self._make(self._trained)
        if isinstance(self._optimizer, torch.optim.LBFGS):
            raise ValueError(
                "inner_optimizer must step along a given direction, got LBFGS, which calls for "
                "losses; take SGD or Adam"
            )
        self._rates = [group["lr"] for group in self._optimizer.param_groups]

    def move(
        self,
        direction: Tensor,
        *,
        factor: float,
        touched: list[bool] | None = None,
        basis: Basis | None = None,
    ) -> None:
        """Takes one step of the optimizer.

        Args:
            direction: The gradient to hand to it, shape ``(d,)``, or ``(rank,)`` with a basis.
            factor: Multiplies the learning rates that it was made with.
            touched: Which tensors to move; the others, and what the optimizer knows of them, stay.
            basis: Turns coordinates into a move of the vector.
        """
        for group, rate in zip(self._optimizer.param_groups, self._rates, strict=True):
            group["lr"] = rate * factor
        parts = [direction] if basis is not None else self._parts(direction)
        for number, (tensor, part) in enumerate(zip(self._trained, parts, strict=True)):
            tensor.grad = part if touched is None or touched[number] else None
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        if basis is not None:
            (coordinates,) = self._trained
            with torch.no_grad():
                self.vector.add_(basis.lifted(coordinates))
                coordinates.zero_()

    def state_dict(self) -> dict[str, Any]:
        """Returns copies of the vector and the optimizer's state."""
        return {
            "vector": self.vector.clone(),
            "optimizer": copy.deepcopy(self._optimizer.state_dict()),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Returns to a saved state."""
        self.vector.copy_(state["vector"])
        self._optimizer.load_state_dict(copy.deepcopy(state["optimizer"]))

    def _parts(self, vector: Tensor) -> list[Tensor]:
        sizes = [shape.numel() for shape in self._shapes]
        return [
            part.view(shape) for part, shape in zip(vector.split(sizes), self._shapes, strict=True)
        ]
