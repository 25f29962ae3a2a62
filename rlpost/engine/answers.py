"""What an engine outside of rlpost's own decoding gave: looked at before it is used, and made a completion."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from rlpost.engine.stopping import StopStrings, finished
from rlpost.errors import EngineError
from rlpost.policy.policy import Policy
from rlpost.types import Completion, Request

ROUNDING = 1e-3
"""How far above 0 rounding may put a log-probability."""
FINISHES = ("stop", "length", "")
NO_NUMBERS = (
    "the model's logits are not numbers (nan), so nothing can be sampled; "
    "lower the learning_rate, or set model.precision=float32"
)


def fault(completion: Any, request: Request, policy: Policy, version: int | None) -> str:
    """What is wrong with a completion, and the remedy; empty if nothing is."""
    if not isinstance(completion, Completion):
        return f"as a {type(completion).__name__}; return rlpost.types.Completion"
    ids, logprobs = completion.ids, completion.logprobs
    if not len(ids):
        return "without a token; the token that ends it belongs to it"
    if len(ids) > request.limit:
        return f"of {len(ids)} tokens; its limit is {request.limit}"
    strange = ids[(ids < 0) | (ids >= policy.vocabulary)]
    if len(strange):
        return f"with id {strange[0]}; the vocabulary has ids from 0 to {policy.vocabulary - 1}"
    if np.isin(ids[:-1], policy.end_ids).any():
        return "that goes on after an end token; end it there"
    if not completion.action.all():
        return "with tokens that are not actions; an engine chooses every token"
    if len(logprobs) != len(ids):
        return f"with {len(logprobs)} log-probabilities for {len(ids)} tokens; give one for each"
    if not np.isfinite(logprobs).all() or (logprobs > ROUNDING).any():
        wrong = logprobs[~np.isfinite(logprobs) | (logprobs > ROUNDING)][0]
        return f"with a log-probability of {wrong:g}; give finite ones of at most 0"
    if completion.finish not in FINISHES:
        return f"with finish={completion.finish!r}; say 'stop' or 'length', or nothing"
    if completion.weights_version not in (None, version):
        return f"of weights version {completion.weights_version}; sample with version {version}, or leave it out"
    return ""


def made_whole(completion: Completion, stops: StopStrings, policy: Policy, version: int | None) -> Completion:
    """A completion without fault as the local engine makes it: its text is decoded from its ids."""
    ids, ends = completion.ids, policy.end_ids
    ended = completion.finish == "stop" or int(ids[-1]) in ends
    ended = ended or (bool(stops) and stops.hit(ids[-stops.tail :].tolist()))
    # In the trainer's type: a list of numbers has become float64.
    wide = policy.model.dtype is torch.float64
    logprobs = completion.logprobs.astype(np.float64 if wide else np.float32)
    return finished(ids, logprobs, ended, ends, stops, version)


def shown(request: Request, policy: Policy) -> str:
    """A request's prompt, shortened."""
    text = str(policy.tokenizer.decode(request.prompt.tolist(), skip_special_tokens=False))
    return f"({text if len(text) <= 40 else text[:20] + '…' + text[-19:]!r})"


def must_fit(requests: Sequence[Request], most: int, whose: str = "the model's") -> None:
    """Check that no completion can become longer than there are positions.

    Raises:
        EngineError: the limit of one with its prompt is beyond the `most` positions of `whose`.
    """
    longest = max(requests, key=lambda r: len(r.prompt) + r.limit)
    prompt, limit = len(longest.prompt), longest.limit
    if prompt + limit > most:
        raise EngineError(
            f"sampling.max_new_tokens={limit}: with a prompt of {prompt} tokens that is beyond "
            f"{whose} {most} positions; set it to at most {max(0, most - prompt)} or leave out longer prompts"
        )
