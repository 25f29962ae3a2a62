"""Signals that ask a run to stop: finish the step, save, exit."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Any, Self

from rlpost import console, ranks
from rlpost.errors import Interrupted
from rlpost.usercode.stop import Stop, Stopped

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Interrupts:
    """Context in which SIGINT, SIGTERM and SIGHUP are noted in `requested` instead of ending the process.

    A second SIGINT or SIGTERM raises KeyboardInterrupt at once. A second SIGHUP does not: a terminal that
    closes sends it twice, from the kernel and from the shell. A signal that was ignored before (nohup) stays
    ignored. Outside the main thread, where Python runs no handlers, the context does nothing.
    """

    requested: int | None
    """Number of the first signal; None while there was none."""
    rescue: Callable[[], str] | None
    """Called after a signal ended a call of a user's function: saves the state before the step; returns a message."""

    def __init__(self) -> None:
        self.requested = None
        self.rescue = None
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Self:
        Stop.forget()
        if threading.current_thread() is threading.main_thread():
            for number in _SIGNALS:
                if signal.getsignal(number) not in (signal.SIG_IGN, None):
                    self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is Stopped:
                raise self._interrupted() from None
        finally:
            for number, handler in self._before.items():
                signal.signal(number, handler)
            self._before.clear()
            Stop.forget()

    def agreed(self) -> int | None:
        """`requested`, of whichever rank has it: all of them stop at the same place."""
        found = ranks.largest(self.requested or 0) or None
        if self.requested is None:
            self.requested = found
        return found

    def _interrupted(self) -> Interrupted:
        assert self.requested is not None
        saved = self.rescue() if self.rescue is not None else "stopped while a user's function ran"
        return Interrupted(f"{saved}; run the same command to go on", self.requested)

    def _note(self, number: int, _frame: FrameType | None) -> None:
        if self.requested is not None:
            if number == signal.SIGHUP:
                return
            raise KeyboardInterrupt
        self.requested = number
        if ranks.count() == 1:  # else the other ranks wait for what a call returns
            Stop.request()
        name = signal.Signals(number).name
        console.notice(f"{name}: stopping after this step, with a checkpoint (again: stop at once)")


@contextmanager
def signals_raise() -> Iterator[None]:
    """Inside, SIGTERM and SIGHUP raise `Interrupted`, as Ctrl-C raises KeyboardInterrupt: what was begun is removed.

    A signal that is ignored (nohup) stays ignored; outside the main thread the context does nothing.
    """

    def stop(number: int, _frame: FrameType | None) -> None:
        raise Interrupted(f"stopped by {signal.Signals(number).name}", number)

    before: dict[signal.Signals, Any] = {}
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(number) not in (signal.SIG_IGN, None):
                before[number] = signal.signal(number, stop)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
