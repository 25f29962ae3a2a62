"""The command that starts a server of vLLM as a run needs it: run by it, or said to whoever starts the server."""

from __future__ import annotations

import json
import os
import shlex
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from rlpost import ranks
from rlpost.engine.params import EngineChoice
from rlpost.engine.vllm_requests import LOGPROBS_MODE
from rlpost.engine.vllm_weights import lora_rank, positions
from rlpost.errors import RecipeError
from rlpost.policy.policy import Policy


@dataclass(frozen=True)
class Serving:
    """How a policy is to be served."""

    args: Mapping[str, Any]
    """What every server of it must be started with, by the names of vLLM's `EngineArgs`."""
    environment: Mapping[str, str]
    """Variables, likewise."""
    base: str
    """The folder or the hub's name of its model without adapters."""

    @classmethod
    def of(cls, policy: Policy, *, adapter: bool) -> Serving:
        """For a policy that hands over its adapter, or whole weights."""
        half = policy.in_bfloat16 or policy.causal_lm.dtype is torch.bfloat16
        args: dict[str, Any] = {
            "enable_scale_out": True,  # the route that takes and gives tokens
            "logprobs_mode": LOGPROBS_MODE,
            "dtype": "bfloat16" if half else "float32",
        }
        if policy.switch is not None:
            args["max_model_len"] = positions(policy)
        if not adapter:
            return cls(args, {"VLLM_SERVER_DEV_MODE": "1"}, policy.base)
        args |= {"enable_lora": True, "max_lora_rank": lora_rank(policy)}
        if policy.revision:
            args["revision"] = policy.revision
        return cls(args, {"VLLM_ALLOW_RUNTIME_LORA_UPDATING": "True"}, policy.base)

    @property
    def command(self) -> str:
        """A line for the shell."""
        variables = [f"{name}={value}" for name, value in self.environment.items()]
        return " ".join([*variables, shlex.join(["vllm", "serve", self.base, *as_flags(self.args)])])

    def started(self, chosen: EngineChoice, device: torch.device) -> Serving:
        """The same for a server that the run starts.

        Args:
            chosen: the recipe's engine.
            device: of the policy, near which the server runs.

        Raises:
            RecipeError: it names a GPU that is not there.
        """
        own: dict[str, Any] = {
            "served_model_name": "policy",  # whatever folder it is started with
            "max_model_len": -1,  # as many as the model has, and the cache has room for
            "enable_prefix_caching": chosen.prefix_caching,
            "disable_uvicorn_access_log": True,
        }
        environment = {"VLLM_NO_USAGE_STATS": "1"}
        if device.type == "cuda":
            visible, count = os.environ.get("CUDA_VISIBLE_DEVICES"), torch.cuda.device_count()
            names = gpus(chosen.devices, visible, count, ranks.on_this_machine())
            environment["CUDA_VISIBLE_DEVICES"] = ",".join(names)
            own |= {"gpu_memory_utilization": chosen.memory_share, "tensor_parallel_size": len(names)}
        else:
            own |= {"enforce_eager": True, "kv_cache_memory_bytes": int(chosen.cache_gib * 2**30)}
        return Serving({**own, **self.args, **chosen.args}, {**self.environment, **environment}, self.base)


def must_have_program(chosen: EngineChoice, where: str) -> None:
    """Check that a server can be started, if one is to be.

    Raises:
        RecipeError: there is no such command.
    """
    if not chosen.urls and shutil.which(chosen.program) is None:
        raise RecipeError(
            f"{where}.program: there is no command {chosen.program} - install vllm, best in an environment of its own, "
            "and name its command (/path/to/bin/vllm); or name running servers in urls"
        )


def as_flags(args: Mapping[str, Any]) -> tuple[str, ...]:
    """Arguments of `vllm serve`, from the names that vLLM's `EngineArgs` has for them."""
    flags: list[str] = []
    for key, value in args.items():
        name = key.replace("_", "-")
        if isinstance(value, bool):
            flags.append(f"--{name}" if value else f"--no-{name}")
        elif isinstance(value, Mapping):
            flags += [f"--{name}", json.dumps(value)]
        elif isinstance(value, Sequence) and not isinstance(value, str):
            flags += [f"--{name}", *map(str, value)]
        elif value is not None:
            flags += [f"--{name}", str(value)]
    return tuple(flags)


def gpus(chosen: Sequence[int], visible: str | None, count: int, own: int) -> list[str]:
    """The GPUs of a server, as CUDA_VISIBLE_DEVICES names them.

    Args:
        chosen: their numbers, if the recipe says them.
        visible: CUDA_VISIBLE_DEVICES of the run.
        count: GPUs that the run sees.
        own: how many of them, the first ones, have a process of the run.

    Raises:
        RecipeError: the recipe names one that is not there.
    """
    names = [name.strip() for name in visible.split(",")] if visible else [str(n) for n in range(count)]
    if strange := [n for n in chosen if not 0 <= n < count]:
        raise RecipeError(f"rollouts.devices: {strange[0]}, but the run sees {count} GPUs, from 0 to {count - 1}")
    return [names[n] for n in chosen or range(own, count) or range(count)]
