"""The selection that follows a scorer: open experts up to a maximum, one of them at least."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from drgr.routing.selection import OpenExperts, SelectionInputs


def select(selector, values, is_open, **others):
    return selector.select(SelectionInputs(values=values, scores=values, is_open=is_open, **others))


def chosen(selection):
    pairs = zip(selection.expert_ids.tolist(), selection.keep.tolist(), strict=True)
    return [[e for e, kept in zip(ids, keep, strict=True) if kept] for ids, keep in pairs]


VALUES = torch.tensor([[0.1, 0.4, 0.3, 0.2], [0.9, 0.5, 0.7, 0.6], [0.1, 0.2, 0.3, 0.4]])
OPEN = torch.tensor([[1, 0, 1, 0], [0, 0, 0, 0], [1, 1, 1, 1]]).bool()


def test_by_hand():
    found = select(OpenExperts(3), VALUES, OPEN)
    assert chosen(found) == [[2, 0], [0], [3, 2, 1]]
    assert (int(found.spend), int(found.limit)) == (6, 9)
    assert found.price.isnan()
    none = select(OpenExperts(3, at_least_best=False), VALUES, OPEN)
    assert chosen(none) == [[2, 0], [], [3, 2, 1]]


def test_padding_and_what_is_forbidden():
    values = VALUES.clone()
    values[0, 2] = -torch.inf
    values[1, 0] = -torch.inf
    valid = torch.tensor([True, True, False])
    found = select(OpenExperts(4), values, OPEN, valid=valid)
    assert chosen(found) == [[0], [2], []]
    assert (int(found.spend), int(found.limit)) == (2, 8)
    closed = select(OpenExperts(4), torch.full((2, 4), -torch.inf), OPEN[:2])
    assert chosen(closed) == [[], []]


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_against_a_loop(data):
    num_tokens, num_experts = data.draw(st.integers(1, 5)), data.draw(st.integers(1, 6))
    maximum = data.draw(st.integers(1, num_experts))
    at_least_best = data.draw(st.booleans())
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 10**6)))
    values = torch.rand(num_tokens, num_experts, generator=generator)
    is_open = torch.rand(num_tokens, num_experts, generator=generator) < 0.4
    selector = OpenExperts(maximum, at_least_best=at_least_best)
    found = select(selector, values, is_open, exact=data.draw(st.booleans()))
    for row in range(num_tokens):
        ranked = sorted(range(num_experts), key=lambda e: -float(values[row, e]))
        expected = [e for e in ranked if is_open[row, e]][:maximum]
        if not expected and at_least_best:
            expected = ranked[:1]
        assert chosen(found)[row] == expected
    assert int(found.spend) == int(found.keep.sum()) <= int(found.limit)


def totals(shares):
    from drgr.collectives import rank

    rows = shares[rank()]
    found = select(OpenExperts(2), VALUES[rows], OPEN[rows], exact=True)
    alone = select(OpenExperts(2), VALUES[rows], OPEN[rows], exact=False)
    return [int(found.spend), int(found.limit), int(alone.spend)]


def test_counts_are_those_of_all_processes(run_processes):
    assert run_processes(totals, 2, [[0], [1, 2]]) == [[5, 6, 2], [5, 6, 3]]


def test_refusals_and_state():
    with pytest.raises(ValueError, match="maximum must be at least 1, got 0"):
        OpenExperts(0)
    with pytest.raises(ValueError, match="needs a scorer that says which experts are open"):
        select(OpenExperts(2), VALUES, None)
    selector = OpenExperts(2)
    selector.load_state_dict(selector.state_dict())
    with pytest.raises(ValueError, match=r"state of OpenExperts must hold \[\], got \['price'\]"):
        selector.load_state_dict({"price": torch.zeros(())})
    assert selector.price is None
