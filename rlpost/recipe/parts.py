"""What all stages have in a recipe, and what all have that train."""

from dataclasses import dataclass, field
from enum import StrEnum
from typing import Optional

from omegaconf import MISSING

from rlpost.data.params import Source, TooLong
from rlpost.train.params import Schedule

# OmegaConf reads these annotations and refuses `X | None` of dataclasses in places: hence Optional.
# ruff: noqa: UP045


class Kind(StrEnum):
    """What a stage does."""

    sft = "sft"
    dpo = "dpo"
    kto = "kto"
    online_dpo = "online_dpo"
    reward_model = "reward_model"
    process_reward_model = "process_reward_model"
    value = "value"
    grpo = "grpo"
    ppo = "ppo"
    trpo = "trpo"
    pairs = "pairs"
    guided = "guided"
    guesses = "guesses"
    step_labels = "step_labels"


@dataclass
class Stage:
    """What every stage has."""

    kind: Kind = MISSING
    enabled: bool = True
    """`stages.NAME.enabled=false` leaves the stage out of the pipeline."""
    start: Optional[str] = None
    """The stage whose model this one starts from: by default the one before it; `base` is the base model."""


@dataclass
class Training(Stage):
    """What every stage that updates weights has."""

    data: dict[str, Source] = field(default_factory=dict)
    steps: Optional[int] = None
    """Optimiser steps (grpo: rollout steps); or give `epochs`."""
    epochs: Optional[float] = None
    learning_rate: float = MISSING
    schedule: Schedule = Schedule.linear
    warmup: float = 0.0
    """A share of all updates below 1, a number of updates from 1 on."""
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.999)
    max_grad_norm: float = 1.0
    tokens_per_pass: int = 8192
    """Token budget of one forward and backward pass; the gradient does not depend on it."""
    aux_loss_coef: Optional[float] = None
    """Of a mixture of experts' balance loss, beside the stage's own (0: none); by default the model's
    `router_aux_loss_coef`."""
    max_length: int = 1024
    """Tokens of prompt and completion together."""
    too_long: TooLong = TooLong.refuse
    checkpoint_every: int = 100
    keep_checkpoints: int = 2
    log_every: int = 1
