"""How long a device is busy with something, without waiting for it there."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch

# Devices that work behind the host's back, and can say by themselves when they were where.
_APART = ("cuda", "xpu")


@dataclass
class Stopwatch:
    """Adds up the laps on one device."""

    device: torch.device
    _total: float = 0.0
    _laps: list[Callable[[], float]] = field(default_factory=list)

    @contextmanager
    def lap(self) -> Iterator[None]:
        """Count what is done, or begun on the device, within."""
        if self.device.type not in _APART:
            began = time.perf_counter()
            try:
                yield
            finally:
                self._total += time.perf_counter() - began
            return
        first, last = (torch.Event(self.device, enable_timing=True) for _ in range(2))
        first.record()
        try:
            yield
        finally:
            last.record()
            self._laps.append(lambda: _between(first, last))

    @property
    def seconds(self) -> float:
        """The seconds of all laps so far; waits for the end of the last, and for nothing behind it."""
        self._total += sum(lap() for lap in self._laps)
        self._laps.clear()
        return self._total


def settled(device: torch.device) -> float:
    """Return the time, in seconds, once a device has done all that was begun on it: waits."""
    if device.type in _APART:
        torch.get_device_module(device).synchronize(device)
    return time.perf_counter()


def _between(first: torch.Event, last: torch.Event) -> float:
    last.synchronize()
    return first.elapsed_time(last) / 1000
