"""Groups, a prompt with its completions, which every stage works on; and requests to engines.

SFT has one completion a group, a preference pair has two (chosen first), GRPO has G. Plain data without tensors:
read-only NumPy arrays and fields. NumPy is imported with the first of them: a recipe is checked without it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import TYPE_CHECKING, Any, TypeAlias

from rlpost.engine.params import Sampling

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import ArrayLike, NDArray

FAILED = "failed"
"""`finish` of a completion whose environment failed."""
Ids: TypeAlias = "NDArray[np.int32]"
"""Token ids, read-only."""
Tokens: TypeAlias = "Sequence[int] | NDArray[np.integer[Any]]"
"""Token ids in any form, read only."""


@dataclass(frozen=True, eq=False, init=False)
class Completion:
    """A completion of a prompt: its tokens, and what is known about it.

    Example: the prompt "47+38=" answered "580" and ended by token 2 is
    ``Completion(ids=[9, 12, 4, 2], action=[True] * 4, text="580", finish="stop")``.

    There is no `==`: `same` compares, and `digest` is a key.
    """

    ids: Ids
    """[L] token ids, the end token included when there is one."""
    action: NDArray[np.bool_]
    """[L] True where the policy chose the token (or, in data, learns it); False for tool and user turns."""
    text: str
    """The answer as text, special tokens by their names, without the end token and the stop string that ended it."""
    finish: str
    """"stop" (end token or stop string), "length" (cut off), "failed" (its environment did: it has no reward), or
    empty for data we did not sample."""
    logprobs: NDArray[np.floating[Any]]
    """[sum(action)] log-probabilities under the sampler, at its temperature, as float32 or float64; empty for data we
    did not sample."""
    steps: NDArray[np.int32]
    """[K] number of actions of each step; empty if it is not split into steps."""
    step_labels: NDArray[np.float64]
    """[K] label of each step, from 0 (wrong) to 1 (right); empty if there are none."""
    reward: float | None
    """Its total reward; None if it is unscored, or not scored yet."""
    label: bool | None
    """Whether it is desirable; None without a label."""
    score: float | None
    """Its score in a ranking of its group; None if it is not ranked."""
    weights_version: int | None
    """Version of the weights it was sampled with; None for data we did not sample."""
    step_rewards: NDArray[np.float64]
    """[K] what the environment gave each step, which is a turn of the model; empty if it gives none."""
    messages: tuple[Mapping[str, Any], ...]
    """Of an episode with messages: what was said after the prompt. The model's also hold `reward`, `info` and
    `tool_calls`, where there are such."""

    def __init__(
        self,
        ids: ArrayLike,
        action: ArrayLike,
        text: str = "",
        finish: str = "",
        logprobs: ArrayLike = (),
        steps: ArrayLike = (),
        step_labels: ArrayLike = (),
        reward: float | None = None,
        label: bool | None = None,
        score: float | None = None,
        weights_version: int | None = None,
        step_rewards: ArrayLike = (),
        messages: Sequence[Mapping[str, Any]] = (),
    ) -> None:
        """Sequences become arrays; arrays that could be written to are copied.

        Raises:
            ValueError: the lengths do not fit together.
        """
        put = object.__setattr__  # one by one: a step makes thousands
        put(self, "ids", _frozen(ids, "int32"))
        put(self, "action", _frozen(action, "bool"))
        put(self, "text", text)
        put(self, "finish", finish)
        put(self, "logprobs", _frozen(logprobs, "float64", "float32"))
        put(self, "steps", _frozen(steps, "int32"))
        put(self, "step_labels", _frozen(step_labels, "float64"))
        put(self, "reward", reward)
        put(self, "label", label)
        put(self, "score", score)
        put(self, "weights_version", weights_version)
        put(self, "step_rewards", _frozen(step_rewards, "float64"))
        put(self, "messages", tuple(messages))
        self._check()

    def _check(self) -> None:
        if len(self.ids) != len(self.action):
            raise ValueError(f"a completion of {len(self.ids)} tokens has {len(self.action)} flags of action")
        if len(self.logprobs) and len(self.logprobs) != self.actions:
            raise ValueError(f"a completion of {self.actions} actions has {len(self.logprobs)} log-probabilities")
        if len(self.steps) and self.steps.sum() != self.actions:
            raise ValueError(f"a completion of {self.actions} actions has steps of {self.steps.tolist()}")
        for name in ("step_labels", "step_rewards"):
            count = len(getattr(self, name))
            if count not in (0, len(self.steps)):
                what = name.removeprefix("step_")
                raise ValueError(f"a completion of {len(self.steps)} steps has {count} {what} of steps")

    @property
    def actions(self) -> int:
        """Number of tokens the policy chose."""
        return self.action.tobytes().count(1)

    def rewarded(self, reward: float | None) -> Completion:
        """The same completion with a total reward; its read-only arrays are shared."""
        return self._of_fields({**vars(self), "reward": reward})

    @classmethod
    def _of_fields(cls, fields: Mapping[str, Any]) -> Completion:
        """A completion of the fields of another, which are not checked again."""
        completion = object.__new__(cls)
        vars(completion).update(fields)
        return completion

    def same(self, other: Completion) -> bool:
        """Whether all fields are the same, bit for bit."""
        return self.digest() == other.digest()

    def digest(self) -> bytes:
        """A digest of 16 bytes of all fields: equal if completions are the same."""
        by_action = self.ids, self.action, self.logprobs.astype("float64")
        by_step = self.steps, self.step_labels, self.step_rewards
        values = self.text, self.finish, self.reward, self.label, self.score, self.weights_version, self.messages
        return _digest(values, *(a.tobytes() for a in (*by_action, *by_step)))


@dataclass(frozen=True, eq=False, init=False)
class Group:
    """One prompt and its completions."""

    prompt: Ids
    """Token ids, never empty."""
    completions: tuple[Completion, ...]
    example: Mapping[str, Any] = field(default_factory=dict)
    """The data row it came from, for reward functions."""

    def __init__(
        self, prompt: ArrayLike, completions: Sequence[Completion], example: Mapping[str, Any] | None = None
    ) -> None:
        """Sequences become arrays.

        Raises:
            ValueError: the prompt has no token.
        """
        object.__setattr__(self, "prompt", _frozen(prompt, "int32"))
        object.__setattr__(self, "completions", tuple(completions))
        object.__setattr__(self, "example", {} if example is None else example)
        if not len(self.prompt):
            raise ValueError("a prompt has at least one token")

    def same(self, other: Group) -> bool:
        """Whether prompts, completions and rows are the same, bit for bit."""
        return self.digest() == other.digest()

    def digest(self) -> bytes:
        """A digest of 16 bytes of all fields: equal if groups are the same."""
        row = json.dumps(dict(self.example), sort_keys=True, default=repr)
        return _digest((row,), self.prompt.tobytes(), *(c.digest() for c in self.completions))


@dataclass(frozen=True, eq=False, init=False)
class Request:
    """A request to an engine: completions of one prompt."""

    prompt: Ids
    """Token ids, never empty."""
    n: int
    """Completions, at least one."""
    sampling: Sampling
    """How tokens are drawn, and stop strings; temperature 0 means greedy."""
    seed: int
    """64-bit seed of the prompt; a completion's random numbers depend only on it and on the completion's number."""
    limit: int
    """Most tokens of a completion, instead of `sampling.max_new_tokens`."""
    first: int
    """Number of the first completion, if others of this prompt and seed were sampled before."""
    keep: bool
    """Keep the cache: a later prompt will begin with this one and (part of) a completion of it."""

    def __init__(
        self,
        prompt: ArrayLike,
        n: int,
        sampling: Sampling,
        seed: int,
        limit: int | None = None,
        first: int = 0,
        keep: bool = False,
    ) -> None:
        """The prompt becomes an array; `limit` is by default `sampling.max_new_tokens`.

        Raises:
            ValueError: the prompt has no token, or `n` or `limit` is below 1.
        """
        limit = sampling.max_new_tokens if limit is None else limit
        values = {"prompt": _frozen(prompt, "int32"), "n": n, "sampling": sampling, "seed": seed, "limit": limit}
        for name, value in {**values, "first": first, "keep": keep}.items():
            object.__setattr__(self, name, value)
        if not len(self.prompt):
            raise ValueError("a prompt has at least one token")
        if n < 1 or limit < 1:
            raise ValueError(f"a request for {n} completions of at most {limit} tokens")


def completions(groups: Sequence[Group]) -> list[Completion]:
    """All completions of the groups, in order: the S axis of every tensor."""
    return [c for g in groups for c in g.completions]


def labels(groups: Sequence[Group]) -> list[bool]:
    """[S] the labels of all completions; each must have one."""
    found = [c.label for c in completions(groups) if c.label is not None]
    assert len(found) == len(completions(groups)), "validated: labelled rows"
    return found


def _frozen(values: ArrayLike, kind: str, other: str | None = None) -> NDArray[Any]:
    """The values as a read-only array [n] of dtype `kind`, copied if the source can be written to.

    Arrays of dtype `other` keep it.
    """
    if isinstance(values, tuple) and not values:
        return _nothing(kind)
    wanted, found = _dtype(kind), getattr(values, "dtype", "")
    if other is not None and found == _dtype(other):
        wanted = _dtype(other)
    if found == wanted and not values.flags.writeable:  # type: ignore[union-attr]
        array: NDArray[Any] = values  # type: ignore[assignment]
    else:
        array = _array(values, wanted)
        array.setflags(write=False)
    if array.ndim != 1:
        raise ValueError(f"expected a row of numbers, got an array of shape {array.shape}")
    return array


@cache
def _dtype(kind: str) -> np.dtype[Any]:
    import numpy as np

    return np.dtype(kind)


def _array(values: ArrayLike, wanted: np.dtype[Any]) -> NDArray[Any]:
    """A copy."""
    import numpy as np

    return np.array(values, wanted)


@cache
def _nothing(kind: str) -> NDArray[Any]:
    import numpy as np

    array = np.zeros(0, kind)
    array.setflags(write=False)
    return array


def _digest(values: Sequence[Any], *parts: bytes) -> bytes:
    found = hashlib.blake2b(repr(values).encode(), digest_size=16)
    for part in parts:
        found.update(len(part).to_bytes(8, "little"))
        found.update(part)
    return found.digest()
