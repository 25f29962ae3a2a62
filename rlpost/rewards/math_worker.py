"""The process that makes slow comparisons: run as a script, killed when one takes too long.

Requests are lines on stdin, `["reference", "answer", seconds]`; for each it writes one line to stdout: right, wrong,
unparseable or error. It says `ready` first, and ends when stdin does.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import sys
from pathlib import Path

MEMORY = 2 << 30
"""Limit on the address space, in bytes; a comparison needs a hundredth of it."""


def main() -> None:
    """Answer requests until stdin ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    if sys.platform == "linux":
        _, hard = resource.getrlimit(resource.RLIMIT_AS)
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY if hard == resource.RLIM_INFINITY else min(MEMORY, hard), hard))
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever a library prints must not be read as a reply
    # Import the rlpost that this script belongs to.
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
    judge("\\sqrt{2}", "x")  # does the imports before the first deadline
    print("ready", file=replies, flush=True)
    for line in sys.stdin:
        reference, answer, seconds = json.loads(line)
        # The kernel ends this process even inside C, so no orphan computes on if the parent was killed.
        signal.setitimer(signal.ITIMER_REAL, seconds + 1.0)
        reply = judge(reference, answer)
        signal.setitimer(signal.ITIMER_REAL, 0.0)
        print(reply, file=replies, flush=True)


def judge(reference: str, answer: str) -> str:
    """Compare two answers; `error`: the reference is unreadable, or they are too large to be computed."""
    from rlpost.rewards.math_compare import Algebra, same
    from rlpost.rewards.math_numeric import Undecided, equal, proportional
    from rlpost.rewards.math_read import read
    from rlpost.rewards.math_text import Unreadable

    try:
        left = read(reference)
    except Unreadable:
        return "error"
    try:
        return "right" if same(left, read(answer), Algebra(equal, proportional)) else "wrong"
    except Unreadable:
        return "unparseable"
    except (Undecided, MemoryError, RecursionError):
        return "error"


if __name__ == "__main__":
    main()
