"""Bytes that a run keeps between steps, and bytes of tensors alive while it takes them."""

import weakref
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from drgr.bilevel import SingleLoopRun


class LiveBytes(TorchDispatchMode):
    """Watches the storages of tensors that operations make while it is entered.

    Tensors made before do not count, and neither does what one operation allocates and frees
    within itself.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = 0
        self.peak = 0
        self._alive: set[int] = set()

    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Calls the operation and notes what it made."""
        # A view of a tensor made before is not a new storage.
        given = {storage._cdata for storage in _storages((args, kwargs))}
        made = func(*args, **(kwargs or {}))
        for storage in _storages(made):
            if storage._cdata not in given:
                self._note(storage)
        return made

    def _note(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._alive:
            return
        self._alive.add(key)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._forget, key, size)

    def _forget(self, key: int, size: int) -> None:
        self._alive.discard(key)
        self.now -= size


def _storages(tree: Any) -> list[torch.UntypedStorage]:
    return [leaf.untyped_storage() for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def kept_bytes(run: SingleLoopRun) -> dict[str, int]:
    """Returns the bytes of every tensor kept between steps, by part.

    Beyond ``x`` and the generator of batches, which all methods keep. Tensors are those of the
    saved state, and the coordinates that a subspace method trains, which are 0 between steps and
    not saved.
    """
    state = run.state_dict()
    optimizer = state["inner"]["optimizer"]["state"]
    moments = [part for parts in optimizer.values() for part in parts.values()]
    kept: dict[str, list[Tensor]] = {
        "inner": [state["inner"]["vector"]],
        "auxiliary": [state["auxiliary"]],
        "optimizer": [part for part in moments if isinstance(part, Tensor)],
        **{name: [tensor] for name, tensor in state["memory"].items()},
    }
    counted = sum(part.numel() for name, parts in kept.items() for part in parts if name != "inner")
    coordinates = run.result().state_numel - counted
    sizes = {name: sum(part.nbytes for part in parts) for name, parts in kept.items()}
    return sizes | {"coordinates": coordinates * state["inner"]["vector"].element_size()}
