"""The gate between the driver and a side: a side stands still until it is let do its next step."""

from __future__ import annotations

import os
import resource
import time
from multiprocessing.connection import Client, Connection
from typing import Any

ADDRESS = "RLPOST_BENCH"
"""Environment variable with the address of the driver's socket."""


class BenchError(RuntimeError):
    """Something cannot be measured; its message is one line."""


class Gate:
    """A side's end: reports each step's seconds, and waits to be let on."""

    def __init__(self) -> None:
        self._driver: Connection = Client(os.environ[ADDRESS], "AF_UNIX")
        self._begin = time.perf_counter()

    def passed(self, **told: Any) -> None:
        """A step is over: tell its seconds and what else there is, and wait."""
        seconds = time.perf_counter() - self._begin
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        try:
            self._driver.send({"seconds": seconds, "peak_gib": peak, **told})
            self._driver.recv()
        except (EOFError, OSError):
            # The driver is gone. An exception would not end every side: a tracker's is caught.
            os._exit(1)
        self._begin = time.perf_counter()
