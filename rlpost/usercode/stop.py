"""A signal asked the program to stop: how long calls of users' functions may still take."""

from __future__ import annotations

import time

GRACE = 5.0
"""Seconds that a call may go on after the signal. What it belongs to is done again when the run goes on."""


class Stopped(BaseException):
    """A call was ended, because a signal asked the program to stop."""


class Stop:
    """Whether a signal asked to stop, for whoever waits."""

    _at: float | None = None

    @classmethod
    def asked(cls) -> None:
        """A signal asks to stop; the first one counts."""
        if cls._at is None:
            cls._at = time.monotonic() + GRACE

    @classmethod
    def forget(cls) -> None:
        """Nothing asks to stop any more."""
        cls._at = None

    @classmethod
    def over(cls, now: float) -> bool:
        """Whether calls have had their time."""
        return cls._at is not None and now >= cls._at
