"""The process that renders chat templates: run as a script, limited in time and memory.

A chat template is a program that comes with a model. Jinja's sandbox isolates it from the machine, but does not stop
endless loops or `'a' * 10**10`, which cannot be interrupted from inside the process. Here the kernel's limits do. The
text is that of transformers' own renderer.

It imports nothing of rlpost. Requests and replies are lines of JSON. A request has `template`, a number; with
`source` and `special` (its text, its special tokens by name) the first time; `now`, what its clock is to show, or null;
and `jobs`: [conversation, length, add a
generation prompt, tell what is generated] each, over `conversations` of {messages, tools}. Every job is answered by a
line, {text, generated} or {error, kind}. It says `ready` first, and ends when stdin does.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import sys
from datetime import datetime, tzinfo
from pathlib import Path
from typing import Any

SECONDS = 2.0
"""Limit on the processor time of one rendering, which normally takes a thousandth of it."""
MEMORY = 1 << 30
"""Limit on the address space, in bytes, beyond that of the libraries."""
LONGEST = 1 << 26
"""Limit on the characters of a rendered conversation."""


def main() -> None:
    """Answer requests until stdin ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    signal.signal(signal.SIGPROF, signal.SIG_DFL)  # ends the process, even inside C
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever a library prints must not be read as a reply
    from transformers.utils import chat_template_utils

    _limit_memory()
    _write(replies, "ready")
    known: dict[int, tuple[str, dict[str, Any]]] = {}
    for line in sys.stdin:
        request = json.loads(line)
        if "source" in request:
            known[request["template"]] = (request["source"], request["special"])
        source, special = known[request["template"]]
        chat_template_utils.datetime = _clock(request["now"])
        for job in request["jobs"]:
            signal.setitimer(signal.ITIMER_PROF, SECONDS)
            answer = _render(chat_template_utils.render_jinja_template, request["conversations"], job, source, special)
            signal.setitimer(signal.ITIMER_PROF, 0.0)
            _write(replies, answer)


def _render(
    render: Any, conversations: list[dict[str, Any]], job: tuple[int, int, bool, bool], source: str, special: Any
) -> dict[str, Any]:
    number, length, generation, marks = job
    talk = conversations[number]
    try:
        texts, generated = render(
            [talk["messages"][:length]],
            tools=talk["tools"],
            chat_template=source,
            add_generation_prompt=generation,
            return_assistant_tokens_mask=marks,
            **special,
        )
    except MemoryError:
        return {"error": f"it needs more than {MEMORY >> 20} MiB of memory", "kind": "bounds"}
    except RecursionError:
        return {"error": "it calls itself without end", "kind": "bounds"}
    except Exception as failed:  # a template may do anything; the reply says what it did
        return {"error": " ".join(str(failed).split())[:300], "kind": type(failed).__name__}
    if len(texts[0]) > LONGEST:
        return {"error": f"it writes more than {LONGEST >> 20} million characters", "kind": "bounds"}
    return {"text": texts[0], "generated": generated[0] if marks else None}


def _clock(now: str | None) -> Any:
    """The `datetime` class for transformers' renderer, whose templates call `datetime.now()`."""
    if now is None:
        return datetime

    shown = datetime.fromisoformat(now)

    class Stopped(datetime):
        @classmethod
        def now(cls, tz: tzinfo | None = None) -> Any:
            return shown.replace(tzinfo=tz)

    return Stopped


def _limit_memory() -> None:
    if sys.platform != "linux":
        return
    now = int(Path("/proc/self/statm").read_text("ascii").split()[0]) * resource.getpagesize()
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    wanted = now + MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (wanted if hard == resource.RLIM_INFINITY else min(wanted, hard), hard))


def _write(replies: Any, answer: Any) -> None:
    replies.write(json.dumps(answer) + "\n")
    replies.flush()


if __name__ == "__main__":
    main()
