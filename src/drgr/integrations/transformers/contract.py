"""What a router computes, found by numerical comparison rather than by its class name.

Routers of transformers return ``(router_logits, top_k_weights, top_k_index)``. How weights and
indices follow from logits differs between families. Each candidate rule below is compared with the
router itself on random weights and inputs; a router that none reproduces is refused.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from drgr.errors import UnknownRouterError

_NUM_TRIAL_TOKENS = 64
_NUM_TRIALS = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class RouterContract:
    """The rule that turns router logits into scores, values and combine weights.

    Attributes:
        activation: ``"softmax"`` or ``"sigmoid"``, over all experts.
        normalised: Whether the weights of a token's experts are divided by their sum.
        scale: Factor on the weights.
        has_correction_bias: Whether a buffer ``e_score_correction_bias`` is added for selection
            only.
        num_groups: Expert groups; only the best ``num_top_groups`` of a token may be selected from.
        num_top_groups: Groups a token may use.
    """

    activation: str
    normalised: bool
    scale: float = 1.0
    has_correction_bias: bool = False
    num_groups: int = 1
    num_top_groups: int = 1

    def scores(self, logits: Tensor) -> Tensor:
        """Returns scores in (0, 1), shape ``(T, E)``, computed in float32 at least."""
        logits = logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits
        return logits.softmax(dim=-1) if self.activation == "softmax" else logits.sigmoid()

    def selectable(self, scores: Tensor, router: nn.Module, usable: Tensor | None = None) -> Tensor:
        """Returns the detached scores to select by; ``-inf`` outside a token's groups.

        Args:
            scores: Router scores, shape ``(T, E)``.
            router: The router, for its correction bias.
            usable: Which experts a token may select, bool, shape ``(T, E)`` or ``(1, E)``; others
                get ``-inf``, lend nothing to their group, and a group of them is chosen last.
        """
        values = scores.detach()
        if self.has_correction_bias:
            values = values + router.get_buffer("e_score_correction_bias")
        if usable is not None:
            values = values.masked_fill(~usable, -torch.inf)
        if self.num_top_groups == self.num_groups:
            return values
        grouped: Tensor = values.unflatten(1, (self.num_groups, -1))
        best = grouped.topk(2, dim=-1).values
        group_values = best.masked_fill(best == -torch.inf, 0.0).sum(dim=-1)
        group_values = group_values.masked_fill(best[..., 0] == -torch.inf, -torch.inf)
        top_groups = group_values.topk(self.num_top_groups, dim=-1).indices
        closed = torch.ones_like(group_values, dtype=torch.bool).scatter_(1, top_groups, False)
        return grouped.masked_fill(closed.unsqueeze(-1), -torch.inf).flatten(1)

    def weights(self, scores: Tensor, expert_ids: Tensor, keep: Tensor) -> Tensor:
        """Returns combine weights of the kept experts, 0 elsewhere, shape ``(T, K)``."""
        weights = scores.gather(1, expert_ids) * keep
        if self.normalised:
            weights = weights / weights.sum(dim=1, keepdim=True).clamp_min(1e-20)
        return weights * self.scale


def find_contract(router: nn.Module, name: str) -> RouterContract:
    """Finds the rule that a router follows.

    Args:
        router: A module that maps ``(T, D)`` to the output triple, with ``weight`` of shape
            ``(E, D)`` and ``top_k``.
        name: Its dotted name, for messages.

    Returns:
        The only candidate that reproduces the router's indices and weights on random inputs.

    Raises:
        UnknownRouterError: If the router does not return the triple or no candidate matches.
    """
    trials = [_run_on_random_weights(router, name, seed) for seed in range(_NUM_TRIALS)]
    for contract in _candidates(router):
        if all(_reproduces(contract, trial) for trial in trials):
            return contract
    raise UnknownRouterError(
        f"{name} ({type(router).__name__}) returns a routing triple, but its weights and indices "
        f"follow from its logits by none of the known rules (softmax or sigmoid, normalised or "
        f"not, scaled, correction bias, expert groups); attach to a model of a known family, or "
        f"add the rule to RouterContract"
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Trial:
    """One run of a router on random weights: its state and its output."""

    biases: nn.Module
    logits: Tensor
    weights: Tensor
    expert_ids: Tensor


def _candidates(router: nn.Module) -> Iterator[RouterContract]:
    buffers = dict(router.named_buffers())
    scale = float(getattr(router, "routed_scaling_factor", 1.0))
    num_groups = int(getattr(router, "num_group", getattr(router, "n_group", 1)) or 1)
    num_top_groups = int(getattr(router, "topk_group", num_groups) or num_groups)
    for activation in ("softmax", "sigmoid"):
        for normalised in (True, False):
            yield RouterContract(
                activation=activation,
                normalised=normalised,
                scale=scale,
                has_correction_bias="e_score_correction_bias" in buffers,
                num_groups=num_groups,
                num_top_groups=num_top_groups,
            )


def _run_on_random_weights(router: nn.Module, name: str, seed: int) -> _Trial:
    """Runs the router as a function of random parameters and buffers; the module is not changed."""
    weight = getattr(router, "weight", None)
    if not isinstance(weight, Tensor) or weight.dim() != 2:
        raise UnknownRouterError(
            f"{name} ({type(router).__name__}) must have a weight of shape (experts, width); "
            f"its routing cannot be verified"
        )
    generator = torch.Generator().manual_seed(seed)

    def random_like(tensor: Tensor, scale: float) -> Tensor:
        values = torch.randn(tensor.shape, generator=generator) * scale
        return values.to(tensor.device, tensor.dtype)

    state = {key: random_like(value, 0.3) for key, value in router.named_parameters()}
    state |= {key: random_like(value, 0.3) for key, value in router.named_buffers()}
    hidden = random_like(weight.new_empty(_NUM_TRIAL_TOKENS, weight.shape[1]), 1.0)
    with torch.no_grad():
        output = torch.func.functional_call(router, state, (hidden,))
    logits, weights, expert_ids = _as_triple(output, weight.shape[0], name)
    biases = nn.Module()
    for key, _ in router.named_buffers():
        biases.register_buffer(key, state[key])
    return _Trial(biases=biases, logits=logits, weights=weights, expert_ids=expert_ids)


def _as_triple(output: object, num_experts: int, name: str) -> tuple[Tensor, Tensor, Tensor]:
    """Checks the shapes of ``(logits, weights, indices)``."""
    if isinstance(output, tuple) and len(output) >= 3:
        logits, weights, expert_ids = output[:3]
        tensors = all(isinstance(part, Tensor) for part in (logits, weights, expert_ids))
        if (
            tensors
            and logits.shape == (_NUM_TRIAL_TOKENS, num_experts)
            and weights.shape == expert_ids.shape
            and weights.shape[0] == _NUM_TRIAL_TOKENS
            and not expert_ids.is_floating_point()
        ):
            return logits, weights, expert_ids
    raise UnknownRouterError(
        f"{name} must return (router_logits (T, {num_experts}), top_k_weights (T, K), "
        f"top_k_index (T, K)), got {_describe(output)}"
    )


def _describe(output: object) -> str:
    if isinstance(output, tuple):
        return f"({', '.join(_describe(part) for part in output)})"
    return f"tensor {tuple(output.shape)}" if isinstance(output, Tensor) else type(output).__name__


def _reproduces(contract: RouterContract, trial: _Trial) -> bool:
    """Compares a rule with the router by the dense weights of both: slots may be in any order."""
    scores = contract.scores(trial.logits)
    if scores.shape[1] % contract.num_groups:
        return False
    top_k = trial.expert_ids.shape[1]
    expert_ids = contract.selectable(scores, trial.biases).topk(top_k, dim=1).indices
    weights = contract.weights(scores, expert_ids, torch.ones_like(expert_ids, dtype=torch.bool))
    ours = torch.zeros_like(scores).scatter_(1, expert_ids, weights)
    theirs = torch.zeros_like(scores).scatter_(1, trial.expert_ids, trial.weights.to(scores.dtype))
    tolerance = 1e-5 if trial.weights.dtype in (torch.float32, torch.float64) else 2e-2
    return torch.allclose(ours, theirs, rtol=tolerance, atol=tolerance)
