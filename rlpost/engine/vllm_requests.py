"""Requests in vLLM's words, and its answers in rlpost's; in the same process or by a server.

vLLM draws a row's tokens from a generator of the row's own seed. Its log-probabilities are to be those of the
distribution a token was drawn from (`LOGPROBS_MODE`), as rlpost's are.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from rlpost.engine.answers import NO_NUMBERS, fault, made_whole, shown
from rlpost.engine.seeds import row_seed
from rlpost.engine.stopping import StopStrings
from rlpost.errors import EngineError
from rlpost.policy.policy import Policy
from rlpost.types import Completion, Request

LOGPROBS_MODE = "processed_logprobs"
"""For vLLM's `logprobs_mode`: at the sampling temperature, renormalised over what the filters kept."""
NEVER = -100.0
"""What is added to the logits of ids without a token, at most as far as a server allows: at temperature 2
they still have e⁻⁵⁰ of the likeliest token's probability."""
SEED_BITS = 63
"""A server takes no larger seeds."""
STOP, LENGTH = "stop", "length"
"""vLLM's reasons for an end that is none of an error."""


def sampling_params(
    request: Request, number: int, end_ids: Sequence[int], unused: Sequence[int] = ()
) -> dict[str, Any]:
    """The fields of vLLM's SamplingParams for one completion.

    Args:
        request: what is asked for; how many completions it wants is not looked at.
        number: of the completion among the prompt's. With the request's seed it decides the seed of its tokens.
        end_ids: tokens that end it, and no others do.
        unused: ids for which the model has a row and the tokenizer no token; they are not drawn.

    Raises:
        EngineError: vLLM would sample something else.
    """
    sampling = request.sampling
    for problem in sampling.unlike_vllm("sampling"):
        raise EngineError(problem)
    stop = [s for s in sampling.stop if s]
    greedy = sampling.temperature == 0
    found: dict[str, Any] = {
        "n": 1,
        "seed": row_seed(request.seed, number) >> 64 - SEED_BITS,
        "temperature": float(sampling.temperature),
        "top_k": 0 if greedy else max(0, sampling.top_k),
        "top_p": 1.0 if greedy else sampling.top_p,
        "min_p": 0.0 if greedy else sampling.min_p,
        "max_tokens": request.limit,
        "stop_token_ids": list(end_ids),
        "ignore_eos": True,  # those of its own generation_config.json
        "stop": stop,
        "skip_special_tokens": False,
        "logprobs": 0,  # the drawn token's alone
    }
    if unused:
        found["logit_bias"] = dict.fromkeys(unused, NEVER)
    return found


def completion_of(
    ids: Sequence[int],
    logprobs: Sequence[float | None],
    finish_reason: str | None,
    request: Request,
    policy: Policy,
    version: int | None,
    where: str,
) -> Completion:
    """One completion from what vLLM gave for it.

    Stop strings are looked for as the local engine does: in the decoded end of the completion, token by token. What
    follows the first is cut off: vLLM, which decodes the prompt's end with it, may have seen none.

    Args:
        ids: its tokens, through the one that ended it.
        logprobs: their log-probabilities.
        finish_reason: as vLLM says it.
        request: what was asked for.
        policy: what samples.
        version: of its weights.
        where: the engine, for the message.

    Raises:
        EngineError: the answer is not one to the request.
    """

    def error(what: str) -> EngineError:
        return EngineError(f"{where}: {shown(request, policy)}: {what}")

    if len(logprobs) != len(ids):
        raise error(f"vLLM gave {len(logprobs)} log-probabilities for {len(ids)} tokens")
    if any(x is None or x != x for x in logprobs):
        raise error(NO_NUMBERS)
    stops = StopStrings(policy.tokenizer, request.sampling.stop)
    end = _first_hit(ids, stops)
    ended = finish_reason if end is None else STOP
    ids, logprobs = ids[:end], logprobs[:end]
    found = Completion(
        ids, np.ones(len(ids), np.bool_), finish=ended or "none", logprobs=np.array(logprobs, np.float64)
    )
    if wrong := fault(found, request, policy, version):
        raise error(f"vLLM gave a completion {wrong}")
    if ended == LENGTH and len(ids) < request.limit and ids[-1] not in policy.end_ids:
        raise error(
            f"vLLM cut its completion at {len(ids)} of {request.limit} tokens; raise max_model_len in {where}.args, or "
            "lower sampling.max_new_tokens"
        )
    if ended == STOP and end is None and ids[-1] not in policy.end_ids:
        tail = policy.tokenizer.decode(list(ids[-stops.tail :]), skip_special_tokens=False)
        raise error(f"vLLM ended its completion with {tail[-20:]!r}, which has no stop string; use engine: local")
    return made_whole(found, stops, policy, version)


def _first_hit(ids: Sequence[int], stops: StopStrings) -> int | None:
    """The number of tokens through the one that completes the first stop string; None without one."""
    if not stops:
        return None
    return next((n for n in range(1, len(ids) + 1) if stops.hit(ids[max(0, n - stops.tail) : n])), None)
