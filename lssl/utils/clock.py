"""Clock: divides the time of a process, or of its GPU, among phases, without waiting for the device."""

from __future__ import annotations

import time
from collections import deque
from typing import Any

import torch

__all__ = ["Clock", "DeviceTimer", "HostTimer"]


class HostTimer:
    """Marks are seconds on the host's clock."""

    def mark(self) -> float:
        """Now."""
        return time.perf_counter()

    def passed(self, mark: float) -> bool:
        """Always true: the host has passed its own marks."""
        return True

    def seconds(self, first: float, second: float) -> float:
        """From one mark to the next."""
        return second - first

    def wait(self) -> None:
        """Nothing to wait for."""


class DeviceTimer:
    """Marks are CUDA events, so intervals are those of the GPU: also what it idles while the host is busy."""

    def __init__(self) -> None:
        self._free: list[Any] = []

    def mark(self) -> Any:
        """Records an event on the current stream, which takes microseconds."""
        event = self._free.pop() if self._free else torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def passed(self, mark: Any) -> bool:
        """Whether the GPU has reached the event; does not wait."""
        return bool(mark.query())

    def seconds(self, first: Any, second: Any) -> float:
        """Between two events that the GPU has passed; the first one is used again."""
        self._free.append(first)
        return first.elapsed_time(second) / 1000

    def wait(self) -> None:
        """Waits for the GPU; for the end of a run alone."""
        torch.cuda.synchronize()


class Clock:
    """Divides time among phases. Phases nest: an inner one interrupts the outer one.

    Every change of phase leaves a mark; :meth:`read` adds up the marks that the device has passed.

    Args:
        outermost: the phase in which the clock starts.
        timer: the source of marks; ``None`` takes the host's clock.

    Attributes:
        seconds: phase → its time, as far as it has been read.
        laps: copies of ``seconds`` at the calls of :meth:`lap`.
    """

    def __init__(self, outermost: str, timer: HostTimer | DeviceTimer | None = None) -> None:
        self.seconds: dict[str, float] = {}
        self.laps: list[dict[str, float]] = []
        self._timer: Any = timer or HostTimer()
        self._phases = [outermost]
        self._pending: deque[tuple[str, Any, bool]] = deque()
        self._last = self._timer.mark()

    @property
    def phase(self) -> str:
        """The current one."""
        return self._phases[-1]

    def begin(self, phase: str) -> None:
        """Begins a phase within the current one."""
        if phase != self._phases[-1]:
            self._mark()
        self._phases.append(phase)

    def end(self) -> None:
        """Ends the phase that began last; the outermost one goes on for ever."""
        if len(self._phases) > 1:
            if self._phases[-1] != self._phases[-2]:
                self._mark()
            self._phases.pop()

    def lap(self) -> None:
        """Keeps the times up to now in :attr:`laps`, once the device has come here."""
        self._mark(lap=True)

    def read(self, wait: bool = False) -> None:
        """Adds up the marks that the device has passed.

        Args:
            wait: waits for the device, so that nothing is left out.
        """
        if wait:
            self._timer.wait()
        while self._pending and (wait or self._timer.passed(self._pending[0][1])):
            phase, mark, lap = self._pending.popleft()
            self.seconds[phase] = self.seconds.get(phase, 0.0) + self._timer.seconds(self._last, mark)
            self._last = mark
            if lap:
                self.laps.append(dict(self.seconds))

    def _mark(self, lap: bool = False) -> None:
        self._pending.append((self._phases[-1], self._timer.mark(), lap))
