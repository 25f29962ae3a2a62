"""`rlpost.load`: a model to generate with."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from contextlib import closing
from typing import TYPE_CHECKING, Any, TypedDict, Unpack, overload

from rlpost.errors import DataError, ModelError, RecipeError
from rlpost.recipe.sampling import sampling_from

if TYPE_CHECKING:
    from rlpost.engine.params import Sampling
    from rlpost.policy.policy import Policy
    from rlpost.types import Completion, Group

Conversation = Sequence[Mapping[str, Any]]
"""Messages, each with `role` and `content`; the model's chat template renders them."""
AT_ONCE = 256
"""Completions generated at a time."""


class Settings(TypedDict, total=False):
    """What `Generator.generate` takes besides prompts, and explains."""

    n: int
    max_new_tokens: int
    temperature: float
    top_k: int
    top_p: float
    min_p: float
    stop: str | Sequence[str]
    greedy: bool
    seed: int


class Generator:
    """A model that generates. `rlpost.load` makes it."""

    def __init__(self, path: str, policy: Policy) -> None:
        """Keep a policy, and the folder or name it came from."""
        self.path = path
        self.policy = policy

    def __repr__(self) -> str:
        return f"Generator({self.path!r})"

    @overload  # a text is also a sequence of texts; it is taken as one
    def generate(self, prompts: str, **settings: Unpack[Settings]) -> list[Completion]: ...  # type: ignore[overload-overlap]
    @overload
    def generate(
        self, prompts: Sequence[str | Conversation], **settings: Unpack[Settings]
    ) -> list[list[Completion]]: ...
    def generate(
        self,
        prompts: str | Sequence[str | Conversation],
        *,
        n: int = 1,
        max_new_tokens: int = 256,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        min_p: float = 0.0,
        stop: str | Sequence[str] = (),
        greedy: bool = False,
        seed: int = 0,
    ) -> list[Completion] | list[list[Completion]]:
        """`n` completions a prompt; the same arguments give the same completions.

        Args:
            prompts: a text, or a list of texts and conversations. With a chat template, a text is the user's message.
            n: completions a prompt.
            max_new_tokens: of a completion, at most; fewer where the model's positions do not allow it.
            temperature: logits are divided by it.
            top_k: keep the k likeliest tokens; 0: all.
            top_p: keep the smallest set of likeliest tokens with this mass.
            min_p: keep tokens at least this many times as likely as the likeliest.
            stop: texts that end a completion and are left out of it.
            greedy: the likeliest token, always.
            seed: of the random draws.

        Returns:
            For a text its completions, for a list a list of them a prompt; each has `text`, `finish` (`stop` or
            `length`), `ids` and `logprobs`.

        Raises:
            RecipeError: a setting is out of range.
            DataError: a prompt is empty or no prompt.
            ModelError: a conversation for a model without a chat template.
            EngineError: generation failed.
        """
        if n < 1:
            raise RecipeError(f"n: expected at least 1, got {n}")
        sampling = sampling_from(
            greedy,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            min_p=min_p,
            stop=[stop] if isinstance(stop, str) else list(stop),
        )
        one = isinstance(prompts, str)
        found = self._collect(self._groups([prompts] if isinstance(prompts, str) else prompts), n, sampling, seed)
        return found[0] if one else found

    def _groups(self, prompts: Sequence[str | Conversation]) -> list[Group]:
        from rlpost.data.codec import make_codec
        from rlpost.data.formats import Format, encode
        from rlpost.inference.sample import prompt_group

        codec = make_codec(self.policy.tokenizer)
        groups = []
        for number, prompt in enumerate(prompts):
            where = f"prompts[{number}]"
            if isinstance(prompt, str):
                groups.append(prompt_group({"prompt": prompt}, codec))
            elif isinstance(prompt, Mapping):
                raise DataError(f"{where}: a single message - a conversation is a list, so give [[message, …]]")
            else:
                groups.append(encode({"prompt": list(prompt)}, Format.prompt, codec, where))
        return groups

    def _collect(self, groups: list[Group], n: int, sampling: Sampling, seed: int) -> list[list[Completion]]:
        from rlpost.engine.collect import collect
        from rlpost.engine.door import engine_for
        from rlpost.inference.sample import within

        if not groups:
            return []
        room = self.policy.max_positions - max(len(group.prompt) for group in groups)
        found: list[list[Completion]] = []
        at_once = max(AT_ONCE // n, 1)
        with closing(engine_for(self.policy)) as engine:
            engine.update_weights(self.policy, 0)
            for first in range(0, len(groups), at_once):
                some = groups[first : first + at_once]
                done = collect(engine, some, n, within(sampling, room), seed=seed, first=first)
                found += [list(group.completions) for group in done]
        return found


def load(checkpoint: str | os.PathLike[str]) -> Generator:
    """Load a model for generating, on the GPU if there is one.

    Args:
        checkpoint: a run, a stage or checkpoint in it, a model's folder, or its name on the hub.

    Raises:
        ModelError: there is none, it cannot be loaded, or it is a model of reversed text. DiskError: it is damaged.
    """
    from rlpost.inference.checkpoint import frozen_policy, located
    from rlpost.policy.load import is_backwards

    path = located(os.fspath(checkpoint))
    if is_backwards(path):
        raise ModelError(f"{checkpoint}: it reads backwards; use `rlpost sample`")
    return Generator(path, frozen_policy(path))
