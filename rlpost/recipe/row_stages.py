"""Stages whose result is rows: what they take from a recipe."""

from dataclasses import dataclass, field
from typing import Optional

from omegaconf import MISSING

from rlpost.data.params import Source
from rlpost.engine.params import EngineChoice, Sampling
from rlpost.goals.params import Goals
from rlpost.recipe.parts import Kind, Stage
from rlpost.rewards.params import Reward
from rlpost.stages.params import PairChoice

# OmegaConf reads these annotations and refuses `X | None` of dataclasses in places: hence Optional.
# ruff: noqa: UP045


@dataclass
class Pairs(Stage):
    """Rows from the model's own samples, ranked by rewards; the model passes unchanged."""

    kind: Kind = Kind.pairs
    data: dict[str, Source] = field(default_factory=dict)
    prompts: Optional[int] = None
    """How many prompts to sample (all of them by default)."""
    group_size: int = 8
    sampling: Sampling = field(default_factory=Sampling)
    rollouts: Optional[EngineChoice] = None
    """What samples; by default what the recipe's `rollouts` says."""
    rewards: list[Reward] = field(default_factory=list)
    choice: PairChoice = PairChoice.one
    min_gap: float = 0.0
    """A pair's rewards must differ by more than this."""


@dataclass
class Guided(Stage):
    """Rows from samples that a value network led to its goals, for `sft` to imitate; the model passes unchanged."""

    kind: Kind = Kind.guided
    data: dict[str, Source] = field(default_factory=dict)
    prompts: Optional[int] = None
    """How many prompts to sample (all of them by default)."""
    group_size: int = 8
    sampling: Sampling = field(default_factory=Sampling)
    rollouts: Optional[EngineChoice] = None
    """What samples; by default what the recipe's `rollouts` says."""
    network: str = MISSING
    """A stage of kind value, or a checkpoint of one."""
    goals: Goals = field(default_factory=Goals)
    """As in the stage that trained the network."""
    candidates: int = 32
    """Likeliest tokens that are weighed at each step; 0: all."""
    reached_only: bool = True
    """Keep the samples that end as they should, and no others."""


@dataclass
class Guesses(Stage):
    """Rows with what a value network guesses about them, for a policy that reads it; the model passes unchanged."""

    kind: Kind = Kind.guesses
    data: dict[str, Source] = field(default_factory=dict)
    network: str = MISSING
    """A stage of kind value, or a checkpoint of one."""
    goals: Goals = field(default_factory=Goals)
    """As in the stage that trained the network."""
    about: str = MISSING
    """The column in which a row lists the texts to ask about; `guesses` will hold a digit for each."""


@dataclass
class StepLabels(Stage):
    """Rows for a process reward model: steps of own samples, labelled by fresh rollouts; the model passes unchanged."""

    kind: Kind = Kind.step_labels
    data: dict[str, Source] = field(default_factory=dict)
    prompts: Optional[int] = None
    """How many prompts to sample (all of them by default)."""
    group_size: int = 2
    sampling: Sampling = field(default_factory=Sampling)
    rollouts: Optional[EngineChoice] = None
    """What samples; by default what the recipe's `rollouts` says."""
    rewards: list[Reward] = field(default_factory=list)
    step_end: str = "\n"
    """A step ends with this text; empty: every token is a step."""
    fresh_rollouts: int = 4
    """Rollouts from the end of every step; a label is their mean reward."""
