"""Whether a running server of vLLM can serve a run: asked once, when the run meets it."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from httpx2 import Response
from torch import Tensor

from rlpost.engine.params import COOLEST, HOTTEST
from rlpost.engine.seeds import uniforms
from rlpost.engine.vllm_client import Client, Failed, Refused, Unanswered
from rlpost.engine.vllm_requests import NEVER
from rlpost.engine.vllm_weights import positions
from rlpost.errors import EngineError
from rlpost.policy.policy import Policy
from rlpost.types import Completion, Group, Ids

GENERATE = "/inference/v1/generate"
APART = 0.2
"""Nats: mean difference of log-probabilities that only other weights explain, and no precision."""
SAME = 1e-3
"""Nats: less than the likeliest token's log-probability rises from the hottest to the coolest temperature."""
_LIKELIEST = 5
_LENGTHS = (2, 4, 8)
_SEED = 1
_SHOWN, _BEFORE = 80, 4
Error = Callable[[str], EngineError]
"""Makes an error of what is wrong with a server."""


@dataclass(frozen=True)
class Met:
    """What a server says of itself."""

    model: str
    """The name by which it knows its model."""
    positions: int
    """Tokens of the longest row that it takes."""


@dataclass(frozen=True)
class Expected:
    """What the policy says of a few rows, against which a server is proved once it has the policy's weights."""

    rows: tuple[Ids, ...]
    logp_RV: Tensor
    """[R, V] log-probabilities of the token that follows each row."""

    @classmethod
    def of(cls, policy: Policy) -> Expected:
        """Of its weights now; all ranks call this."""
        rows = probes(policy)
        groups = [Group(row[:1], [Completion(row[1:], np.ones(len(row) - 1, np.bool_))]) for row in rows]
        was_training = policy.training
        policy.eval()
        with torch.no_grad():
            logits_RV = policy.next_logits(policy.batch(groups))
        policy.train(was_training)
        return cls(rows, logits_RV.float().log_softmax(-1).cpu())

    def apart(self, row: int, likeliest: Mapping[int, float]) -> list[float]:
        """Differences from what a server says of the likeliest tokens after a row."""
        return [abs(float(self.logp_RV[row, token]) - logp) for token, logp in likeliest.items()]


def probes(policy: Policy) -> tuple[Ids, ...]:
    """A few short rows of tokens from all over the vocabulary."""
    left_out = {*policy.end_ids, *policy.known.unused}
    ids = [i for i in range(policy.vocabulary) if i not in left_out]
    chosen = (uniforms([_SEED], [0], max(_LENGTHS))[0] * len(ids)).astype(int)
    return tuple(np.array([ids[at] for at in chosen[:n]], np.int32) for n in _LENGTHS)


def likeliest(answer: Response) -> dict[int, float]:
    """Token -> log-probability, of the tokens that were likeliest where an answer's first one was drawn.

    Raises:
        Unanswered: the answer has another form.
    """
    try:
        first = answer.json()["choices"][0]["logprobs"]["content"][0]
        return {t["token_id"]: t["logprob"] for t in (*first["top_logprobs"], first)}
    except (ValueError, KeyError, IndexError, TypeError) as error:
        raise Unanswered(f"{GENERATE}: an answer of another form ({error!r})") from error


def question(row: Ids, model: str, unused: Sequence[int], temperature: float = 1.0) -> dict[str, Any]:
    """The request for `likeliest` after a row."""
    sampling: dict[str, Any] = {
        "temperature": temperature,
        "max_tokens": 1,
        "logprobs": _LIKELIEST,
        "seed": 0,
        "ignore_eos": True,
    }
    if unused:
        sampling["logit_bias"] = dict.fromkeys(map(str, unused), NEVER)
    return {"model": model, "token_ids": row.tolist(), "sampling_params": sampling}


async def meet(client: Client, url: str, deadline: float, policy: Policy, *, adapter: bool, command: str) -> Met:
    """Ask a server everything that can be known before it has the policy's weights.

    Args:
        client: to ask with.
        url: of the server.
        deadline: seconds for each answer.
        policy: to sample from.
        adapter: it is to be given adapters, else whole weights.
        command: that starts a server as it should be.

    Raises:
        EngineError: it cannot serve this policy.
        Unanswered: it does not answer.
    """

    def error(what: str) -> EngineError:
        return EngineError(f"{url}: {what}; start it with: {command}")

    met = await first_model(client, url, deadline, error)
    if policy.switch is not None and met.positions > positions(policy):
        raise error("reads short rows with the rotary factors of long ones (--max-model-len)")
    await _must_take_weights(client, url, deadline, adapter, error)
    rows = probes(policy)
    await must_share_tokens(client, url, deadline, policy, met.model, rows[-1], error)
    try:
        said = [
            likeliest(await client.ask("POST", url + GENERATE, deadline, question(rows[-1], met.model, (), t)))
            for t in (COOLEST, HOTTEST)
        ]
    except Refused as wrong:
        raise error(f"does not take tokens ({GENERATE}: {wrong})") from wrong
    if max(said[0].values()) - max(said[1].values()) < SAME:
        raise error("gives log-probabilities that do not depend on the temperature (--logprobs-mode)")
    return met


async def first_model(client: Client, url: str, deadline: float, error: Error) -> Met:
    """The model that a server was started with; `error` is raised if there is none."""
    try:
        models = (await client.ask("GET", f"{url}/v1/models", deadline)).json()["data"]
        about = next(m for m in models if m.get("parent") is None)
        return Met(str(about["id"]), int(about["max_model_len"]))
    except (Refused, ValueError, KeyError, TypeError, StopIteration) as wrong:
        raise error(f"is no server of vLLM with a language model (/v1/models: {wrong!r})") from wrong


async def must_share_tokens(
    client: Client, url: str, deadline: float, policy: Policy, model: str, row: Ids, error: Error
) -> None:
    """Raise an `error` if the row's text is another to the server's `model` than to the policy."""
    try:
        body = {"model": model, "tokens": row.tolist()}
        text = (await client.ask("POST", f"{url}/detokenize", deadline, body)).json()["prompt"]
    except (Refused, ValueError, KeyError) as wrong:
        raise error(f"has another vocabulary, or no tokenizer (/detokenize: {wrong})") from wrong
    own = policy.tokenizer.decode(row.tolist())
    if text != own:
        # From shortly before they differ: the row may be long.
        same = next((at for at, (a, b) in enumerate(zip(text, own, strict=False)) if a != b), min(len(text), len(own)))
        at = max(0, same - _BEFORE)
        theirs, ours = shown(text[at:]), shown(own[at:])
        raise error(f"has another tokenizer: {shown(row.tolist())} is {theirs} to it, and here it is {ours}")


def shown(value: Any) -> str:
    """As JSON, shortened."""
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= _SHOWN else text[: _SHOWN - 1] + "…"


async def _must_take_weights(client: Client, url: str, deadline: float, adapter: bool, error: Error) -> None:
    """Raise an EngineError if a server has no route for what it is to be given."""
    try:
        if adapter:
            await client.ask("POST", f"{url}/v1/load_lora_adapter", deadline, {})
        else:
            await client.ask("GET", f"{url}/weight_info", deadline)
    except Refused as wrong:
        if wrong.status == 404:
            variable = "VLLM_ALLOW_RUNTIME_LORA_UPDATING=True" if adapter else "VLLM_SERVER_DEV_MODE=1"
            raise error(f"takes no {'adapters' if adapter else 'weights'}: it was started without {variable}") from None
    except Failed as wrong:
        raise error(f"takes no adapters ({wrong})") from wrong


async def prove(client: Client, url: str, deadline: float, policy: Policy, model: str, expected: Expected) -> float:
    """Mean difference, in nats, between the policy's log-probabilities and those of a server that has its weights.

    Raises:
        Unanswered: it does not answer. Refused: it does not take the rows.
    """
    found: list[float] = []
    for number, row in enumerate(expected.rows):
        asked = question(row, model, policy.known.unused)
        found += expected.apart(number, likeliest(await client.ask("POST", url + GENERATE, deadline, asked)))
    return sum(found) / len(found)
