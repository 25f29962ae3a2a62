"""The process that compares mathematical expressions: run as a script, killed when it takes too long.

It imports nothing of rlpost. Requests are lines on stdin, `["reference", "answer", seconds]`; for each it
writes one line to stdout: right, wrong, unparseable or error. It says `ready` first, and ends when stdin
does.
"""

from __future__ import annotations

import json
import os
import re
import resource
import signal
import sys

MEMORY = 2 << 30
"""Bytes of address space; sympy needs a thirtieth of it, a power tower all there is."""


def main() -> None:
    """Answer requests until stdin ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    if sys.platform == "linux":
        _, hard = resource.getrlimit(resource.RLIMIT_AS)
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY if hard == resource.RLIM_INFINITY else min(MEMORY, hard), hard))
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever a library prints must not be read as a reply
    judge("1", "x")  # imports sympy and builds the grammar's tables, outside anybody's deadline
    print("ready", file=replies, flush=True)
    for line in sys.stdin:
        reference, answer, seconds = json.loads(line)
        # The kernel ends this process even inside C, so no orphan computes on if the parent was killed.
        signal.setitimer(signal.ITIMER_REAL, seconds + 1.0)
        reply = judge(reference, answer)
        signal.setitimer(signal.ITIMER_REAL, 0.0)
        print(reply, file=replies, flush=True)


def judge(reference: str, answer: str) -> str:
    """Compare two expressions by computer algebra; `error`: the reference is unreadable, or sympy failed."""
    from math_verify import LatexExtractionConfig, parse, verify

    def read(text: str) -> list[object]:
        text = re.sub(r"\\?%$", "", text)  # 25+25 is 50%
        text = re.sub(r"(?<![\\a-zA-Z])(pi|sin|cos|tan|log|ln|exp)(?![a-zA-Z])", r"\\\1 ", text)
        text = re.sub(r"(?:\*\*|\^)\s*(-?\w+|\([^()]*\))", r"^{\1}", text)  # LaTeX reads 2^10 as 2^1 0
        expressions: list[object] = parse(
            f"\\boxed{{{text}}}",
            [LatexExtractionConfig(boxed_match_priority=0)],
            fallback_mode="no_fallback",
            parsing_timeout=None,  # its own deadlines are SIGALRM handlers, which C code holds up
            raise_on_error=True,
        )
        return expressions

    try:
        left, right = read(reference), read(answer)
        if not left or not right:
            return "unparseable" if left else "error"
        return "right" if verify(left, right, timeout_seconds=None, raise_on_error=True) else "wrong"
    except ImportError:
        raise
    except Exception:  # sympy raises whatever it likes; the reply says that it did
        return "error"


if __name__ == "__main__":
    main()
