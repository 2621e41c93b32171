"""Where the time of a call goes, without waiting for the device while it runs."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class Clock:
    """Sums of named pieces of work."""

    def __init__(self) -> None:
        self._seconds: dict[str, float] = {}
        self._events: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []

    @contextmanager
    def time(self, name: str, device: torch.device) -> Iterator[None]:
        """Add what runs inside to `name`: host time on the CPU, device time on CUDA. In compiled
        code nothing: there the work is not done in its place.
        """
        if torch.compiler.is_compiling():
            yield
        elif device.type == "cuda":
            events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
            events[0].record()
            yield
            events[1].record()
            self._events.append((name, *events))
        else:
            start = time.perf_counter()
            yield
            self._add(name, time.perf_counter() - start)

    def milliseconds(self) -> dict[str, float]:
        """Sums so far; waits for the device."""
        for name, start, end in self._events:
            end.synchronize()
            self._add(name, start.elapsed_time(end) / 1e3)
        self._events.clear()
        return {name: seconds * 1e3 for name, seconds in self._seconds.items()}

    def _add(self, name: str, seconds: float) -> None:
        self._seconds[name] = self._seconds.get(name, 0.0) + seconds
