"""An environment of the package verifiers, configured so that rlpost's model plays in it."""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import random
import sys
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from types import ModuleType
from typing import Any

from rlpost.data.verifiers_policy import KEY, Policy
from rlpost.usercode import load

CHAT = "rlpost_chat"
"""The harness that agents play with: a conversation and nothing else, in this process."""
REPLACED = ("bash", "null")
"""What verifiers takes where none is named: programs that are started for every turn, one with a shell here."""
COUNTED = ("max_input_tokens", "max_output_tokens", "max_total_tokens")
"""Limits of an agent in tokens, which it is not told of here."""


def configured(env: str, args: Mapping[str, Any]) -> Any:
    """The environment, loaded once a process as long as its file stays as it is.

    Raises:
        ValueError: its arguments do not fit, or it is of a kind that is not played.
    """
    if not isinstance(args, Mapping):
        raise ValueError(f"args: expected the environment's settings by name, got a {type(args).__name__}")
    name, file = env, Path(env)
    if file.suffix == ".py":
        if not file.exists():
            raise ValueError(f"there is no file {env}")
        name = load.load(file, hashlib.sha256(file.read_bytes()).hexdigest()).__name__
    return _configured(name, env, json.dumps(args, sort_keys=True, default=str))


@lru_cache(maxsize=16)
def _configured(name: str, env: str, written: str) -> Any:
    """Of a taskset that is imported by its name."""
    import verifiers.v1 as vf
    from pydantic import ValidationError

    sys.modules.setdefault(CHAT, _chat())
    args = json.loads(written)
    own = args.get("taskset") or {}
    try:
        kind = vf.env_config_type(name, args.get("id", ""))
        seats = {
            key: info.default for key, info in kind.model_fields.items() if isinstance(info.default, vf.AgentConfig)
        }
        default = vf.default_harness_id(name)
        agents = {seat: _agent(given, args.get(seat) or {}, default) for seat, given in seats.items()}
        config = vf.resolve_env_config({**args, **agents, "taskset": {**own, "id": name}})
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        raise ValueError(f"args.{place}: {one_line(first['msg'])}") from error
    _one_policy({seat: getattr(config, seat) for seat in seats})
    made = vf.load_environment(config)
    if made.taskset.toolsets(config.taskset) or type(made.taskset).task_type().toolsets(config.taskset.task):
        raise ValueError(f"{env} gives the model tools: environments with tools are not played")
    return made


def _agent(default: Any, given: Mapping[str, Any], harness: str) -> dict[str, Any]:
    """An agent's settings: what is given, and where nothing is, a conversation in this process."""
    own = dict(given)
    if default.harness is not None:
        harness = default.harness.id
    if harness in REPLACED:
        own.setdefault("harness", {"id": CHAT})
    if "runtime" not in default.model_fields_set:
        own.setdefault("runtime", {"type": "subprocess"})
    return own


def _one_policy(agents: Mapping[str, Any]) -> None:
    """Refuse agents that do not leave exactly one for the model that is trained.

    Raises:
        ValueError: none or several have no `client`, or it counts tokens.
    """
    free = [name for name, agent in agents.items() if agent.client is None]
    if len(free) != 1:
        named = ", ".join(free or agents)
        raise ValueError(
            f"the model plays one of its agents, and {len(free)} ask no other model ({named}): give `client` and "
            "`model` to all others in `args`"
        )
    for key in COUNTED:
        if getattr(agents[free[0]], key) is not None:
            raise ValueError(
                f"args.{free[0]}.{key}: tokens are counted by `max_new_tokens` of the sampling - remove it"
            )


class Host:
    """An environment that is up, with the endpoint that its agent asks."""

    def __init__(self, environment: Any, policy: Policy, serving: Any) -> None:
        self.policy = policy
        self._environment = environment
        self._serving = serving
        """Kept, for what it holds up ends with it."""
        self._tasks: Iterator[Any] = iter(environment.taskset)
        self._seen: list[Any] = []

    def task(self, index: int, key: str) -> Any:
        """The task of a row.

        Raises:
            ValueError: the environment has another task, or none, there.
        """
        while len(self._seen) <= index and (task := next(self._tasks, None)) is not None:
            self._seen.append(task)
        found = self._seen[index] if 0 <= index < len(self._seen) else None
        if found is None or found.key != key:
            raise ValueError(
                f"its task {index} is not the row's: give `verifiers.rows` and `verifiers.Environment` the same `env` "
                "and `args`, of an environment that makes the same tasks each time"
            )
        return found

    async def play(self, task: Any, name: str, seed: int) -> Any:
        """Run an episode whose agent asks the model `name`; its random numbers begin from the seed.

        Returns:
            an `Episode` of verifiers, also where it failed.
        """
        import verifiers.v1 as vf

        client = vf.EvalClientConfig(
            base_url=self.policy.url, api_key_var="RLPOST_HAS_NO_KEY", headers={KEY: self.policy.key}
        )
        random.seed(seed)
        return await self._environment.run_episode(task, vf.ModelContext(model=name, client=client))

    def traces(self, episode: Any) -> Sequence[Any] | None:
        """What the model's agent did in an episode; None where the episode failed."""
        if not episode.ok:
            return None
        config = self._environment.config
        return [trace for trace in episode.traces if getattr(config, trace.agent.name).client is None]


_hosts: dict[tuple[int, int], asyncio.Task[Host]] = {}
"""By the ids of the event loop and the environment."""


async def host(env: str, args: Mapping[str, Any]) -> Host:
    """The environment, up in this event loop until the process ends.

    Raises:
        ValueError: as `configured`.
    """
    environment = configured(env, args)
    key = (id(asyncio.get_running_loop()), id(environment))
    if key not in _hosts or (_hosts[key].done() and _hosts[key].exception() is not None):
        _hosts[key] = asyncio.ensure_future(_up(environment))
    return await asyncio.shield(_hosts[key])


async def _up(environment: Any) -> Host:
    policy = Policy()
    for key in ("NO_PROXY", "no_proxy"):
        os.environ[key] = ",".join(filter(None, [os.environ.get(key, ""), "127.0.0.1"]))
    await policy.start()
    serving = environment.serving()
    await serving.__aenter__()
    return Host(environment, policy, serving)


def _chat() -> ModuleType:
    """A plugin with a harness that asks for a completion and ends: the conversation is the environment's."""
    import aiohttp
    import verifiers.v1 as vf
    from verifiers.v1.dialects.chat import message_to_wire

    class Chat(vf.Harness[vf.HarnessConfig]):  # type: ignore[misc]
        APPENDS_SYSTEM_PROMPT = True
        SUPPORTS_RESUME = True
        EXECUTES_CODE = False
        NEEDS_CONTAINER = False

        async def launch(
            self,
            ctx: Any,
            trace: Any,  # noqa: ARG002
            runtime: Any,  # noqa: ARG002
            endpoint: str,
            secret: str,
            mcp_urls: Any,  # noqa: ARG002
            data: Any,
        ) -> Any:
            system, prompt = self.resolve_prompt(data)
            messages = [] if system is None else [{"role": "system", "content": system}]
            if isinstance(prompt, str):
                messages.append({"role": "user", "content": prompt})
            else:
                messages += [message_to_wire(message) for message in prompt or ()]
            asked = {"model": ctx.model, "messages": messages}
            headers = {"Authorization": f"Bearer {secret}"}
            timeout = aiohttp.ClientTimeout(total=None)
            async with (
                aiohttp.ClientSession(timeout=timeout, headers=headers) as session,
                session.post(f"{endpoint}/chat/completions", json=asked) as response,
            ):
                if response.status != 200:
                    raise vf.HarnessError(f"no turn: {one_line(await response.text())}")
            return vf.ProgramResult(exit_code=0, stdout="", stderr="")

    plugin = ModuleType(CHAT)
    vars(plugin).update(Chat=Chat, __all__=["Chat"])
    return plugin


def one_line(text: str) -> str:
    """A message of any length as one line."""
    joined = " ".join(text.split())
    return joined if len(joined) <= 200 else f"{joined[:199]}…"
