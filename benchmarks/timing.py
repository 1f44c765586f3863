"""Times of functions measured in turn, so that what slows the machine slows all of them."""

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch


def interleaved(functions: Mapping[str, Callable[[], Any]], *, rounds: int) -> dict[str, Any]:
    """Times every function once a round, after one round that is not counted.

    On the CPU it is CPU time of the process, which other work on the machine disturbs least; with
    an accelerator, wall time around a synchronisation.
    """
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for number in range(rounds + 1):
        for name, function in functions.items():
            started = now()
            function()
            elapsed = now() - started
            if number:
                seconds[name].append(elapsed)
    return {
        name: {
            "median": statistics.median(times),
            "lowest": min(times),
            "highest": max(times),
            "rounds": rounds,
        }
        for name, times in seconds.items()
    }


def now() -> float:
    """Returns CPU seconds of the process; with an accelerator, wall seconds once it is idle."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        return time.perf_counter()
    return time.process_time()
