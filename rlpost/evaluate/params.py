"""Evaluation in a recipe."""

from dataclasses import dataclass, field
from typing import Optional

from rlpost.data.params import Source
from rlpost.engine.params import EngineChoice, Sampling
from rlpost.key import key
from rlpost.rewards.params import REWARD, Reward
from rlpost.usercode.params import ENVIRONMENT, EnvironmentFunction

# OmegaConf reads these annotations and refuses `X | None` of dataclasses in places: hence Optional.
# ruff: noqa: UP045


@dataclass
class Evaluation:
    """Held-out evaluation: the first reward is the accuracy (1 is right), others are reported beside it."""

    data: dict[str, Source] = field(default_factory=dict)
    rewards: list[Reward] = key(factory=list, lookup=REWARD)
    sampling: Sampling = field(default_factory=Sampling)
    rollouts: Optional[EngineChoice] = None
    """What samples; by default what the recipe's `rollouts` says."""
    greedy: bool = True
    samples: int = key(1, ge=0)
    """Samples a prompt at `sampling.temperature` (0: greedy only)."""
    pass_at: list[int] = key(factory=list, ge=1)
    """The k of pass@k, each at most `samples`."""
    best_of: bool = False
    """Also report the best of a prompt's samples by the sum of rewards."""
    judge: Optional[str] = key(None, path=True)
    """A reward_model stage (or checkpoint): also report the best of a prompt's samples by its score."""
    environment: Optional[EnvironmentFunction] = key(None, lookup=ENVIRONMENT)
    """What answers the model's turns, as in the stages."""
    turns: int = key(2, ge=1)
    """With an environment: most turns of the model."""
    slices: list[str] = field(default_factory=list)
    """Columns with true or false, reported apart."""
    every_stage: bool = True
    """`rlpost train` evaluates the base model and each stage's result, and prints the table."""
    show: int = key(3, ge=0)
    """Prompts whose answers are printed before and after."""
    batch: int = key(256, ge=1)
    """Completions generated at a time."""
