"""Where the time of a call goes, without waiting for the device while it runs."""

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn

from hico_kernels.patch.devices import device_of


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
            stream = torch.cuda.current_stream(device)  # whichever device is current
            events[0].record(stream)
            yield
            events[1].record(stream)
            self._events.append((name, *events))
        else:
            start = time.perf_counter()
            yield
            self._add(name, time.perf_counter() - start)

    def watch(
        self, modules: Sequence[nn.Module], name: str, device: torch.device
    ) -> Callable[[], None]:
        """Add what these modules take in this thread to `name`, until the returned undo. device:
        of those whose weights are offloaded.
        """
        thread, running, places = threading.get_ident(), [], {}
        if device.type == "cuda":
            places = {module: device_of(module, device) for module in modules}

        def before(module: nn.Module, args: tuple) -> None:
            if threading.get_ident() == thread:
                running.append(self.time(name, places.get(module, device)))
                running[-1].__enter__()

        def after(module: nn.Module, args: tuple, output: object) -> None:
            if threading.get_ident() == thread:
                running.pop().__exit__(None, None, None)

        hooks = [module.register_forward_pre_hook(before) for module in modules]
        hooks += [module.register_forward_hook(after) for module in modules]

        def undo() -> None:
            for hook in hooks:
                hook.remove()

        return undo

    def milliseconds(self) -> dict[str, float]:
        """Sums so far; waits for the device."""
        for name, start, end in self._events:
            end.synchronize()
            self._add(name, start.elapsed_time(end) / 1e3)
        self._events.clear()
        return {name: seconds * 1e3 for name, seconds in self._seconds.items()}

    def _add(self, name: str, seconds: float) -> None:
        self._seconds[name] = self._seconds.get(name, 0.0) + seconds
