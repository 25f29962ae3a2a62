"""One episode: what is asked of the engine, turn by turn, what becomes of replies, and where it ends."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from rlpost.data.codec import Codec
from rlpost.engine.params import Sampling
from rlpost.engine.seeds import prompt_seeds
from rlpost.types import FAILED, Completion, Group, Request


@dataclass(frozen=True)
class Limits:
    """What holds for all episodes of a call."""

    sampling: Sampling
    """`max_new_tokens` of a whole episode, replies included."""
    turns: int
    """Most turns of the model."""
    max_positions: int
    """Of the model."""


@dataclass(eq=False)
class Episode:
    """One completion as it grows."""

    group: Group
    """Its prompt, without completions."""
    prompt_seed: int
    """The same for all episodes of a prompt."""
    seed: int
    limits: Limits
    ids: list[int] = field(default_factory=list)
    action: list[bool] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    turns: list[str] = field(default_factory=list)
    """The model's, as text."""
    turn_actions: list[int] = field(default_factory=list)
    """Actions of each of them."""
    turn_rewards: dict[int, float] = field(default_factory=dict)
    """What the environment gave turns, by their numbers."""
    messages: list[dict[str, Any]] = field(default_factory=list)
    """What was said after the prompt."""
    finish: str = ""
    """Empty until it has ended."""
    weights_version: int | None = None
    life: int | None = None
    """Of the process that replied last, and may keep something of it; None before the first reply."""

    @property
    def next_seed(self) -> int:
        """The seed of what comes next: the environment's reply to the last turn, and the turn after it."""
        return prompt_seeds(self.seed, len(self.turns), 1)[0]

    def request(self) -> Request:
        """The engine's request for the model's next turn, which may use all remaining tokens."""
        prompt = np.concatenate([self.group.prompt, np.array(self.ids, np.int32)])
        sampling = self.limits.sampling
        room = min(sampling.max_new_tokens - len(self.ids), self.limits.max_positions - len(prompt))
        more = len(self.turns) + 1 < self.limits.turns
        return Request(prompt, 1, sampling, self.next_seed, limit=room, keep=more)

    def add_turn(self, turn: Completion) -> None:
        """Append the model's turn; one that was cut off ends the episode."""
        self.weights_version = turn.weights_version
        self.ids += turn.ids.tolist()
        self.action += turn.action.tolist()
        self.logprobs += turn.logprobs.tolist()
        self.turns.append(turn.text)
        self.turn_actions.append(turn.actions)
        self.messages.append({"role": "assistant", "content": turn.text})
        if turn.finish == "length":
            self.finish = turn.finish

    @property
    def at_limit(self) -> bool:
        """Whether the model has had its last turn."""
        return len(self.turns) == self.limits.turns

    def arguments(self) -> dict[str, Any]:
        """What a function of an environment may be told of the model's last turn."""
        return {"text": self.turns[-1], "turns": list(self.turns), "example": self.group.example}

    def note(self, reward: float | None, info: Mapping[str, Any]) -> None:
        """Note what the environment gave the model's last turn, beside what it had before, and said about it."""
        turn = next(m for m in reversed(self.messages) if m["role"] == "assistant")
        if reward is not None:
            number = len(self.turns) - 1
            self.turn_rewards[number] = turn["reward"] = self.turn_rewards.get(number, 0.0) + reward
        if info:
            turn["info"] = {**turn.get("info", {}), **info}

    def add_reply(self, reply: str | None, codec: Codec) -> None:
        """Append the environment's reply, as tokens that are no actions; None, or no room for it, ends the episode."""
        if reply is None:
            self.finish = "stop"
            return
        self.messages.append({"role": "environment", "content": reply})
        self.add_ids(codec.ids(reply, "the environment's reply"))

    def add_ids(self, ids: Sequence[int]) -> None:
        """Append tokens that are no actions, or end the episode if they leave no room for another turn."""
        used = len(self.ids) + len(ids)
        # The next turn needs room for at least one token.
        if used >= self.limits.sampling.max_new_tokens or len(self.group.prompt) + used >= self.limits.max_positions:
            self.finish = "length"
            return
        self.ids += ids
        self.action += [False] * len(ids)

    def fail(self) -> None:
        """End it unscored, unless it has ended."""
        self.finish = self.finish or FAILED

    def completion(self) -> Completion:
        """The whole episode as a completion; its text, which rewards read, is the last turn's."""
        text = self.turns[-1] if self.turns else ""
        given = [self.turn_rewards.get(number, 0.0) for number in range(len(self.turns))] if self.turn_rewards else ()
        return Completion(
            self.ids,
            self.action,
            text,
            self.finish,
            self.logprobs,
            steps=self.turn_actions,
            weights_version=self.weights_version,
            step_rewards=given,
            messages=self.messages,
        )
