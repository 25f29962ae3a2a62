"""A server with OpenAI's interface, in a thread, whose answers a test writes and whose requests it counts."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass(frozen=True)
class Refusal:
    """A reply that is no answer."""

    status: int
    text: str = "{}"
    headers: dict[str, str] = field(default_factory=dict)


Answer = Callable[[str], "str | Refusal"]
"""(the first message) -> the text of the judge's answer."""


class JudgeServer(ThreadingHTTPServer):
    """What was asked, and how much at once."""

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, answer: Answer) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.answer = answer
        self.bodies: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.lock = threading.Lock()
        self.active = 0
        self.most = 0
        self.raw: str | None = None
        self.finish = "stop"

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/v1"

    @property
    def prompts(self) -> list[str]:
        return [body["messages"][0]["content"] for body in self.bodies]


class _Handler(BaseHTTPRequestHandler):
    server: JudgeServer
    protocol_version = "HTTP/1.1"
    wbufsize = -1  # headers and body in one piece, or TCP waits between them

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        server = self.server
        with server.lock:
            server.bodies.append(body)
            server.headers.append(dict(self.headers))
            server.active += 1
            server.most = max(server.most, server.active)
        try:
            said = server.answer(body["messages"][0]["content"])
        finally:
            with server.lock:
                server.active -= 1
        if self.path != "/v1/chat/completions":
            said = Refusal(404, f"no {self.path}")
        if isinstance(said, str):
            choice = {"message": {"role": "assistant", "content": said}, "finish_reason": server.finish}
            said = Refusal(200, server.raw or json.dumps({"choices": [choice]}))
        data = said.text.encode()
        self.send_response(said.status)
        for name, value in {"Content-Length": str(len(data)), **said.headers}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: Any) -> None:
        pass


@contextmanager
def judging(answer: Answer) -> Iterator[JudgeServer]:
    server = JudgeServer(answer)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def shown(prompt: str, title: str) -> str:
    """A text of that title in a prompt: `answer`, `first answer`, `question`."""
    lines = prompt.splitlines()
    begin = next(i for i, line in enumerate(lines) if line.endswith(f": the {title} ---"))
    mark = lines[begin].removeprefix("--- ").partition(":")[0]
    return "\n".join(lines[begin + 1 : lines.index(f"--- {mark}: end of the {title} ---")])
