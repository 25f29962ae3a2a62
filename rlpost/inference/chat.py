"""A conversation with a model, its answers given piece by piece: `rlpost chat`."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
from torch import Tensor

from rlpost.data.codec import make_codec
from rlpost.data.formats import Format, encode
from rlpost.data.visible import visible
from rlpost.engine.collect import collect
from rlpost.engine.door import frozen_engine
from rlpost.engine.params import Sampling
from rlpost.engine.stopping import StopStrings
from rlpost.errors import DataError, EngineError, ModelError
from rlpost.inference.checkpoint import frozen_policy, located
from rlpost.inference.sample import within
from rlpost.policy.policy import Policy
from rlpost.types import Completion, Tokens

Write = Callable[[str], None]
_HALF = "\ufffd"
"""What the bytes of an unfinished character are decoded as."""


class Conversation:
    """Messages and answers; without a chat template, each message is completed by itself."""

    def __init__(self, policy: Policy, sampling: Sampling, system: str | None = None, seed: int = 0) -> None:
        """Begin.

        Args:
            policy: answers.
            sampling: how; an answer ends at every token that ended one in training, too.
            system: the system message.
            seed: of the first answer; later ones, and those asked for again, count up from it.

        Raises:
            ModelError: a system message for a model without a chat template.
        """
        self._codec = make_codec(policy.tokenizer)
        self.has_template = self._codec.template is not None
        if system is not None and not self.has_template:
            raise ModelError("--system: the model has no chat template to put it in; leave it out")
        self._policy = policy
        self._sampling = sampling
        self._seed = seed
        self._stream = _Stream(policy.tokenizer, policy.end_ids, sampling.stop)
        self._engine = frozen_engine(policy, guide=self._stream)
        self._system = [] if system is None else [{"role": "system", "content": system}]
        self.turns: list[tuple[str, str]] = []
        """(message, answer) of each turn."""

    def say(self, message: str, write: Write) -> str:
        """The answer to a message; `write` gets it piece by piece.

        Raises:
            DataError: the chat template refuses the message, or the answer before it is empty.
            EngineError: the conversation does not fit into the model.
        """
        answer = self._answer(self.turns, message, write)
        self.turns.append((message, answer))
        return answer

    def again(self, write: Write) -> str:
        """Another answer to the last message, in place of the one it had; needs a turn."""
        *before, (message, _) = self.turns
        answer = self._answer(before, message, write)
        self.turns[-1] = (message, answer)
        return answer

    def undo(self) -> str:
        """Take back the last turn; returns its message. Needs a turn."""
        return self.turns.pop()[0]

    def close(self) -> None:
        """Free what the engine holds."""
        self._engine.close()

    def _answer(self, before: Sequence[tuple[str, str]], message: str, write: Write) -> str:
        prompt: Any = message
        if self.has_template:
            if before and not before[-1][1].strip():
                raise DataError("the last answer is empty, so nothing can be said to it; /again or /undo")
            prompt = [*self._system]
            for said, answered in before:
                prompt += [{"role": "user", "content": said}, {"role": "assistant", "content": answered}]
            prompt.append({"role": "user", "content": message})
        group = encode({"prompt": prompt}, Format.prompt, self._codec, "the message")
        room = self._policy.max_positions - len(group.prompt)
        if room < 1:
            raise EngineError(
                f"the conversation has {len(group.prompt)} tokens, and the model {self._policy.max_positions} "
                "positions: no room for an answer; /undo or /quit and begin anew"
            )
        self._stream.write = write
        seed, self._seed = self._seed, self._seed + 1
        (found,) = collect(self._engine, [group], 1, within(self._sampling, room), seed=seed, keep=self.has_template)
        return self._stream.finish(found.completions[0])


def open_conversation(checkpoint: str, sampling: Sampling, system: str | None, seed: int) -> Conversation:
    """A conversation with a checkpoint, or a model by its folder or hub name."""
    return Conversation(frozen_policy(located(checkpoint)), sampling, system, seed)


class _Stream:
    """Hears of every token that is drawn, and passes on the text as far as it is certain.

    It is a guide that adds nothing to the log-probabilities.
    """

    def __init__(self, tokenizer: Any, ends: Collection[int], stop: Sequence[str]) -> None:
        self._tokenizer = tokenizer
        self._ends = ends
        self._stops = StopStrings(tokenizer, stop)
        self.write: Write = lambda _: None
        self._ids: list[int] = []
        self._written = ""

    def begin(self, prompts: Sequence[Tokens], prompt_of_row: Sequence[int], limits: Sequence[int]) -> _Stream:  # noqa: ARG002
        """Of one row."""
        self._ids, self._written = [], ""
        return self

    def weigh(self, logits_BV: Tensor, going_B: Tensor) -> Tensor:  # noqa: ARG002
        """Nothing."""
        return torch.zeros_like(logits_BV)

    def append(self, ids_B: Tensor) -> None:
        """Pass on what the token completes."""
        self._ids.append(int(ids_B[0]))
        text = visible(self._ids, self._tokenizer, self._ends).rstrip(_HALF)
        self._pass_on(text[: len(text) - self._withheld(text)])

    def keep(self, rows: Tensor) -> None:
        """Of one row, which stays."""

    def finish(self, completion: Completion) -> str:
        """Pass on the rest of the answer; returns it whole, without half a character that the limit cut off."""
        text = completion.text.rstrip(_HALF) if completion.finish == "length" else completion.text
        self._pass_on(text)
        return text

    def _pass_on(self, text: str) -> None:
        if text.startswith(self._written) and text != self._written:
            self.write(text[len(self._written) :])
            self._written = text

    def _withheld(self, text: str) -> int:
        """How many last characters may be the beginning of a stop string."""
        longest = max(map(len, self._stops.stop), default=0)
        ends = (
            n for n in range(min(longest, len(text)), 0, -1) if any(s.startswith(text[-n:]) for s in self._stops.stop)
        )
        return next(ends, 0)
