"""A prompt with its completions: the one shape of data every stage works on.

SFT has one completion a group, a preference pair has two (chosen first), GRPO has G.
Plain data without tensors: this is what rollouts are saved as.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

FAILED = "failed"
"""How a completion finished whose environment failed."""


@dataclass(frozen=True)
class Completion:
    """What follows a prompt, token by token.

    Example: the prompt "47+38=" answered "580" and ended by token 2 is
    ``Completion(ids=(9, 12, 4, 2), action=(True, True, True, True), text="580", finish="stop")``.
    """

    ids: tuple[int, ...]
    """[L] token ids, the end token included when there is one."""
    action: tuple[bool, ...]
    """[L] True where the policy chose (or, in data, is to learn) the token; False for tool and user turns."""
    text: str = ""
    """The answer as text, special tokens by their names, without the end token and the stop string that ended it."""
    finish: str = ""
    """"stop" (end token or stop string), "length" (cut off), "failed" (its environment did: it has no reward), or
    empty for data we did not sample."""
    logprobs: tuple[float, ...] = ()
    """[sum(action)] log-probabilities under the sampler, at its temperature; empty for data we did not sample."""
    steps: tuple[int, ...] = ()
    """[K] number of actions of each step; empty where a completion is not divided into steps."""

    def __post_init__(self) -> None:
        assert len(self.ids) == len(self.action), (len(self.ids), len(self.action))
        assert not self.steps or sum(self.steps) == self.actions, (self.steps, self.actions)

    @property
    def actions(self) -> int:
        """Number of tokens the policy chose."""
        return sum(self.action)


@dataclass(frozen=True)
class Group:
    """One prompt and its completions."""

    prompt: tuple[int, ...]
    """Token ids, never empty."""
    completions: tuple[Completion, ...]
    example: Mapping[str, Any] = field(default_factory=dict)
    """The data row it came from: what reward functions read."""

    def __post_init__(self) -> None:
        assert self.prompt, "a prompt has at least one token"


def completions(groups: Sequence[Group]) -> list[Completion]:
    """All completions of the groups, in order: the S axis of every tensor."""
    return [c for g in groups for c in g.completions]
