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
    def over(cls, now: float) -> bool:
        """Whether calls have used up their time."""
        return cls._at is not None and now >= cls._at
