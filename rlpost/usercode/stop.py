"""How long calls of users' functions may still take after a signal asked the program to stop."""

from __future__ import annotations

import time

GRACE = 5.0
"""Seconds that a call may go on after the signal. Its step is repeated when the run is resumed."""


class Stopped(BaseException):
    """A call was ended, because a signal asked the program to stop."""


class Stop:
    """Whether a signal asked to stop."""

    _at: float | None = None
    all_are_waited_for = False
    """Calls that were begun are all needed, as where sampling is ahead of training: each has the time for itself."""

    @classmethod
    def request(cls) -> None:
        """Note that a signal asked to stop; only the first one counts."""
        if cls._at is None:
            cls._at = time.monotonic() + GRACE

    @classmethod
    def forget(cls) -> None:
        """Forget the signal."""
        cls._at = None

    @classmethod
    def over(cls, now: float, began: float) -> bool:
        """Whether a call that began then has used up its time."""
        if cls._at is None:
            return False
        return now >= (max(cls._at, began + GRACE) if cls.all_are_waited_for else cls._at)
