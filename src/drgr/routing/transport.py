"""Entropic transport of tokens to experts: Sinkhorn's iteration in the log domain."""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from drgr._checks import check_positive
from drgr.collectives import sum_over_processes, world_size
from drgr.numerics import Status


@dataclass(frozen=True, slots=True, kw_only=True)
class Transport:
    """Prices of an entropic transport, and how far from its marginals they are.

    Attributes:
        expert_prices: Shape ``(E,)``, float64, mean zero, in units of the worths.
        token_prices: Shape ``(T,)``, float64, of this process's tokens. The plan
            ``exp((worth - token_price - expert_price) / regularization)`` has rows that sum to 1;
            ``inf`` for a token that may use no expert.
        error: Largest relative deviation of an expert's mass from its target.
        num_iterations: Updates of the expert prices.
        status: ``CONVERGED``, ``MAX_STEPS``, or ``INFEASIBLE`` where no token may use some expert.
    """

    expert_prices: Tensor
    token_prices: Tensor
    error: float
    num_iterations: int
    status: Status

    def plan(self, worths: Tensor, regularization: float) -> Tensor:
        """Returns the mass that each token sends to each expert, ``(T, E)``, float64."""
        prices = self.expert_prices + self.token_prices.unsqueeze(1)
        return ((worths.double() - prices) / regularization).exp()


def entropic_transport(
    worths: Tensor,
    *,
    regularization: float,
    shares: Tensor | None = None,
    start: Tensor | None = None,
    tolerance: float = 1e-4,
    max_iterations: int = 100,
    group: ProcessGroup | None = None,
) -> Transport:
    r"""Finds the prices at which soft assignments use every expert by its share.

    .. math:: \max_{\Pi \ge 0}\ \langle \Pi, C\rangle - \xi \langle \Pi, \log \Pi\rangle
              \quad\text{s.t.}\quad \Pi 1 = 1,\ \Pi^\top 1 = T w

    has the solution :math:`\Pi_{te} = \exp((C_{te} - \alpha_t - \beta_e) / \xi)`, found by

    .. math:: \beta_e \leftarrow \xi \log \frac{\sum_t e^{(C_{te} - \alpha_t) / \xi}}{T w_e} ,
              \qquad
              \alpha_t \leftarrow \xi \log \sum_e e^{(C_{te} - \beta_e) / \xi}

    Each is the exact minimiser of the dual in its block. The token update comes last, so rows are
    exact and the error is the experts'. Mass is balanced, not counts: the ``k`` largest of each row
    may be far from balance where ``xi`` is large beside the differences of worths.

    Args:
        worths: ``C``, shape ``(T, E)``; ``-inf`` where a token may not use an expert. Tokens may be
            spread over processes.
        regularization: ``xi`` in units of the worths, above 0. Small is slow.
        shares: ``w``, shape ``(E,)``, positive, summing to 1; equal by default.
        start: Expert prices to start from, shape ``(E,)``; zero by default.
        tolerance: Largest error that counts as converged, above 0.
        max_iterations: Most updates of the expert prices, at least 1.
        group: Processes that share the tokens.

    Returns:
        The prices, the error of their plan and the status. Experts that no token may use have the
        lowest price of the others, and the others share their target.

    Complexity:
        O(TE) an iteration and two all-reduces of ``E`` numbers; computes in float64.
    """
    check_positive("regularization", regularization)
    check_positive("tolerance", tolerance)
    if max_iterations < 1:
        raise ValueError(f"max_iterations must be at least 1, got {max_iterations}")
    scaled = worths.detach().double() / regularization
    num_experts = scaled.shape[1]
    uniform = torch.full((num_experts,), 1 / num_experts, device=scaled.device).double()
    wanted = uniform if shares is None else shares
    served = torch.isfinite(scaled)
    reachable = sum_over_processes(served.sum(dim=0), group) > 0
    num_tokens = sum_over_processes(served.any(dim=1).sum(), group)
    mass = num_tokens * wanted / wanted[reachable].sum()
    prices = torch.zeros_like(uniform) if start is None else start.double() / regularization
    error, num_iterations = torch.inf, 0
    while True:
        tokens = _token_prices(scaled, prices)
        log_mass = _log_sum_over_tokens(scaled - tokens.unsqueeze(1), group)
        found = (log_mass - prices).exp()
        error = float(((found - mass).abs() / mass)[reachable].amax()) if num_tokens > 0 else 0.0
        if error <= tolerance or num_iterations == max_iterations:
            break
        prices = torch.where(reachable, log_mass - mass.log(), prices)
        num_iterations += 1
    status = Status.CONVERGED if error <= tolerance else Status.MAX_STEPS
    return _finish(
        prices * regularization,
        tokens * regularization,
        reachable=reachable,
        error=error,
        num_iterations=num_iterations,
        status=status if bool(reachable.all()) or int(num_tokens) == 0 else Status.INFEASIBLE,
    )


def _token_prices(scaled: Tensor, prices: Tensor) -> Tensor:
    """Returns the exact row update, ``inf`` for a token without experts: it sends no mass."""
    tokens = torch.logsumexp(scaled - prices, dim=1)
    return tokens.masked_fill(torch.isneginf(tokens), torch.inf)


def _log_sum_over_tokens(exponents: Tensor, group: ProcessGroup | None) -> Tensor:
    """Returns the log of the sum of exponentials of each column over all processes."""
    if exponents.shape[0] == 0:
        top = exponents.new_full((exponents.shape[1],), -torch.inf)
    else:
        top = exponents.amax(dim=0)
    if world_size(group) > 1:
        dist.all_reduce(top, op=dist.ReduceOp.MAX, group=group)
    offset = torch.where(torch.isneginf(top), 0.0, top)
    total = sum_over_processes((exponents - offset).exp().sum(dim=0), group)
    return total.log() + offset


def _finish(
    prices: Tensor,
    tokens: Tensor,
    *,
    reachable: Tensor,
    error: float,
    num_iterations: int,
    status: Status,
) -> Transport:
    if bool(reachable.any()):
        prices = torch.where(reachable, prices, prices[reachable].amin())
    mean = prices.mean()
    return Transport(
        expert_prices=prices - mean,
        token_prices=tokens + mean,
        error=error,
        num_iterations=num_iterations,
        status=status,
    )
