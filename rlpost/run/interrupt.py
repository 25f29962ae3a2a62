"""Signals that ask a run to stop: finish the step, save, leave."""

import signal
import threading
from types import FrameType, TracebackType
from typing import Any, Self

from rlpost import console

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Interrupts:
    """Context in which SIGINT, SIGTERM and SIGHUP are noted in `requested` instead of ending the process.

    A second SIGINT or SIGTERM raises KeyboardInterrupt at once. A second SIGHUP does not: a terminal that
    closes sends it twice, from the kernel and from the shell. A signal that was ignored before (nohup) stays
    ignored. Outside the main thread, where Python runs no handlers, the context does nothing.
    """

    requested: int | None
    """Number of the first signal; None while there was none."""

    def __init__(self) -> None:
        self.requested = None
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            for number in _SIGNALS:
                if signal.getsignal(number) not in (signal.SIG_IGN, None):
                    self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before.clear()

    def _note(self, number: int, _frame: FrameType | None) -> None:
        if self.requested is not None:
            if number == signal.SIGHUP:
                return
            raise KeyboardInterrupt
        self.requested = number
        name = signal.Signals(number).name
        console.notice(f"{name}: stopping after this step, with a checkpoint (again: stop at once)")
