"""A reward in a recipe."""

from collections.abc import Iterator, Sequence
from typing import Annotated

from pydantic import Field

from rlpost.section import Local
from rlpost.usercode.params import Lookup, OnFailure, TimedFunction

REWARD = Lookup(
    "reward",
    "rlpost.rewards.functions",
    ("completion", "example", "completions", "examples", "steps", "all_steps", "groups", "model"),
    by_name=True,
    some=True,
    apart=True,
)


class Reward(TimedFunction):
    """A reward function and its weight (docs/rewards.md)."""

    weight: float = 1.0
    """Weight in the sum of rewards; 0: only logged."""
    name: str | None = None
    """What it is logged under; by default the function's name."""
    of: Annotated[list["Reward"], REWARD] = Field(default_factory=list)
    """The children of a node: `fn` is then `sum`, `product`, `min`, `gate`, `lexicographic` or `shaping`."""
    on_failure: OnFailure | None = None
    """What happens when a function of a file raises, hangs, ends its process or returns no number. `stop` by
    default."""
    model: Annotated[str | None, Local()] = None
    """For functions that ask for a model: an earlier `reward_model` or `process_reward_model` stage, a reverse one
    (docs/goals.md#reverse-models), or a checkpoint."""


def reward_names(rewards: Sequence[Reward]) -> Iterator[str]:
    """What every node and leaf of a tree of rewards is logged under."""
    for reward in rewards:
        yield reward.name or reward.fn.rpartition(":")[2].rpartition(".")[2]
        yield from reward_names(reward.of)


def reward_leaves(rewards: Sequence[Reward], where: str) -> Iterator[tuple[Reward, str]]:
    """The reward functions of a tree of rewards, each with its key path; `where` is the path of what has them."""
    for i, reward in enumerate(rewards):
        yield from _leaves_below(reward, f"{where}.rewards[{i}]")


def _leaves_below(reward: Reward, where: str) -> Iterator[tuple[Reward, str]]:
    if not reward.of:
        yield reward, where
    for i, child in enumerate(reward.of):
        yield from _leaves_below(child, f"{where}.of[{i}]")
