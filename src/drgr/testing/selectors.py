"""What every selection promises."""

from dataclasses import replace

import torch
from torch import Tensor

from drgr.budgets import Selection
from drgr.routing import LayerRouting
from drgr.routing.selection import SelectionInputs, Selector, SelectorFactory
from drgr.testing.batches import check_close, fail, plan_of, random_mask, skewed_logits
from drgr.testing.scorers import PLACE

_LENGTH, _SEQUENCES = 16, 8
_TOKENS, _EXPERTS = _LENGTH * _SEQUENCES, PLACE.num_experts


def check_selector(build: SelectorFactory, *, is_bounded: bool = True) -> None:
    """Checks that a selection keeps what :class:`~drgr.routing.selection.Selector` promises.

    A token's candidates are different experts, those that run come first and are the most worth;
    spend is the number of those that run and in training never above the limit; padding gets
    nothing and changes nothing; forbidden experts never run; at evaluation a token's experts depend
    on no other token, and nothing that is learned changes; the state goes through ``state_dict``.

    Args:
        build: Builds the selector of a layer.
        is_bounded: Whether it never spends more than its limit in training; one that only aims at
            the limit does not.

    Raises:
        ConformanceError: With the promise that is broken.
    """
    for exact in (True, False):
        _check_choice(build, exact=exact, is_bounded=is_bounded and exact)
        _check_padding(build, exact=exact)
        _check_forbidden(build, exact=exact)
    _check_alone(build)
    _check_state(build)


def _inputs(
    *, seed: int = 0, valid: Tensor | None = None, exact: bool = True, rows: int = _TOKENS
) -> SelectionInputs:
    scores = skewed_logits(rows, _EXPERTS, seed=seed).softmax(dim=1)
    is_open = scores > scores.mean(dim=1, keepdim=True)
    return SelectionInputs(
        values=scores,
        scores=scores,
        valid=valid,
        is_open=is_open,
        sequence_length=_LENGTH,
        exact=exact,
    )


def _record(inputs: SelectionInputs, selection: Selection) -> LayerRouting:
    return LayerRouting(
        name="layer",
        scores=inputs.scores,
        values=inputs.values,
        plan=plan_of(inputs.scores, selection),
        selection=selection,
        valid=inputs.valid,
    )


def _trained(build: SelectorFactory, *, steps: int = 3) -> Selector:
    selector = build(PLACE)
    for step in range(steps):
        inputs = _inputs(seed=step)
        selector.observe(_record(inputs, selector.select(inputs)))
        selector.update()
    return selector


def _check_choice(build: SelectorFactory, *, exact: bool, is_bounded: bool) -> None:
    selector = _trained(build)
    inputs = _inputs(seed=9, exact=exact)
    chosen = selector.select(inputs)
    promise = "a token has at most `maximum` candidates, different experts, those that run first"
    shape = chosen.expert_ids.shape
    if shape[0] != _TOKENS or shape[1] > selector.maximum or chosen.keep.shape != shape:
        found = f"got shape {tuple(chosen.keep.shape)} with maximum {selector.maximum}"
        fail(selector, promise, found)
    distinct = chosen.expert_ids.sort(dim=1).values.diff(dim=1)
    if bool((distinct == 0).any()) or bool((chosen.keep.int().diff(dim=1) > 0).any()):
        fail(selector, promise, "they are not")
    if int(chosen.spend) != int(chosen.keep.sum()):
        found = f"spend is {int(chosen.spend)}, {int(chosen.keep.sum())} run"
        fail(selector, "spend is the number of assignments that run", found)
    if is_bounded and int(chosen.spend) > int(chosen.limit):
        found = f"got {int(chosen.spend)} of {int(chosen.limit)}"
        fail(selector, "spend is never above the limit in training", found)


def _check_padding(build: SelectorFactory, *, exact: bool) -> None:
    selector = _trained(build)
    # Whole sequences of padding, so that the rest is a batch that could have come by itself.
    valid = torch.arange(_TOKENS) < _TOKENS - 2 * _LENGTH
    padded = _inputs(seed=8, valid=valid, exact=exact)
    plain = replace(
        padded,
        values=padded.values[valid],
        scores=padded.scores[valid],
        is_open=None if padded.is_open is None else padded.is_open[valid],
        valid=None,
    )
    with_padding, without = selector.select(padded), selector.select(plain)
    promise = "padding gets no expert and changes nothing"
    if bool(with_padding.keep[~valid].any()):
        fail(selector, promise, "padding runs")
    check_close(selector, promise, with_padding.keep[valid], without.keep, tolerance=0.0)
    check_close(selector, promise, with_padding.limit, without.limit, tolerance=0.0)
    scattered = random_mask(_TOKENS, seed=1)
    if bool(selector.select(_inputs(valid=scattered, exact=exact)).keep[~scattered].any()):
        fail(selector, promise, "padding inside a sequence runs")


def _check_forbidden(build: SelectorFactory, *, exact: bool) -> None:
    selector = _trained(build)
    inputs = _inputs(seed=7, exact=exact)
    values = inputs.values.clone()
    values[:, : _EXPERTS // 2] = -torch.inf
    chosen = selector.select(replace(inputs, values=values))
    if bool((chosen.expert_ids[chosen.keep] < _EXPERTS // 2).any()):
        fail(selector, "an expert that is worth -inf never runs", "one runs")


def _check_alone(build: SelectorFactory) -> None:
    selector = _trained(build)
    before = {name: tensor.clone() for name, tensor in selector.state_dict().items()}
    inputs = _inputs(seed=6, exact=False)
    together = selector.select(inputs)
    promise = "at evaluation a token's experts depend on no other token"
    for row in range(0, _TOKENS, 17):
        one = slice(row, row + 1)
        alone = selector.select(
            replace(
                inputs,
                values=inputs.values[one],
                scores=inputs.scores[one],
                is_open=None if inputs.is_open is None else inputs.is_open[one],
                sequence_length=1,
            )
        )
        check_close(selector, promise, alone.keep, together.keep[one], tolerance=0.0)
        check_close(selector, promise, alone.expert_ids, together.expert_ids[one], tolerance=0.0)
    promise = "a selection leaves the state alone"
    for name, tensor in selector.state_dict().items():
        check_close(selector, promise, tensor, before[name], tolerance=0.0)


def _check_state(build: SelectorFactory) -> None:
    one, other = _trained(build), build(PLACE)
    other.load_state_dict(one.state_dict())
    inputs = _inputs(seed=5, exact=False)
    promise = "a selector that was restored from state_dict selects like the one that was saved"
    check_close(one, promise, other.select(inputs).keep, one.select(inputs).keep, tolerance=0.0)
    try:
        other.load_state_dict({"of another kind": torch.zeros(1)})
    except ValueError:
        return
    fail(one, "the state of another kind is refused with ValueError", "it was taken")
