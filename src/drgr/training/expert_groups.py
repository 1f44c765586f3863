r"""Experts as groups: the adversary weighs what each expert is used for, instead of domains.

In each layer the loss of an expert is the mean loss of the tokens that it serves, weighted by what
it contributes to them. With ``c_te`` the share of expert ``e`` in token ``t``'s combine weights,
treated as a constant,

    loss_e = sum_t c_te l_t / sum_t c_te        objective = mean over layers of sum_e q_e loss_e

and ``q`` the adversary's weights over the experts of the layer. With ``q_e`` the share of expert
``e`` in the batch, the objective is the mean token loss. Means, not sums: a sum would confuse an
expert's loss with its load.
"""

from collections.abc import Sequence
from typing import Any, final

import torch
from torch import Tensor

from drgr.routing import LayerRouting
from drgr.training.adversary import DomainAdversary


@final
class ExpertAdversaries:
    """An adversary over the experts of each layer.

    Args:
        layers: One adversary a layer, over its experts.
    """

    def __init__(self, layers: Sequence[DomainAdversary]) -> None:
        self._layers = list(layers)

    @property
    def weights(self) -> Tensor:
        """Worst-case weights, shape ``(L, E)``, float64."""
        return torch.stack([layer.weights.adversary for layer in self._layers])

    def observe(self, loss_sums: Tensor, credit: Tensor) -> None:
        """Takes in credited losses and credit of all processes, shapes ``(L, E)``."""
        for layer, sums, mass in zip(self._layers, loss_sums, credit, strict=True):
            layer.observe(sums, mass)

    def refresh(self) -> None:
        """Recomputes the weights."""
        for layer in self._layers:
            layer.refresh()

    def state_dict(self) -> list[dict[str, Any]]:
        """Returns estimates and weights of every layer."""
        return [layer.state_dict() for layer in self._layers]

    def load_state_dict(self, state: list[dict[str, Any]]) -> None:
        """Restores :meth:`state_dict`, bit for bit."""
        for layer, part in zip(self._layers, state, strict=True):
            layer.load_state_dict(part)


def expert_credit(routing: LayerRouting, num_experts: int) -> Tensor:
    """Returns each expert's share in each token's combine weights, ``(T, E)``, detached.

    Rows sum to 1, or to 0 for padding and for tokens that no expert serves.
    """
    weights = (routing.plan.combine_weights * routing.plan.keep).detach().double()
    if routing.valid is not None:
        weights = weights * routing.valid.unsqueeze(1)
    shares = weights / weights.sum(dim=1, keepdim=True).clamp_min(1e-20)
    return shares.new_zeros(len(shares), num_experts).scatter_add(
        1, routing.plan.expert_ids, shares
    )


def expert_sums(
    records: Sequence[LayerRouting], token_losses: Tensor, num_experts: int
) -> tuple[Tensor, Tensor]:
    """Returns the credited losses and the credit of every expert, shapes ``(L, E)``, detached.

    Args:
        records: The layers of one forward pass.
        token_losses: Losses of its tokens in nats, shape ``(B, S)``.
        num_experts: Experts of a layer.
    """
    losses = token_losses.detach().reshape(-1).double()
    credit = [expert_credit(routing, num_experts) for routing in records]
    return (
        torch.stack([losses @ layer for layer in credit]),
        torch.stack([layer.sum(dim=0) for layer in credit]),
    )


def expert_token_weights(records: Sequence[LayerRouting], weights: Tensor) -> Tensor:
    """Returns the factor on each token's loss, so that its mean is the objective above.

    The weights of experts without a token in this batch are shared out among the others, in
    proportion to theirs.

    Args:
        records: The layers of one forward pass.
        weights: Weights of the experts, shape ``(L, E)``.

    Returns:
        Shape ``(T,)``, float64; their mean over tokens is 1.
    """
    total = torch.zeros(len(records[0].plan.keep), dtype=torch.float64, device=weights.device)
    for routing, layer in zip(records, weights, strict=True):
        credit = expert_credit(routing, len(layer))
        load = credit.sum(dim=0)
        present = torch.where(load > 0, layer, 0.0)
        per_credit = present / present.sum() * credit.sum() / load.where(load > 0, 1.0)
        total += credit @ per_credit / len(records)
    return total
