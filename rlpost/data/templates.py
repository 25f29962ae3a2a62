"""Renders chat templates in a separate process, which is ended if one takes too much time or memory."""

from __future__ import annotations

import atexit
import json
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlpost.data.template_worker import SECONDS
from rlpost.errors import ModelError

Message = dict[str, Any]

REMEDY = "set model.chat_template=FILE.jinja"
_SCRIPT = Path(__file__).with_name("template_worker.py")


@dataclass(frozen=True)
class Talk:
    """A conversation and its tools."""

    messages: Sequence[Message]
    tools: Sequence[Any] | None = None


@dataclass(frozen=True)
class Job:
    """One rendering."""

    talk: Talk
    length: int
    """Only the first so many messages."""
    generation: bool = False
    """With the generation prompt."""
    marks: bool = False
    """Also return the ranges inside the template's generation markers."""


@dataclass(frozen=True)
class Rendered:
    """The result of a job."""

    text: str
    error: str = ""
    """Why rendering failed, or empty."""
    generated: Sequence[tuple[int, int]] = ()
    """Ranges of the text inside the template's generation markers."""


def render_all(tokenizer: Any, jobs: Sequence[Job], location: str) -> list[Rendered]:
    """Render with the tokenizer's chat template, as its `apply_chat_template` does.

    Raises:
        ModelError: there is no template, or the process did not start.
    """
    if not tokenizer.chat_template:
        raise ModelError(f"{location}: the tokenizer has no chat template: {REMEDY}")
    try:
        # A model may have a second template for conversations with tools.
        sources = [tokenizer.get_chat_template(tools=job.talk.tools) for job in jobs]
    except ValueError as error:
        raise ModelError(f"{location}: not a chat template: {_line(error)}: {REMEDY}") from error
    special = {k: v if isinstance(v, list) else str(v) for k, v in tokenizer.special_tokens_map.items()}
    rendered: dict[int, Rendered] = {}
    for source in dict.fromkeys(sources):
        own = [i for i, s in enumerate(sources) if s == source]
        rendered.update(zip(own, _PROCESS.render(source, special, [jobs[i] for i in own]), strict=True))
    return [rendered[i] for i in range(len(jobs))]


@contextmanager
def clock_at(now: Callable[[], str]) -> Iterator[None]:
    """Inside, templates that ask for the time (`strftime_now`) get `now()`, in ISO format.

    Some templates write the date into every prompt: rows would change from day to day, and a resumed run would differ
    from an uninterrupted one.
    """
    before = _PROCESS.now
    _PROCESS.now = now
    try:
        yield
    finally:
        _PROCESS.now = before


class _Process:
    """The process; started when needed, and again after it was ended."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._known: dict[str, int] = {}
        self._lock = threading.Lock()
        self._ended = 0
        """The exit status of the last process that a job ended."""
        self.now: Callable[[], str] | None = None
        """Gives the time to templates; None for the real time."""

    def render(self, source: str, special: Mapping[str, Any], jobs: Sequence[Job]) -> list[Rendered]:
        """The jobs, all of one template."""
        talks = list({id(job.talk): job.talk for job in jobs}.values())
        number = {id(talk): i for i, talk in enumerate(talks)}
        request = {
            "conversations": [{"messages": t.messages, "tools": t.tools} for t in talks],
            "jobs": [(number[id(job.talk)], job.length, job.generation, job.marks) for job in jobs],
            "now": self.now() if self.now is not None and "strftime_now" in source else None,
        }
        with self._lock:
            try:
                answers = self._ask(source, special, request)
            except BaseException:
                self._end()  # otherwise it would answer the next call with this one's reply
                raise
        late = self._ended == -signal.SIGPROF
        reason = f"it takes more than {SECONDS:g} s of processor time" if late else "it ends its process, out of memory"
        rest = Rendered("", f"fails: {reason}")
        return [_rendered(answer) for answer in answers] + [rest] * (len(jobs) - len(answers))

    def _ask(self, source: str, special: Mapping[str, Any], request: dict[str, Any]) -> list[dict[str, Any]]:
        """The replies, up to the job that ended the process."""
        process = self._process if self._process is not None and self._process.poll() is None else self._start()
        key = f"{special}{source}"
        request["template"] = self._known.get(key, len(self._known))
        if key not in self._known:
            self._known[key] = request["template"]
            request |= {"source": source, "special": dict(special)}
        assert process.stdin is not None
        assert process.stdout is not None
        answers: list[dict[str, Any]] = []
        try:
            process.stdin.write(json.dumps(request, default=str).encode() + b"\n")
            process.stdin.flush()
            for _ in request["jobs"]:
                answers.append(json.loads(process.stdout.readline()))
        except (BrokenPipeError, json.JSONDecodeError):  # no line, or half of one
            self._ended = process.wait()
            self._end()
        return answers

    def _start(self) -> subprocess.Popen[bytes]:
        self._end()
        process = subprocess.Popen(
            [sys.executable, "-P", str(_SCRIPT)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            process_group=0,  # a terminal's Ctrl-C goes to our process group
        )
        self._process = process
        assert process.stdout is not None
        if process.stdout.readline() != b'"ready"\n':
            raise ModelError(
                f"chat template: the process that renders it did not start (ended with {process.wait()}); "
                f"see why with: {sys.executable} -P {_SCRIPT} < /dev/null"
            )
        return process

    def _end(self) -> None:
        process, self._process = self._process, None
        self._known = {}
        if process is None:
            return
        process.kill()
        process.wait()
        for pipe in (process.stdin, process.stdout):
            assert pipe is not None
            pipe.close()

    def close(self) -> None:
        """End the process."""
        with self._lock:
            self._end()


def _rendered(answer: Mapping[str, Any]) -> Rendered:
    if "error" not in answer:
        return Rendered(answer["text"], "", [(a, b) for a, b in answer["generated"] or ()])
    kind, reason = answer["kind"], answer["error"]
    if kind == "bounds":
        return Rendered("", f"fails: {reason}")
    by_itself = kind in ("TemplateError", "TemplateSyntaxError")  # its own words, or where it is malformed
    return Rendered("", f"refuses it: {reason}" if by_itself else f"fails on it: {kind}: {reason}")


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]


_PROCESS = _Process()
atexit.register(_PROCESS.close)
