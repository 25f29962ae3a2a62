"""The built-in engine: the policy's own model, decoding in its own process with its live weights.

Prompts are computed once, rows that have ended leave the batch, and tokens are drawn where the model is.

Axes: B rows (live completions), R rows of a chunk, T tokens a row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rlpost.engine.api import Guide, Steering
from rlpost.engine.params import Sampling
from rlpost.engine.sampling import choose, is_greedy
from rlpost.engine.seeds import uniforms
from rlpost.engine.stopping import StopStrings, finished
from rlpost.errors import EngineError
from rlpost.objectives.rows import widen
from rlpost.policy.decoders import Decoder, decoding_attention, make_decoder
from rlpost.policy.policy import Policy
from rlpost.types import Completion, Tokens

ROWS_AT_ONCE = 512
LEAVE_AT = 0.75
"""Rows that have ended leave once at most this share of the batch still runs."""
LOOK_EVERY = 8
"""On an accelerator, steps between looks at which rows have ended: each look waits for the device."""


@dataclass(frozen=True)
class Row:
    """One completion to sample: which prompt, and which of its completions."""

    prompt: int
    index: int


class BuiltinEngine:
    """Samples from a policy in place."""

    def __init__(self, policy: Policy, rows_at_once: int = ROWS_AT_ONCE, guide: Guide | None = None) -> None:
        """Sample from `policy`; at most `rows_at_once` completions run together, with the same result.

        With a `guide`, tokens are drawn from the guided distribution, and their log-probabilities are under it.
        """
        assert rows_at_once >= 1
        self.policy = policy
        self.guide = guide
        self.rows_at_once = rows_at_once

    def sync(self, policy: Policy) -> None:
        """Sample from `policy`; its weights are read as they are, so nothing is copied."""
        self.policy = policy

    def generate(
        self,
        prompts: Sequence[Tokens],
        n: int,
        sampling: Sampling,
        streams: Sequence[int],
        greedy: bool = False,
    ) -> list[tuple[Completion, ...]]:
        """`n` completions of each prompt; see `Engine.generate`."""
        assert n >= 1
        assert len(streams) == len(prompts)
        if not prompts:
            return []
        _must_fit(self.policy, prompts, sampling)
        # Prompts of similar length run together: less padding in the cache.
        order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
        rows = [Row(i, g) for i in order for g in range(n)]
        done: dict[Row, Completion] = {}
        was_training = self.policy.training
        self.policy.eval()
        try:
            with torch.no_grad(), self.policy.precision(), decoding_attention(self.policy):
                for start in range(0, len(rows), self.rows_at_once):
                    chunk = rows[start : start + self.rows_at_once]
                    done |= self._sample(chunk, prompts, sampling, streams, greedy)
        finally:
            self.policy.train(was_training)
        return [tuple(done[Row(i, g)] for g in range(n)) for i in range(len(prompts))]

    def _sample(
        self,
        rows: Sequence[Row],
        prompts: Sequence[Tokens],
        sampling: Sampling,
        streams: Sequence[int],
        greedy: bool,
    ) -> dict[Row, Completion]:
        """The completions of one chunk."""
        policy = self.policy
        which = list(dict.fromkeys(r.prompt for r in rows))
        number = {prompt: at for at, prompt in enumerate(which)}
        own, prompt_of_row = [prompts[i] for i in which], [number[r.prompt] for r in rows]
        decoder = make_decoder(policy, own, prompt_of_row, sampling.max_new_tokens)
        limits = [sampling.max_new_tokens] * len(rows)
        steering = self.guide.begin(own, prompt_of_row, limits) if self.guide is not None else None
        noise = uniforms([streams[r.prompt] for r in rows], [r.index for r in rows], sampling.max_new_tokens)
        stops = StopStrings(policy.tokenizer, sampling.stop)
        uniform_RT = torch.from_numpy(noise).to(policy.device)
        drawn = _decode(decoder, uniform_RT, sampling, greedy, policy, stops, steering)
        ids_RT, logp_RT, ended_RT = (x.cpu().numpy() for x in drawn)
        if np.isnan(logp_RT).any():
            raise EngineError(
                "the model's logits are not numbers (nan), so nothing can be sampled; "
                "lower the learning_rate, or set model.precision=float32"
            )
        stopped: NDArray[np.bool_] = np.asarray(ended_RT.any(1))
        lengths = np.where(stopped, ended_RT.argmax(1) + 1, ids_RT.shape[1])
        return {
            row: finished(ids_RT[at, :k], logp_RT[at, :k], bool(stopped[at]), policy.end_ids, stops)
            for at, (row, k) in enumerate(zip(rows, lengths, strict=True))
        }


def _decode(
    decoder: Decoder,
    noise_RT: Tensor,
    sampling: Sampling,
    greedy: bool,
    policy: Policy,
    stops: StopStrings,
    steering: Steering | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """[R, T] token ids, their log-probabilities, and whether the row had ended by then."""
    shape, device = noise_RT.shape, noise_RT.device
    ids_RT = torch.zeros(shape, dtype=torch.long, device=device)
    ended_RT = torch.zeros(shape, dtype=torch.bool, device=device)
    ends = torch.tensor(list(policy.end_ids), dtype=torch.long, device=device)
    live = torch.arange(shape[0], device=device)
    ended = torch.zeros(shape[0], dtype=torch.bool, device=device)
    look_every = 1 if device.type == "cpu" else LOOK_EVERY
    # Temperature divides the sum afterwards; weights are of the distribution that is sampled, which it has shaped.
    scale = 1.0 if is_greedy(sampling, greedy) else sampling.temperature
    logits = decoder.start()
    logp_RT = torch.zeros(shape, dtype=widen(logits).dtype, device=device)
    for t in range(shape[1]):
        logits = policy.known.cut(logits)
        if steering is not None:
            weight = steering.weigh(logits, ~ended)
            logits = widen(logits) + scale * weight.to(widen(logits).dtype)
        token, logp = choose(logits, noise_RT[live, t], sampling, greedy)
        ids_RT[live, t], logp_RT[live, t] = token, logp.to(logp_RT.dtype)
        ended = ended | (token[:, None] == ends).any(1)
        if stops:
            recent = ids_RT[live, max(0, t + 1 - stops.tail) : t + 1].tolist()
            ended = ended | torch.tensor([stops.hit(tail) for tail in recent], device=device)
        ended_RT[live, t] = ended
        if t + 1 == shape[1]:
            break
        if (t + 1) % look_every == 0:
            going = (~ended).nonzero()[:, 0]
            if not len(going):
                break
            if len(going) <= LEAVE_AT * len(live):
                decoder.keep(going)
                live, token, ended = live[going], token[going], ended[going]
                if steering is not None:
                    steering.keep(going)
        if steering is not None:
            steering.append(token)
        logits = decoder.step(token)
    return ids_RT, logp_RT, ended_RT


def _must_fit(policy: Policy, prompts: Sequence[Tokens], sampling: Sampling) -> None:
    longest = max(len(p) for p in prompts)
    if longest + sampling.max_new_tokens > (limit := policy.longest):
        raise EngineError(
            f"sampling.max_new_tokens={sampling.max_new_tokens}: with a prompt of {longest} tokens that is beyond "
            f"the model's {limit} positions; set it to at most {max(0, limit - longest)} or leave out longer prompts"
        )
