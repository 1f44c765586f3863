"""What every scorer promises."""

import copy
from dataclasses import replace

import torch
from torch import Tensor

from drgr.routing import LayerPlace
from drgr.routing.scores import RouterScores, Scorer, ScorerFactory
from drgr.testing.batches import check_close, fail, routed

_TOKENS, _EXPERTS, _WIDTH, _TOP = 64, 8, 16, 3
PLACE = LayerPlace(
    number=0, num_layers=2, num_experts=_EXPERTS, width=_WIDTH, device=torch.device("cpu")
)
"""The layer that checks build for: 8 experts of width 16 on the CPU."""


def check_scorer(build: ScorerFactory, *, treats_experts_alike: bool = True) -> None:
    """Checks that a scorer keeps what :class:`~drgr.routing.scores.Scorer` promises.

    Scores are finite, not negative, float32 at least, also in bfloat16 autocast; gradients reach
    tokens, router weight and every parameter, as differences of the combine weights say in float64;
    weights are 0 where an expert does not run; evaluation draws no random number and leaves the
    state alone; a token's scores depend on no other token at evaluation; experts in another order
    have the same scores in that order; a state goes through ``state_dict``.

    Args:
        build: Builds the scorer of a layer.
        treats_experts_alike: Whether the order of experts means nothing to it, which a parameter or
            buffer of one value for each expert would make untrue.

    Raises:
        ConformanceError: With the promise that is broken.
    """
    with torch.random.fork_rng(devices=[]):  # the caller's generator stays as it is
        for training in (True, False):
            _check_scores(build, training=training)
        _check_gradients(build)
        _check_weights(build)
        _check_evaluation(build)
        if treats_experts_alike:
            _check_order_of_experts(build)
        _check_state(build)


def _new(build: ScorerFactory, *, training: bool = False) -> Scorer:
    torch.manual_seed(0)
    return build(PLACE).train(training)


def _draw(*, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(_TOKENS, _WIDTH, generator=generator)
    weight = torch.randn(_EXPERTS, _WIDTH, generator=generator)
    return hidden.to(dtype), weight.to(dtype)


def _scores(scorer: Scorer, hidden: Tensor, weight: Tensor) -> RouterScores:
    torch.manual_seed(2)
    found = scorer(hidden, weight)
    if not isinstance(found, RouterScores):
        fail(scorer, "forward returns RouterScores", f"got {type(found).__name__}")
    return found


def _choice(scores: RouterScores) -> tuple[Tensor, Tensor]:
    """Candidates of each token and which run: the first always, the others of every second."""
    ids = scores.selectable.topk(_TOP, dim=1).indices
    keep = torch.ones_like(ids, dtype=torch.bool)
    keep[1::2, 1:] = False
    return ids, keep


def _check_scores(build: ScorerFactory, *, training: bool) -> None:
    promise = "scores are finite, not negative and float32 at least; selectable is detached"
    for autocast in (False, True):
        scorer = _new(build, training=training)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            found = _scores(scorer, *_draw())
        shape = (_TOKENS, _EXPERTS)
        for name in ("scores", "logits", "selectable"):
            values: Tensor = getattr(found, name)
            if values.shape != shape or values.dtype not in (torch.float32, torch.float64):
                got = f"got {name} of {values.dtype} and shape {tuple(values.shape)}"
                fail(scorer, promise, got)
        if not bool(found.scores.isfinite().all()) or bool((found.scores < 0).any()):
            fail(scorer, promise, f"got scores from {found.scores.min()} to {found.scores.max()}")
        if found.selectable.requires_grad or bool(found.selectable.isnan().any()):
            fail(scorer, promise, "selectable has a gradient or is NaN")


def _check_gradients(build: ScorerFactory) -> None:
    scorer = _new(build).double()
    hidden, weight = (leaf.requires_grad_() for leaf in _draw(dtype=torch.float64))
    found = _scores(scorer, hidden, weight)
    ids, keep = _choice(found)
    probe = torch.randn(ids.shape, generator=torch.Generator().manual_seed(3)).double()

    def value(at_hidden: Tensor, at_weight: Tensor) -> Tensor:
        scores = _scores(scorer, at_hidden, at_weight).scores
        return (scorer.weights(scores, ids, keep) * probe).sum()

    leaves = [hidden, weight, *scorer.parameters()]
    gradients = torch.autograd.grad(value(hidden, weight), leaves, materialize_grads=True)
    promise = "gradients of the combine weights reach the tokens and the router weight"
    directions = [
        torch.randn(leaf.shape, generator=torch.Generator().manual_seed(4)).double()
        for leaf in (hidden, weight)
    ]
    step = 1e-6
    with torch.no_grad():
        ahead, behind = (
            value(hidden + sign * step * directions[0], weight + sign * step * directions[1])
            for sign in (1, -1)
        )
    slope = sum((g * d).sum() for g, d in zip(gradients, directions, strict=False))
    assert isinstance(slope, Tensor)
    check_close(scorer, promise, slope, (ahead - behind) / (2 * step), tolerance=1e-4)


def _check_weights(build: ScorerFactory) -> None:
    scorer = _new(build)
    found = _scores(scorer, *_draw())
    ids, keep = _choice(found)
    weights = scorer.weights(found.scores, ids, keep)
    promise = "combine weights are finite, not negative, and 0 where an expert does not run"
    if weights.shape != ids.shape or not bool(weights.isfinite().all()):
        fail(scorer, promise, f"got shape {tuple(weights.shape)} or values that are not finite")
    if bool((weights[~keep] != 0).any()) or bool((weights < 0).any()):
        fail(scorer, promise, "they are not")


def _check_evaluation(build: ScorerFactory) -> None:
    scorer = _new(build)
    hidden, weight = _draw()
    before = copy.deepcopy(scorer.state_dict())
    generator_before = torch.get_rng_state()
    first = scorer(hidden, weight)
    if not torch.equal(torch.get_rng_state(), generator_before):
        fail(scorer, "evaluation draws no random number", "the generator moved")
    promise = "evaluation leaves the state alone"
    for name, tensor in scorer.state_dict().items():
        check_close(scorer, promise, tensor, before[name], tolerance=0.0)
    promise = "a token's scores depend on no other token at evaluation"
    alone = scorer(hidden[:1], weight)
    check_close(scorer, promise, alone.scores, first.scores[:1])
    empty = scorer(hidden[:0], weight).scores
    if empty.shape != (0, _EXPERTS):
        fail(scorer, "no token has no scores", f"got shape {tuple(empty.shape)}")


def _check_order_of_experts(build: ScorerFactory) -> None:
    scorer = _new(build)
    hidden, weight = _draw()
    order = torch.randperm(_EXPERTS, generator=torch.Generator().manual_seed(0))
    plain, permuted = scorer(hidden, weight), scorer(hidden, weight[order])
    promise = "experts in another order have the same scores in that order"
    check_close(scorer, promise, permuted.scores, plain.scores[:, order])


def _check_state(build: ScorerFactory) -> None:
    one, other = _new(build, training=True), _new(build)
    hidden, weight = _draw()
    logits = hidden @ weight.T
    for _ in range(2):
        routing = routed(logits)
        if one.observes:
            routing = replace(routing, hidden=hidden)
        one.observe(routing)
        one.update()
    other.load_state_dict(one.state_dict())
    promise = "a scorer that was restored from state_dict scores like the one that was saved"
    expected = _scores(one.eval(), hidden, weight).scores
    check_close(one, promise, _scores(other.eval(), hidden, weight).scores, expected, tolerance=0.0)
