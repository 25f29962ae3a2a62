"""The engine `vllm`: vLLM's continuous batching and paged cache, in the trainer's process.

Whole weights are handed over as tensors, through no file; an adapter through a folder of its own for each version. A
completion's tokens are drawn with numbers that its request's seed and its own number decide. Which others run beside it
may change its logits in their last bits, since sums of another shape are summed in another order, and so, rarely, a
token; the same requests in the same order give the same completions.
"""

from __future__ import annotations

import asyncio
import copy
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np

from rlpost import ranks
from rlpost.engine.answers import must_fit
from rlpost.engine.params import EngineChoice, Sampling
from rlpost.engine.sampling import greedy
from rlpost.engine.vllm_process import end, must_be_installed, start, told, unnoticed, untouched
from rlpost.engine.vllm_requests import completion_of, sampling_params
from rlpost.engine.vllm_weights import (
    handed_over,
    lora_rank,
    must_be_servable,
    named_weights,
    positions,
    write_weights,
)
from rlpost.errors import EngineError
from rlpost.policy.check import probe_groups
from rlpost.policy.memory import free_memory
from rlpost.policy.policy import Policy
from rlpost.policy.score import logprobs
from rlpost.types import Completion, Group, Request

PROBED = 8
"""Tokens that are compared with the policy's before the first request."""
WHOLE_GAP, HALF_GAP = 0.01, 0.25
"""Largest mean difference, in nats a token, in 32 and in 16 bits."""
OTHERWISE = "use engine: local, which runs what trains"


class VllmEngine:
    """Samples by vLLM from weights that the policy hands over."""

    def __init__(self, policy: Policy, chosen: EngineChoice, where: str = "rollouts") -> None:
        """Start vLLM for `policy`, without its weights yet.

        Args:
            policy: to sample from.
            chosen: the recipe's choice.
            where: the key path of its section.

        Raises:
            ModelError: vLLM is not installed, or cannot be given what the policy is.
            EngineError: vLLM does not start with this model.
        """
        must_be_installed(where)
        must_be_servable(policy, chosen.merge_adapter, where)
        self._where, self._merges = where, chosen.merge_adapter
        self._policy, self._device = policy, policy.device
        self._version: int | None = None
        self._proven = False
        self._numbers = count(1)
        self._waiting: dict[str, _Asked] = {}
        self._driver: asyncio.Task[None] | None = None
        self._more = asyncio.Event()
        self._adapter: Any = None
        """vLLM's request for the current adapter."""
        self._sleeps = chosen.sleep and self._device.type != "cpu"
        self._asleep = False
        self._own = tempfile.TemporaryDirectory(prefix="rlpost-vllm-")
        self._folder = Path(self._own.name)
        self._adapts = policy.has_adapter and not chosen.merge_adapter
        self._memory = "cache_gib" if self._device.type == "cpu" else "memory_share"
        with told(where, "does not start", f"if it is about memory, change {where}.{self._memory}; else {OTHERWISE}"):
            self._llm = start(self._model(), chosen, where, self._device, **self._settings())
            self._engine = self._llm.llm_engine
            self._llm.init_weight_transfer_engine({"init_info": {}})

    def _model(self) -> str:
        """The folder to start with: that of an adapter's base, or a configuration whose weights are handed over."""
        policy = self._policy
        policy.tokenizer.save_pretrained(self._folder)  # for stop strings
        config = copy.deepcopy(policy.causal_lm.config)
        config.architectures = [type(policy.causal_lm).__name__]
        config.save_pretrained(self._folder)
        return policy.base if self._adapts else str(self._folder)

    def _settings(self) -> dict[str, Any]:
        policy = self._policy
        found: dict[str, Any] = {
            "tokenizer": str(self._folder),
            "dtype": "bfloat16" if policy.in_bfloat16 else "float32",
            # Otherwise as many positions as the model has, and the cache has room for.
            "max_model_len": -1 if policy.switch is None else positions(policy),
        }
        if not self._adapts:
            return {**found, "load_format": "dummy"}
        return {**found, "revision": policy.revision, "enable_lora": True, "max_lora_rank": lora_rank(policy)}

    def update_weights(self, policy: Policy, version: int) -> None:
        """Sample from the weights that `policy` has now; see `Engine.update_weights`."""
        assert not self._waiting, "weights change between requests"
        self._policy, self._version = policy, None
        with self._told(f"cannot take weights version {version}"), ranks.losses_told(), untouched():
            self._wake()
            if self._adapts:
                self._take_adapter(version)
                self._llm.update_weight_version(str(version))
            else:
                self._llm.start_weight_update()
                weights = named_weights(handed_over(policy, self._merges))
                self._llm.update_weights({"update_info": {"named": weights}})
                self._llm.finish_weight_update(weight_version=str(version))
            if not self._llm.reset_prefix_cache():
                raise EngineError(f"{self._where}.engine=vllm: its cache of earlier weights is in use")
        self._version = version
        if not self._proven:
            self._prove()

    def _prove(self) -> None:
        """Compare what vLLM says of its tokens with what the policy says: it has the family, and these weights.

        Raises:
            EngineError: they differ.
        """
        (group, *_) = probe_groups(self._policy.vocabulary, self._policy.max_positions)
        sampling = greedy(Sampling(max_new_tokens=1))
        length = max(1, min(PROBED, positions(self._policy) - len(group.prompt)))
        (found,) = self.generate([Request(group.prompt, 1, sampling, 0, length)])
        own = logprobs(self._policy, [Group(group.prompt, found)]).numpy()
        gap = float(np.abs(own - found[0].logprobs).mean())
        if not gap < (HALF_GAP if self._policy.in_bfloat16 else WHOLE_GAP):
            raise EngineError(
                f"{self._where}.engine=vllm: its log-probabilities differ from the policy's by {gap:.2g} nats a token; "
                f"{OTHERWISE}"
            )
        self._proven = True

    def _take_adapter(self, version: int) -> None:
        from vllm.lora.request import LoRARequest

        before, number = self._adapter, next(self._numbers)
        with tempfile.TemporaryDirectory(dir=self._folder) as folder:
            write_weights(self._policy, Path(folder), merge_adapter=False)
            adapter = LoRARequest(f"version-{version}-{number}", number, folder)
            if before is not None:
                self._engine.remove_lora(before.lora_int_id)
            self._engine.add_lora(adapter)
        if (there := self._engine.list_loras()) != {number}:
            raise EngineError(f"{self._where}.engine=vllm: it has the adapters {sorted(there)}, and not {number}")
        self._adapter = adapter

    def generate(self, requests: Sequence[Request]) -> list[tuple[Completion, ...]]:
        """The completions of each request; see `Engine.generate`.

        Raises:
            EngineError: vLLM fails, or a completion is not one to its request.
        """
        if not requests:
            return []
        self._must_be_ready(requests)
        asked = [_Asked(request, self._params(request)) for request in requests]
        try:
            with self._told("failed"):
                for one in asked:
                    self._begin(one)
                while self._waiting:
                    self._step()
        finally:
            for one in asked:
                self._forget(one)
        found = [self._completions(one) for one in asked]
        if not any(r.keep for r in requests):
            self._sleep()
        return found

    async def complete(self, request: Request) -> tuple[Completion, ...]:
        """What `generate` gives for one request, while others wait for theirs; see `FreeEngine`."""
        self._must_be_ready([request])
        asked = _Asked(request, self._params(request), asyncio.get_running_loop().create_future())
        if self._driver is None or self._driver.done():
            self._more = asyncio.Event()
            self._driver = asyncio.create_task(self._drive())
        try:
            with self._told("failed"):
                self._begin(asked)
            self._more.set()
            assert asked.done is not None
            await asked.done
        finally:
            self._forget(asked)
        return self._completions(asked)

    def close(self) -> None:
        """End vLLM, and give its memory back."""
        self._version = None
        self._waiting.clear()
        end(self._llm)
        del self._llm, self._engine
        free_memory(self._device)
        self._own.cleanup()

    def _must_be_ready(self, requests: Sequence[Request]) -> None:
        if self._version is None:
            raise EngineError("the engine has no weights yet: call update_weights first")
        if (there := self._llm.get_weight_version()) != str(self._version):
            raise EngineError(f"{self._where}.engine=vllm: it has weights version {there}, and not {self._version}")
        must_fit(requests, positions(self._policy))
        room = int(self._llm.model_config.max_model_len)
        must_fit(requests, room, f"vLLM's (in {self._where}.{self._memory})")
        self._wake()

    def _params(self, request: Request) -> dict[str, Any]:
        """vLLM's SamplingParams for each of a request's completions, which are requests of their own there."""
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        found = {}
        for number in range(request.first, request.first + request.n):
            fields = sampling_params(request, number, self._policy.end_ids, self._policy.known.unused)
            found[str(next(self._numbers))] = SamplingParams(
                **fields,
                detokenize=bool(fields["stop"]),
                flat_logprobs=True,
                skip_clone=True,
                output_kind=RequestOutputKind.FINAL_ONLY,
            )
        return found

    def _begin(self, asked: _Asked) -> None:
        prompt = {"prompt_token_ids": asked.request.prompt.tolist()}
        for name, params in asked.params.items():
            self._waiting[name] = asked
            self._engine.add_request(name, prompt, params, lora_request=self._adapter)

    def _step(self) -> None:
        """One token for every completion under way that has room."""
        with unnoticed():
            outputs = self._engine.step()
        for output in outputs:
            asked = self._waiting.pop(output.request_id)
            asked.outputs[output.request_id] = output.outputs[0]
            if len(asked.outputs) == len(asked.params) and asked.done is not None and not asked.done.done():
                asked.done.set_result(None)

    async def _drive(self) -> None:
        """Step while anything is under way; other coroutines run between steps. It ends with its event loop."""
        try:
            while True:
                while self._waiting:
                    await asyncio.sleep(0)
                    with self._told("failed"):
                        self._step()
                self._more.clear()
                await self._more.wait()
        except EngineError as error:
            for asked in self._waiting.values():
                if asked.done is not None and not asked.done.done():
                    asked.done.set_exception(error)
        finally:
            self._sleep()

    def _forget(self, asked: _Asked) -> None:
        """Drop what is still under way of a request that nobody waits for any more."""
        left = [name for name in asked.params if self._waiting.pop(name, None) is not None]
        if left:
            self._engine.abort_request(left)

    def _completions(self, asked: _Asked) -> tuple[Completion, ...]:
        return tuple(self._completion(asked.request, asked.outputs[name]) for name in asked.params)

    def _completion(self, request: Request, output: Any) -> Completion:
        ids, drawn = list(output.token_ids), output.logprobs
        # Where a stop string ended it, vLLM may have drawn on.
        if list(drawn.token_ids[: len(ids)]) != ids:
            raise EngineError(f"{self._where}.engine=vllm: it gave log-probabilities of other tokens than it drew")
        logprobs = drawn.logprobs[: len(ids)]
        return completion_of(
            ids, logprobs, output.finish_reason, request, self._policy, self._version, f"{self._where}.engine=vllm"
        )

    def _told(self, what: str) -> Any:
        return told(self._where, what, OTHERWISE)

    def _sleep(self) -> None:
        """Give a GPU's memory back; weights wait in the host's, for more requests to the same version may follow."""
        if self._sleeps and not self._asleep:
            self._llm.sleep(level=1)
            self._asleep = True

    def _wake(self) -> None:
        if self._asleep:
            self._llm.wake_up()
            self._asleep = False


@dataclass(eq=False)
class _Asked:
    """A request that vLLM works on."""

    request: Request
    params: dict[str, Any]
    """By the names that vLLM knows its completions by."""
    done: asyncio.Future[None] | None = None
    """What a coroutine waits for."""
    outputs: dict[str, Any] = field(default_factory=dict)
