"""Evaluation in a recipe."""

from dataclasses import dataclass, field
from typing import Optional

from rlpost.data.params import Source
from rlpost.engine.params import EngineChoice, Sampling
from rlpost.rewards.params import Reward
from rlpost.usercode.params import EnvironmentFunction

# OmegaConf reads these annotations and refuses `X | None` of dataclasses in places: hence Optional.
# ruff: noqa: UP045


@dataclass
class Evaluation:
    """Held-out evaluation: the first reward is the accuracy (1 is right), others are reported beside it."""

    data: dict[str, Source] = field(default_factory=dict)
    rewards: list[Reward] = field(default_factory=list)
    sampling: Sampling = field(default_factory=Sampling)
    rollouts: Optional[EngineChoice] = None
    """What samples; by default what the recipe's `rollouts` says."""
    greedy: bool = True
    samples: int = 1
    """Samples a prompt at `sampling.temperature` (0: greedy only)."""
    pass_at: list[int] = field(default_factory=list)
    """The k of pass@k, each at most `samples`."""
    best_of: bool = False
    """Also report the best of a prompt's samples by the sum of rewards."""
    judge: Optional[str] = None
    """A reward_model stage (or checkpoint): also report the best of a prompt's samples by its score."""
    environment: Optional[EnvironmentFunction] = None
    """What answers the model's turns, as in the stages."""
    turns: int = 2
    """With an environment: most turns of the model."""
    slices: list[str] = field(default_factory=list)
    """Columns with true or false, reported apart."""
    every_stage: bool = True
    """`rlpost train` evaluates the base model and each stage's result, and prints the table."""
    show: int = 3
    """Prompts whose answers are printed before and after."""
    batch: int = 256
    """Completions generated at a time."""
