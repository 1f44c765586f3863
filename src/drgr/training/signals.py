"""Interrupts that wait for the end of a step."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import final

import torch
from torch.distributed import ProcessGroup

from drgr.collectives import sum_over_processes, world_size

_HANDLED = (signal.SIGINT, signal.SIGTERM)


@final
class StopRequest:
    """Remembers which signal asked for a stop; 0 while none did."""

    def __init__(self) -> None:
        self.signal = 0

    def agreed(self, group: ProcessGroup | None) -> int:
        """Returns the signal that any process received: all stop at the same step, or none."""
        if world_size(group) == 1:
            return self.signal
        received = torch.zeros(len(_HANDLED), dtype=torch.int64)
        if self.signal:
            received[_HANDLED.index(signal.Signals(self.signal))] = 1
        device = torch.device("cuda") if torch.cuda.is_available() else torch.device("cpu")
        counts = sum_over_processes(received.to(device), group).tolist()
        return next(
            (int(number) for number, count in zip(_HANDLED, counts, strict=True) if count), 0
        )


@contextmanager
def deferred_signals() -> Iterator[StopRequest]:
    """Turns SIGINT and SIGTERM into a request; a second one of the same kind acts at once."""
    request = StopRequest()
    previous = {number: signal.getsignal(number) for number in _HANDLED}

    def remember(number: int, frame: FrameType | None) -> None:
        del frame
        request.signal = number
        signal.signal(number, previous[signal.Signals(number)])

    for number in _HANDLED:
        signal.signal(number, remember)
    try:
        yield request
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
