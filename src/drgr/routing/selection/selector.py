"""The one interface of everything that decides which experts of a token run."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol, final

from torch import Tensor
from torch.distributed import ProcessGroup

from drgr.budgets import Selection
from drgr.routing.place import LayerPlace
from drgr.routing.plan import LayerRouting


@final
@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class SelectionInputs:
    """What a selection may look at.

    Attributes:
        values: Worth of each assignment, scores less prices, shape ``(T, E)``; ``-inf`` forbids
            one.
        scores: The scores themselves, shape ``(T, E)``, detached.
        valid: Which tokens are real, shape ``(T,)``, bool; ``None`` where all are. Padding gets no
            expert.
        is_open: Which experts the scorer would run by itself, bool, shape ``(T, E)``; ``None``
            where it has no opinion.
        sequence_length: Tokens of each sequence, padding included; ``None`` where not known.
        exact: Whether bounds hold exactly over the batch (training), or every token decides alone
            (evaluation), so that decoding token by token gives the same routes.
        group: Processes that share the batch.
    """

    values: Tensor
    scores: Tensor
    valid: Tensor | None = None
    is_open: Tensor | None = None
    sequence_length: int | None = None
    exact: bool = True
    group: ProcessGroup | None = None


class Selector(Protocol):
    """Chooses the experts of each token by their worth.

    State moves in :meth:`update` only, once an optimizer step, from what was observed before.
    """

    @property
    def maximum(self) -> int:
        """Most experts ``K`` of a token at any time."""
        ...

    @property
    def price(self) -> Tensor | None:
        """What an extra expert must be worth at evaluation, scalar; ``None`` where not learned."""
        ...

    def select(self, inputs: SelectionInputs, /) -> Selection:
        """Chooses; see :class:`~drgr.budgets.Selection` for what is returned."""
        ...

    def observe(self, routing: LayerRouting) -> None:
        """Takes in one training micro-batch of this process."""
        ...

    def update(self, group: ProcessGroup | None = None) -> None:
        """Moves what evaluation uses, over all processes."""
        ...

    def state_dict(self) -> dict[str, Tensor]:
        """Returns what a resumed run needs."""
        ...

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restores :meth:`state_dict`; raises ``ValueError`` for that of another kind."""
        ...


SelectorFactory = Callable[[LayerPlace], Selector]
"""Builds the selector of a layer, on its device."""
