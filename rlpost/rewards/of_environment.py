"""What rewards and opponents ask of an environment, checked when a recipe is read."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from rlpost.rewards.params import Reward, reward_leaves
from rlpost.usercode.params import ENVIRONMENT, EPISODE, EnvironmentFunction
from rlpost.usercode.signatures import info_of


def is_class(environment: EnvironmentFunction | None) -> bool:
    """Whether it is a class, which rewards the model's turns."""
    return environment is not None and info_of(environment, ENVIRONMENT).takes(EPISODE)


def has_second_player(environment: EnvironmentFunction | None) -> bool:
    """Whether it is a class that may ask an opponent for moves."""
    return environment is not None and is_class(environment) and not info_of(environment, ENVIRONMENT).has("one_player")


def environment_problems(
    rewards: Sequence[Reward], environment: EnvironmentFunction | None, where: str
) -> Iterator[str]:
    """What is wrong with rewards, of what has the key path `where`, that are an environment's."""
    # Of a function that is not there another line tells.
    known = environment is None or info_of(environment, ENVIRONMENT).signature.parameters
    for leaf, place in reward_leaves(rewards, where):
        if leaf.fn == "environment_reward" and known and not is_class(environment):
            yield f"{place}.fn: environment_reward is what a class environment gives - name one, or another reward"
