"""The learned price of compute: an average over steps that starts with the first step whole."""

from dataclasses import replace

import pytest
import torch

from drgr.routing import BatchPrice


@pytest.fixture
def priced(route):
    """Builder of a record whose selection found a given price."""
    record = route(torch.rand(2, 3), budget=1)

    def build(price):
        return replace(record, selection=replace(record.selection, price=torch.tensor(price)))

    return build


def step(batch_price, *records):
    for record in records:
        batch_price.observe(record)
    batch_price.update()


def test_is_unknown_before_the_first_step(priced):
    batch_price = BatchPrice()
    assert batch_price.value is None
    batch_price.update()
    assert batch_price.value is None
    batch_price.observe(priced(0.5))
    assert batch_price.value is None


def test_averages_steps_and_micro_batches(priced):
    batch_price = BatchPrice(smoothing=0.75)
    step(batch_price, priced(0.4), priced(0.8))
    assert float(batch_price.value) == pytest.approx(0.6)
    step(batch_price, priced(1.0))
    assert float(batch_price.value) == pytest.approx(0.75 * 0.6 + 0.25 * 1.0)
    step(batch_price)
    assert float(batch_price.value) == pytest.approx(0.7)
    step(batch_price, priced(-0.1))
    assert float(batch_price.value) == pytest.approx(0.75 * 0.7 - 0.25 * 0.1)


def test_batches_without_a_price_do_not_move_it(priced):
    batch_price = BatchPrice(smoothing=0.75)
    step(batch_price, priced(float("nan")))
    assert batch_price.value is None
    step(batch_price, priced(0.4), priced(float("nan")))
    step(batch_price, priced(float("nan")))
    assert float(batch_price.value) == pytest.approx(0.4)


def test_without_smoothing_it_is_the_last_step(priced):
    batch_price = BatchPrice(smoothing=0)
    step(batch_price, priced(0.4))
    step(batch_price, priced(0.9))
    assert float(batch_price.value) == pytest.approx(0.9)


def test_state_round_trip(priced):
    batch_price, other = BatchPrice(), BatchPrice()
    step(batch_price, priced(0.4))
    other.observe(priced(7.0))
    other.load_state_dict(batch_price.state_dict())
    assert torch.equal(other.value, batch_price.value)
    for one in (batch_price, other):
        step(one, priced(0.9))
    assert torch.equal(other.value, batch_price.value)
    assert float(other.value) == pytest.approx(0.9 * 0.4 + 0.1 * 0.9)


def test_an_unlearned_price_stays_unlearned_in_its_state(priced):
    other = BatchPrice()
    step(other, priced(0.4))
    other.load_state_dict(BatchPrice().state_dict())
    assert other.value is None
    step(other, priced(0.9))
    assert float(other.value) == pytest.approx(0.9)


@pytest.mark.parametrize("smoothing", [-0.1, 1.0, float("nan")])
def test_smoothing_outside_its_range_is_refused(smoothing):
    with pytest.raises(ValueError, match=r"smoothing must lie in \[0, 1\), got"):
        BatchPrice(smoothing=smoothing)
