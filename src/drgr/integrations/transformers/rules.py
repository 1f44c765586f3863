"""From a router's input and logits to scores, and on to combine weights, in an attached model.

Either the model's own rule, which ``contract.py`` found, or a :class:`~drgr.routing.scores.Scorer`
in its place.
"""

from typing import Protocol, final

import torch
from torch import Tensor, nn

from drgr.integrations.transformers.contract import RouterContract
from drgr.routing.scores import RouterScores, Scorer


class RouterRule(Protocol):
    """The rule of one layer."""

    def read(self, hidden: Tensor, logits: Tensor, usable: Tensor | None) -> RouterScores:
        """Scores all experts.

        Args:
            hidden: What the router saw, shape ``(T, D)``.
            logits: The router's own logits, shape ``(T, E)``.
            usable: Which experts a token may select, bool, ``(T, E)`` or ``(1, E)``; ``None`` where
                all are.
        """
        ...

    def weights(self, scores: Tensor, expert_ids: Tensor, keep: Tensor) -> Tensor:
        """Returns the combine weights of the kept experts, 0 elsewhere, shape ``(T, K)``."""
        ...

    def usable_experts(self, num_experts: int) -> int:
        """Returns how many experts a token may have at most."""
        ...

    @property
    def scorer(self) -> Scorer | None:
        """The scorer in place of the model's rule, if any."""
        ...

    def install(self) -> None:
        """Adds to the router what the rule needs."""
        ...

    def remove(self) -> None:
        """Leaves the router as it was found."""
        ...


@final
class ModelRule:
    """The rule of the model's own router."""

    scorer = None

    def __init__(self, contract: RouterContract, router: nn.Module) -> None:
        self._contract = contract
        self._router = router

    def read(self, hidden: Tensor, logits: Tensor, usable: Tensor | None) -> RouterScores:
        """See :class:`RouterRule`."""
        del hidden
        scores = self._contract.scores(logits)
        selectable = self._contract.selectable(scores, self._router, usable)
        return RouterScores(scores=scores, logits=logits, selectable=selectable)

    def weights(self, scores: Tensor, expert_ids: Tensor, keep: Tensor) -> Tensor:
        """See :class:`RouterRule`."""
        return self._contract.weights(scores, expert_ids, keep)

    def usable_experts(self, num_experts: int) -> int:
        """See :class:`RouterRule`."""
        return num_experts * self._contract.num_top_groups // self._contract.num_groups

    def install(self) -> None:
        """Does nothing."""

    def remove(self) -> None:
        """Does nothing."""


@final
class ScorerRule:
    """A scorer on the model's own router weight.

    The scorer becomes a submodule of the router, so that whatever trains, moves, saves or
    synchronises the model does so with the scorer too.
    """

    def __init__(self, scorer: Scorer, router: nn.Module) -> None:
        self._scorer = scorer.to(router.get_parameter("weight").device)
        self._router = router

    @property
    def scorer(self) -> Scorer:
        """The scorer."""
        return self._scorer

    def read(self, hidden: Tensor, logits: Tensor, usable: Tensor | None) -> RouterScores:
        """See :class:`RouterRule`."""
        del logits
        found = self._scorer(hidden, self._router.get_parameter("weight"))
        assert isinstance(found, RouterScores)  # nn.Module's call is untyped
        if usable is None:
            return found
        return RouterScores(
            scores=found.scores,
            logits=found.logits,
            selectable=found.selectable.masked_fill(~usable, -torch.inf),
            is_open=None if found.is_open is None else found.is_open & usable,
        )

    def weights(self, scores: Tensor, expert_ids: Tensor, keep: Tensor) -> Tensor:
        """See :class:`RouterRule`."""
        return self._scorer.weights(scores, expert_ids, keep)

    def usable_experts(self, num_experts: int) -> int:
        """See :class:`RouterRule`."""
        return num_experts

    def install(self) -> None:
        """Makes the scorer a submodule of the router."""
        self._router.add_module("scorer", self._scorer)

    def remove(self) -> None:
        """Takes the scorer out of the router."""
        del self._router.scorer
