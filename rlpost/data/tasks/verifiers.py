"""Environments of the package verifiers 0.4: their tasks as rows, and their episodes with the model's turns.

`verifiers.rows` makes rows of an environment's taskset, and `verifiers.Environment` plays its episodes: it runs the
environment's own `run`, whose agent asks for completions of a model; each request is a turn here. What its rewards
give is the reward of the last turn. Both run in a process of their own, as functions of a user's file do.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Mapping, Sequence
from itertools import islice
from typing import Any
from uuid import uuid4

from rlpost.data.verifiers_package import Host, configured, host, one_line
from rlpost.data.verifiers_policy import Conversation
from rlpost.section import LocalPath


def rows(
    *,
    env: LocalPath,
    args: dict[str, Any] | None = None,
    size: int | None = None,
    skip: int = 0,
) -> list[dict[str, Any]]:
    """The tasks of an environment as rows: `prompt` (messages), `index`, `key`, `task`, and `answer` where it is text.

    Args:
        env: the name of an installed taskset, or a file with one.
        args: of the environment, as its configuration names them; those of its tasks stand below `taskset`.
        size: number of tasks; all by default.
        skip: so many before them.

    Raises:
        ValueError: `args` do not fit, there are not so many tasks, or there is no end to them.
    """
    if skip < 0 or (size is not None and size < 1):
        raise ValueError(f"skip={skip}, size={size}: give skip at least 0 and size at least 1")
    taskset = configured(env, args or {}).taskset
    if size is None and not taskset.bounded:
        raise ValueError(f"{env} makes tasks without end: give their number, `size`")
    found = [_row(task) for task in islice(taskset, skip, None if size is None else skip + size)]
    if len(found) < (size or 1):
        raise ValueError(f"size={size}, skip={skip}: {env} has only {skip * bool(found) + len(found)} tasks")
    return found


def _row(task: Any) -> dict[str, Any]:
    data = task.data
    turns = [] if data.system_prompt is None else [{"role": "system", "content": data.system_prompt}]
    if isinstance(data.prompt, str):
        turns.append({"role": "user", "content": data.prompt})
    elif data.prompt is not None:
        turns += [message.model_dump(mode="json", exclude_none=True) for message in data.prompt]
    if data.prompt is None:  # only the episode shows what its first turn is
        turns.append({"role": "user", "content": data.name or task.key})
    answer = getattr(data, "answer", None)
    return {
        "prompt": turns,
        **({"answer": answer} if isinstance(answer, str) else {}),
        "index": data.idx,
        "key": task.key,
        "task": data.model_dump(mode="json", exclude_defaults=True),
    }


class Environment:
    """Episodes of an environment of verifiers: `reset` begins one, `step` answers a turn of the model.

    The rows are those of `verifiers.rows` with the same environment.
    """

    def __init__(self, *, env: LocalPath, args: dict[str, Any] | None = None) -> None:
        self._env = env
        self._args = args or {}
        self._conversation = Conversation()
        self._name = uuid4().hex
        self._host: Host | None = None
        self._run: asyncio.Task[Any] | None = None

    async def reset(self, example: Mapping[str, Any]) -> Sequence[Mapping[str, Any]]:
        """The messages of the first request.

        Args:
            example: a row of `verifiers.rows`.

        Raises:
            ValueError: the row is none of this environment, or the environment is of a kind that is not played.
            RuntimeError: the episode failed, or ended, before it asked for a turn.
        """
        seed = random.getrandbits(64)  # before anything is waited for: other episodes draw meanwhile
        if not {"index", "key"} <= set(example):
            raise ValueError("a row has no 'index' and 'key': verifiers.Environment takes rows of `verifiers.rows`")
        self._host = await host(self._env, self._args)
        task = self._host.task(example["index"], example["key"])
        self._host.policy.open(self._name, self._conversation)
        self._run = asyncio.ensure_future(self._host.play(task, self._name, seed))
        if (messages := await self._asked()) is None:
            raise _unplayed(self._run.result(), "before it asked for a turn")
        return messages

    async def step(self, action: str) -> tuple[Any, float | None, bool, bool, dict[str, Any]]:
        """What follows a turn of the model: the next messages, or the end with the reward of the whole episode.

        Args:
            action: the turn's text.

        Raises:
            ValueError: the conversation does not go on as it was.
            RuntimeError: the episode failed.
        """
        assert self._run is not None
        self._conversation.answer(action)
        if (messages := await self._asked()) is not None:
            return messages, None, False, False, {}
        assert self._host is not None
        traces = self._host.traces(self._run.result())
        if traces is None:
            raise _unplayed(self._run.result(), "")
        truncated = any(trace.is_truncated or trace.is_timeout for trace in traces)
        return None, sum(trace.reward for trace in traces), not truncated, truncated, _told(traces)

    async def close(self) -> None:
        """End the episode, wherever it is."""
        self._conversation.close()
        if self._host is not None:
            self._host.policy.forget(self._name)
        if self._run is not None and not self._run.done():
            self._run.cancel()
            await asyncio.wait({self._run})

    async def _asked(self) -> Sequence[Mapping[str, Any]] | None:
        """The messages that a request adds to the conversation; None where the episode has ended."""
        assert self._run is not None
        asked = asyncio.ensure_future(self._conversation.asked())
        try:
            await asyncio.wait({asked, self._run}, return_when=asyncio.FIRST_COMPLETED)
            return await asked if asked.done() else None
        except BaseException:
            await self.close()
            raise
        finally:
            asked.cancel()


def _unplayed(episode: Any, when: str) -> RuntimeError:
    """Why an episode has no reward, in one line, with the traceback as a note."""
    errors = [*episode.errors, *(error for trace in episode.traces for error in trace.errors)]
    if not errors:
        return RuntimeError(f"its episode ended {when}")
    last = errors[-1]
    found = RuntimeError(" ".join(["its episode failed", when]).strip() + f": {last.type}: {one_line(last.message)}")
    found.add_note(last.traceback or "")
    return found


def _told(traces: Sequence[Any]) -> dict[str, Any]:
    """What is saved with the last turn: single rewards and metrics by name, and why the episode ended."""
    rewards = {name: found.value for trace in traces for name, found in trace.rewards.items() if found is not None}
    metrics = {name: value for trace in traces for name, value in trace.metrics.items() if value is not None}
    ended = next((trace.stop_condition for trace in traces if trace.stop_condition), "")
    return {"rewards": rewards, "metrics": metrics, "ended": ended}
