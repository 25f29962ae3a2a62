"""A class environment as one function, which is called with a whole episode so far.

It keeps an instance of the class for each episode and takes it one step on. Where there is none, because its process
was lost, it makes one again: by `reset` and the steps so far, whose replies must be those of before.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import math
import random
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any

from rlpost.usercode.params import EPISODE
from rlpost.usercode.seeding import own_random, seed_all

POLICY, OTHER = "policy", "other"
"""Whose turn an action is."""


def is_environment(value: object) -> bool:
    """Whether it is a class with `reset` and `step`."""
    return inspect.isclass(value) and all(callable(getattr(value, name, None)) for name in ("reset", "step"))


def as_function(environment: type, *, here: bool = False) -> Callable[..., Any]:
    """The class as a function (_episode, **its arguments) -> a reply, a coroutine function if a method of it is.

    Args:
        environment: a class with `reset` and `step`.
        here: it runs in the trainer's process, whose random numbers it leaves alone; it has no coroutines.
    """
    methods = [getattr(environment, name, None) for name in ("reset", "step", "other", "step_other", "close")]
    live = _Live(environment, random.seed if here else seed_all)

    def play(_episode: Mapping[str, Any], **arguments: Any) -> Any:
        with own_random():
            return _driven(live.play(_episode, arguments))

    def play_apart(_episode: Mapping[str, Any], **arguments: Any) -> Any:
        return _driven(live.play(_episode, arguments))

    async def play_together(_episode: Mapping[str, Any], **arguments: Any) -> Any:
        return await live.play(_episode, arguments)

    together = any(map(inspect.iscoroutinefunction, methods))
    found: Any = play if here else play_together if together else play_apart
    found.__name__ = environment.__name__
    found.__module__ = environment.__module__
    found.__signature__ = _signature(environment)
    return found  # type: ignore[no-any-return]


def _signature(environment: type) -> inspect.Signature:
    _, *own = inspect.signature(environment.__init__).parameters.values()  # type: ignore[misc]
    own = [] if environment.__init__ is object.__init__ else own  # type: ignore[misc]
    by_name = [p.replace(kind=p.KEYWORD_ONLY) if p.kind is p.POSITIONAL_OR_KEYWORD else p for p in own]
    return inspect.Signature([inspect.Parameter(EPISODE, inspect.Parameter.POSITIONAL_OR_KEYWORD), *by_name])


def _driven(coroutine: Coroutine[Any, Any, Any]) -> Any:
    """The result of a coroutine that waits for nothing."""
    try:
        coroutine.send(None)
    except StopIteration as ended:
        return ended.value
    coroutine.close()
    raise TypeError("it waits for something: write its methods with `async def`")


@dataclass
class _Instance:
    """An episode that is under way."""

    own: Any
    replies: int = 0
    """Given so far; the first is that of `reset`."""


class _Live:
    """The instances of a class."""

    def __init__(self, environment: type, seed: Callable[[int], None]) -> None:
        self._class = environment
        self._seed = seed
        self._live: dict[str, _Instance] = {}

    async def play(self, episode: Mapping[str, Any], arguments: Mapping[str, Any]) -> dict[str, Any] | None:
        """The reply to an episode's last action; None where it is closed.

        An episode has a `key`, an `example`, `actions` [A] of (whose, text), `seeds` [A + 1] and `digests` [A] of the
        replies so far; or a `key` and `close`.
        """
        instance = self._live.pop(episode["key"], None)
        actions: Sequence[Sequence[str]] = episode.get("actions", ())
        if instance is not None and (episode.get("close") or instance.replies != len(actions)):
            await _closed(instance)
            instance = None
        if episode.get("close"):
            return None
        if instance is None:
            instance = _Instance(self._class(**arguments))
            for digest in episode["digests"]:
                if (await self._next(instance, episode))["digest"] != digest:
                    raise RuntimeError(_DIFFERS_AT_RESET if instance.replies == 1 else _DIFFERS)
        reply = await self._next(instance, episode)
        if reply["terminated"] or reply["truncated"]:
            await _closed(instance)
        else:
            self._live[episode["key"]] = instance
        return reply

    async def _next(self, instance: _Instance, episode: Mapping[str, Any]) -> dict[str, Any]:
        number, own = instance.replies, instance.own
        self._seed(episode["seeds"][number])
        if number == 0:
            reply = _outcome((await _value(own.reset(dict(episode["example"]))), None, False, False, {}), "reset")
        else:
            whose, text = episode["actions"][number - 1]
            name = "step" if whose == POLICY else "step_other"
            reply = _outcome(await _value(getattr(own, name)(text)), name)
        going = not (reply["terminated"] or reply["truncated"])
        asks = await _value(own.other()) if number and going and hasattr(own, "other") else None
        reply["asks"] = _said(asks, "other")
        instance.replies += 1
        written = json.dumps(reply, sort_keys=True, default=repr)
        return reply | {"digest": hashlib.blake2b(written.encode(), digest_size=8).hexdigest()}


_DIFFERS_AT_RESET = (
    "reset began otherwise than for another episode of the same prompt: draw random numbers from `random`, which is "
    "seeded by the prompt before it"
)
_DIFFERS = (
    "it replied otherwise when an episode that had lost its process was repeated: draw random numbers from `random`, "
    "which is seeded before every call"
)


async def _closed(instance: _Instance) -> None:
    if hasattr(instance.own, "close"):
        await _value(instance.own.close())


async def _value(found: Any) -> Any:
    return await found if isinstance(found, Awaitable) else found


def _outcome(found: Any, name: str) -> dict[str, Any]:
    """What a method returned, checked.

    Raises:
        TypeError: it is something else than is asked for.
    """
    if not isinstance(found, tuple | list) or len(found) != 5:
        raise TypeError(f"{name} returned {_kind(found)}; return (messages, reward, terminated, truncated, info)")
    messages, reward, terminated, truncated, info = found
    if reward is not None and not (isinstance(reward, Real) and math.isfinite(reward)):
        raise TypeError(f"{name} returned the reward {_kind(reward)}; return a finite number, or None")
    for what, value in (("terminated", terminated), ("truncated", truncated)):
        if value not in (True, False):
            raise TypeError(f"{name} returned {what}={_kind(value)}; return True or False")
    if not isinstance(info, Mapping | None):
        raise TypeError(f"{name} returned the info {_kind(info)}; return a dict of plain values")
    return {
        "messages": _said(messages, name),
        "reward": None if reward is None else float(reward),
        "terminated": bool(terminated),
        "truncated": bool(truncated),
        "info": {str(key): value for key, value in (info or {}).items()},
    }


def _said(messages: Any, name: str) -> Any:
    """Text, a list of messages, or None."""
    if messages is None or isinstance(messages, str):
        return messages
    for message in messages if isinstance(messages, list | tuple) else [messages]:
        if not isinstance(message, Mapping) or not {"role", "content"} <= set(message):
            raise TypeError(f"{name} said {_kind(messages)}; give messages, a list of {{role, content}}, or text")
    return [dict(message) for message in messages]


def _kind(value: object) -> str:
    written = repr(value)
    return f"a {type(value).__name__} ({written if len(written) <= 60 else f'{written[:59]}…'})"
