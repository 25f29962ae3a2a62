"""The model that environments of verifiers ask: an endpoint on this machine, which answers with turns of rlpost's.

An environment's agent asks an OpenAI-compatible endpoint for chat completions. The one here holds every request until
the episode it belongs to is told the model's turn. Requests name the episode as their model.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Mapping, Sequence
from typing import Any

KEY = "X-Rlpost-Key"
"""The header without which a request is refused: other users of the machine can reach the endpoint."""


class Conversation:
    """What one episode asks the model, a request at a time, each of which goes on with the same conversation."""

    def __init__(self) -> None:
        self._requests: asyncio.Queue[tuple[Mapping[str, Any], asyncio.Future[str]]] = asyncio.Queue()
        self._messages: list[dict[str, Any]] = []
        self._reply: asyncio.Future[str] | None = None
        self._closed = False

    async def ask(self, body: Mapping[str, Any]) -> str:
        """The model's turn for a request, once it is there; cancelled where the episode is closed."""
        reply: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        if self._closed:
            reply.cancel()
        self._requests.put_nowait((body, reply))
        return await reply

    async def asked(self) -> Sequence[Mapping[str, Any]]:
        """The messages that the next request adds: all of its first, and then what follows the model's last turn.

        Raises:
            ValueError: it asks while another is unanswered, with tools, for a stream, or in another conversation.
        """
        body, reply = await self._requests.get()
        if self._reply is not None and not self._reply.done():
            reply.cancel()
            raise ValueError("it asks for two turns at a time: only one conversation an episode is played")
        if tools := body.get("tools"):
            names = ", ".join(tool.get("function", tool).get("name", "?") for tool in tools)
            raise ValueError(f"it gives the model tools ({names}): environments with tools are not played")
        if body.get("stream"):
            raise ValueError("its harness asks for turns as streams: take the one that is taken where none is named")
        messages = [_plain(message) for message in body["messages"]]
        known = len(self._messages)
        if messages[:known] != self._messages or (known and len(messages) == known):
            raise ValueError("its request does not go on with the conversation so far: only one an episode is played")
        self._messages, self._reply = messages, reply
        return messages[known:]

    def answer(self, text: str) -> None:
        """Answer the last request with the model's turn."""
        assert self._reply is not None
        self._messages.append({"role": "assistant", "content": text})
        if not self._reply.done():
            self._reply.set_result(text)

    def close(self) -> None:
        """Answer no more."""
        self._closed = True
        waiting = [self._reply] if self._reply is not None else []
        while not self._requests.empty():
            waiting.append(self._requests.get_nowait()[1])
        for reply in waiting:
            reply.cancel()


class Policy:
    """The endpoint, for all episodes of a process."""

    def __init__(self) -> None:
        self.key = secrets.token_urlsafe(16)
        self.url = ""
        """Known once it has started."""
        self._open: dict[str, Conversation] = {}

    def open(self, name: str, conversation: Conversation) -> None:
        """Answer requests to the model `name` with turns of this conversation."""
        self._open[name] = conversation

    def forget(self, name: str) -> None:
        """Answer them no more."""
        self._open.pop(name, None)

    async def start(self) -> None:
        """Listen on a free port of this machine, until the process ends."""
        from aiohttp import web

        async def complete(request: Any) -> Any:
            body = await request.json()
            conversation = self._open.get(body.get("model", ""))
            if request.headers.get(KEY) != self.key or conversation is None:
                return web.json_response({"error": {"message": "no such episode"}}, status=404)
            try:
                text = await conversation.ask(body)
            except asyncio.CancelledError:
                return web.json_response({"error": {"message": "the episode is over"}}, status=409)
            return web.json_response(_completion(body["model"], text))

        app = web.Application(client_max_size=1 << 30)
        app.router.add_post("/v1/chat/completions", complete)
        runner = web.AppRunner(app)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        self.url = f"http://127.0.0.1:{runner.addresses[0][1]}/v1"


def _completion(model: str, text: str) -> dict[str, Any]:
    """A turn as a chat completion of OpenAI's API; tokens are rlpost's to count."""
    return {
        "id": f"chatcmpl-{secrets.token_hex(8)}",
        "object": "chat.completion",
        "created": 0,
        "model": model,
        "choices": [{"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"}],
        "usage": {"prompt_tokens": 0, "completion_tokens": 0, "total_tokens": 0},
    }


def _plain(message: Mapping[str, Any]) -> dict[str, Any]:
    """Role and text of a message.

    Raises:
        ValueError: it has an image.
    """
    content = message.get("content") or ""
    if not isinstance(content, str):
        if any(part.get("type") != "text" for part in content):
            raise ValueError("it shows the model an image: only text is played")
        content = "\n".join(part["text"] for part in content)
    return {"role": message["role"], "content": content}
