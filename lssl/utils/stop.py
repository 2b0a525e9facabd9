"""Ends of processes: signals noted until a run can save, or obeyed at once; workers that end with their parent."""

from __future__ import annotations

import atexit
import ctypes
import os
import signal
import sys
import threading
import time
from contextlib import suppress
from types import FrameType
from typing import Any

__all__ = [
    "NoBatch",
    "StopSignals",
    "Stopped",
    "end_soon",
    "end_with_parent",
    "leave_signals_to_parent",
    "obey_signals",
]

NAMES = ("SIGTERM", "SIGINT", "SIGUSR1")  # of a scheduler, of Ctrl-C, of a scheduler before its time limit
LOADER = os.path.join("torch", "utils", "data", "dataloader.py")
LOOK, PATIENCE = 1.0, 20.0  # seconds after a signal until the wait for a batch ends, and until hanging workers do
TWICE = 0.2  # seconds within which a second Ctrl-C is the same one, sent to the process and to its group
AGAIN = 0.05  # seconds until a stop that Python has dropped is raised again


class Stopped(SystemExit):
    """Ends the process with the status that a shell gives to the signal: 143 for SIGTERM, 130 for Ctrl-C.

    Args:
        number: of the signal.
    """

    def __init__(self, number: int) -> None:
        super().__init__(128 + number)
        self.number = number


class NoBatch(RuntimeError):
    """The run was asked to stop while it waited for a batch, which may never come."""


class StopSignals:
    """Handles the signals that ask this process to stop.

    While :attr:`wait` is false, the process stops at once, with one sentence; a further signal does not disturb its
    ending, but a second Ctrl-C cuts it short. While it is true, the signal is noted in :attr:`number`, and
    the owner stops when it has saved; a second Ctrl-C ends the process without saving. If the main thread waits for a
    batch of a DataLoader meanwhile, it gets :class:`NoBatch` after a second: a worker may hang on a dead disk. Forked
    workers ignore the signals: their parent ends them. As a context manager, it restores the earlier
    handlers, and an error that follows a stop is the stop.

    Attributes:
        number: the first signal that arrived while waiting, or ``None``.
    """

    def __init__(self) -> None:
        self.number: int | None = None
        self._wait = False
        self._pid, self._last, self._stopping = os.getpid(), 0.0, 0
        self._earlier: dict[int, Any] = {}

    @property
    def wait(self) -> bool:
        """Whether a signal waits for the owner."""
        return self._wait

    @wait.setter
    def wait(self, value: bool) -> None:
        self._wait = value
        if not value and self.number is not None and os.getpid() == self._pid and hasattr(signal, "setitimer"):
            signal.setitimer(signal.ITIMER_REAL, 0)  # Lightning takes the handler away, and the alarm would kill

    def __getstate__(self) -> dict[str, Any]:
        """The earlier handlers stay in this process."""
        return {**self.__dict__, "_earlier": {}}

    def __enter__(self) -> StopSignals:
        self._stopping = 0
        if sys.unraisablehook is _unraisable:
            sys.unraisablehook = sys.__unraisablehook__
        self.listen()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> None:
        self.wait = False
        for number, handler in self._earlier.items():
            if handler is not None:  # not one of Python's
                signal.signal(number, handler)
        self._earlier = {}
        if self._stopping and isinstance(error, Exception):  # the stop was dropped, or workers have ended of it, too
            raise Stopped(self._stopping) from None

    def listen(self, *others: int) -> None:
        """Installs the handlers, also over those that others have installed since; only the main thread can.

        Args:
            *others: further signals.
        """
        if threading.current_thread() is not threading.main_thread():
            return
        self._pid = os.getpid()
        known = [getattr(signal, name) for name in NAMES if hasattr(signal, name)]
        for number in {*known, *others}:
            if signal.getsignal(number) != self._handle:
                earlier = signal.signal(number, self._handle)
                self._earlier.setdefault(number, earlier)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._pid:
            return
        name = "Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name
        now, before = time.monotonic(), self._last
        self._last = now
        if self._stopping or self.number is not None:
            if number == signal.SIGINT and now - before > TWICE:
                _say("ended at once; the last save counts" if self.wait else "ended at once")
                os._exit(128 + number)
            return
        if hasattr(signal, "SIGCHLD"):  # workers may have got the same signal; torch would raise on their end
            signal.signal(signal.SIGCHLD, _nothing)
        if not self.wait:
            _say(f"stopped by {name}")
            if _imports(frame):  # libraries catch what is raised, and go on with half a module
                os._exit(128 + number)
            self._stopping = number
            sys.unraisablehook = _unraisable  # of objects that were half made
            atexit.register(signal.signal, signal.SIGINT, signal.SIG_DFL)  # Python's own would print a traceback
            raise Stopped(number)
        self.number = number
        again = " again" if number == signal.SIGINT else ""
        _say(f"{name}: the run is saved after this step, then stops; Ctrl-C{again} ends it at once")
        if hasattr(signal, "setitimer"):
            self._earlier.setdefault(signal.SIGALRM, signal.signal(signal.SIGALRM, self._look))
            signal.setitimer(signal.ITIMER_REAL, LOOK)

    def _look(self, number: int, frame: FrameType | None) -> None:
        if not self.wait or self.number is None or os.getpid() != self._pid:
            return
        if _waits_for_batch(frame):
            raise NoBatch("The run was asked to stop while it waited for a batch.")
        signal.setitimer(signal.ITIMER_REAL, LOOK)


def _waits_for_batch(frame: FrameType | None) -> bool:
    while frame is not None:
        if frame.f_code.co_name in ("__next__", "_get_data") and frame.f_code.co_filename.endswith(LOADER):
            return True
        frame = frame.f_back
    return False


def _imports(frame: FrameType | None) -> bool:
    while frame is not None and not frame.f_code.co_filename.startswith("<frozen importlib"):
        frame = frame.f_back
    return frame is not None


def _nothing(number: int, frame: FrameType | None) -> None:
    """To ignore a signal; SIG_DFL would make Python complain of one that is under way."""


def _unraisable(found: Any) -> None:
    """Keeps quiet about objects that a stop left half made; raises the stop again if Python has dropped it.

    It drops, for one, what is raised within a callback after a fork.
    """
    stop = found.exc_value
    if isinstance(stop, Stopped) and hasattr(signal, "setitimer"):
        signal.signal(signal.SIGALRM, lambda *_: _stop_again(stop.number))
        signal.setitimer(signal.ITIMER_REAL, AGAIN)


def _stop_again(number: int) -> None:
    signal.signal(signal.SIGCHLD, _nothing)  # torch may have set its own meanwhile
    raise Stopped(number)


def leave_signals_to_parent(parent: int) -> None:
    """Ignores signals in this worker that reach its whole group, as of a scheduler or Ctrl-C: the parent decides.

    A SIGTERM of the parent's own ends the worker: so does torch at the end of a loader. Where the sender of a signal
    is not known (macOS), only Ctrl-C is ignored.

    Args:
        parent: number of its process.
    """
    if not hasattr(signal, "sigwaitinfo"):
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        return
    numbers = {getattr(signal, name) for name in (*NAMES, "SIGUSR2")}
    signal.pthread_sigmask(signal.SIG_BLOCK, numbers)

    def receive() -> None:
        while True:
            info = signal.sigwaitinfo(numbers)
            if info.si_signo == signal.SIGTERM and info.si_pid == parent:
                os._exit(0)

    threading.Thread(target=receive, daemon=True).start()


def obey_signals() -> None:
    """Lets signals end this forked process, which would ignore them as long as it has its parent's handlers."""
    for name in NAMES:
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.default_int_handler if name == "SIGINT" else signal.SIG_DFL)


def end_soon(status: int) -> None:
    """Ends this process in some seconds, whatever happens: Python waits at its end for workers that may hang.

    Args:
        status: of the exit.
    """
    timer = threading.Timer(PATIENCE, os._exit, [status])
    timer.daemon = True
    timer.start()


def end_with_parent(parent: int) -> None:
    """Ends this worker when its parent ends, also if that is killed; a worker calls it first.

    On Linux the kernel does it, within any computation; elsewhere a thread looks every second.

    Args:
        parent: number of its process.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _say(text: str) -> None:
    """Print may be interrupted by this very handler; a write may not."""
    with suppress(OSError):
        os.write(2, f"\nlssl: {text}.\n".encode())
