"""Congestion pricing: an expert costs more in proportion to how crowded it is."""

from collections.abc import Sequence
from typing import final

import torch
from torch import Tensor

from drgr._checks import check_positive, check_share
from drgr.routing.load_controller import LoadController
from drgr.routing.targets import LoadError


@final
class CongestionPrice(LoadController):
    r"""Sets prices in proportion to the load error: a proportional controller.

    .. math:: \beta_e \leftarrow \lambda\,\beta_e
              + (1 - \lambda)\,\gamma \left(\frac{c_e}{\bar c} - 1\right)

    after each optimizer step that observed anything, with counts ``c`` over all its micro-batches
    and processes. It is the damped fixed point of a congestion game in which an expert's cost grows
    linearly with its load. A price exists only while there is an error, so the load settles above
    balance where the router has favourites: the remaining imbalance shrinks as ``gamma`` grows,
    until the loop oscillates. Let ``rho`` be the change of ``c_e / c_bar`` by one unit of price; it
    is stable while ``(1 - lambda) (1 + gamma rho) < 2``.

    Published is routing as a congestion game with one coefficient, as a description of trained
    routers. Its use as a controller, the damping and the units are derived here: one unit of load
    is the mean load, so this ``gamma`` is the coefficient on shares divided by ``E``. Targets other
    than equal loads replace 1 by ``E w_e``.

    Args:
        num_experts: Number of experts ``E``.
        strength: The coefficient ``gamma``: score units for a load off by one mean load, above 0.
        smoothing: Share ``lambda`` of the old price that is kept, in [0, 1).
        target: Loads wanted, one positive number for each expert in any unit; equal by default.
        device: Where the prices live.

    References:
        Mouzouni, *Three Phases of Expert Routing*, arXiv 2604.04230, for the congestion game.
    """

    def __init__(
        self,
        num_experts: int,
        *,
        strength: float = 1.0,
        smoothing: float = 0.9,
        target: Sequence[float] | None = None,
        device: torch.device | None = None,
    ) -> None:
        super().__init__(num_experts, target=target, device=device)
        check_positive("strength", strength)
        check_share("smoothing", smoothing)
        self._strength = strength
        self._smoothing = smoothing

    def _moved(self, load: LoadError) -> Tensor:
        """Moves towards the prices of such a load; no assignments leave them."""
        if int(load.total) == 0:
            return self._prices
        wanted = (self._strength * load.error).to(self._prices.dtype)
        return self._smoothing * self._prices + (1 - self._smoothing) * wanted
