"""Signals wait for the end of a step; the second of a kind acts at once."""

import os
import signal
import time

import pytest

from drgr.training.signals import StopRequest, deferred_signals


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_becomes_a_request(number):
    before = {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)}
    with deferred_signals() as request:
        assert request.agreed(None) == 0
        os.kill(os.getpid(), number)
        assert request.signal == number
        assert request.agreed(None) == number
    assert {n: signal.getsignal(n) for n in before} == before


def test_the_second_interrupt_acts_at_once():
    def interrupted_twice():
        with deferred_signals() as request:
            os.kill(os.getpid(), signal.SIGINT)
            assert request.signal == signal.SIGINT
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(10)  # where another thread was told, the main one hears of it a little later

    with pytest.raises(KeyboardInterrupt):
        interrupted_twice()


def test_handlers_come_back_after_an_error():
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(RuntimeError, match="inside"), deferred_signals():
        raise RuntimeError("inside")
    assert signal.getsignal(signal.SIGTERM) is before


def interrupt_one_of_two() -> int:
    import torch.distributed as dist

    request = StopRequest()
    if dist.get_rank() == 1:
        request.signal = signal.SIGTERM
    return request.agreed(None)


def test_processes_stop_together(run_processes):
    assert run_processes(interrupt_one_of_two, 2) == [signal.SIGTERM, signal.SIGTERM]
