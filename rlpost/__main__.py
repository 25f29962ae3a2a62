"""`python -m rlpost` is `rlpost`; launchers need it."""

from __future__ import annotations

import os
import signal
from types import FrameType


def main() -> None:
    """Run the command line; Ctrl-C while modules are being imported ends it at once."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _interrupt)
    from rlpost.cli.app import main as run

    run()


def _interrupt(_number: int, frame: FrameType | None) -> None:
    """KeyboardInterrupt, but not from within an import.

    There it would come out as some other error of a half-loaded C extension, or be lost; and nothing is being written.
    """
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            os._exit(128 + signal.SIGINT)
        frame = frame.f_back
    raise KeyboardInterrupt


if __name__ == "__main__":
    main()
