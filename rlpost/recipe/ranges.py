"""The range of every number in a recipe."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from rlpost.data.params import Fold, Source, Tokenizer
from rlpost.engine.params import EngineChoice, Sampling
from rlpost.evaluate.params import Evaluation
from rlpost.policy.params import Lora
from rlpost.recipe.keys import join
from rlpost.recipe.parts import Training
from rlpost.recipe.row_stages import Guided, Pairs, StepLabels
from rlpost.recipe.schema import (
    Dpo,
    Grouped,
    Grpo,
    Kto,
    OnlineDpo,
    Ppo,
    ProcessRewardModel,
    Recipe,
    RewardModel,
    Rollouts,
    Sft,
    Trpo,
    Value,
)
from rlpost.rewards.params import Reward
from rlpost.stages.params import Correction, Critic, Kl, Refresh
from rlpost.usercode.params import TimedFunction


@dataclass(frozen=True)
class Range:
    """Numbers from `low` to `high`; infinity and NaN never belong to it."""

    low: float = -math.inf
    high: float = math.inf
    above: bool = False
    """`low` itself is left out."""
    below: bool = False
    """`high` itself is left out."""

    def __contains__(self, value: float) -> bool:
        over = value > self.low if self.above else value >= self.low
        under = value < self.high if self.below else value <= self.high
        return over and under and math.isfinite(value)

    def __str__(self) -> str:
        if self.low == -math.inf:
            return "a finite number"
        if self.high == math.inf:
            return f"more than {self.low:g}" if self.above else f"at least {self.low:g}"
        return f"from {self.low:g}{' (exclusive)' * self.above} to {self.high:g}{' (exclusive)' * self.below}"


_POSITIVE = Range(0, above=True)
_SHARE = Range(0, 1, below=True)


def _from(low: float) -> Range:
    return Range(low)


RANGES: dict[type, dict[str, Range]] = {
    Recipe: {"seed": Range(0, 2**32 - 1), "threads": _from(1)},
    TimedFunction: {"deadline": _POSITIVE},
    Lora: {"r": _from(1), "alpha": _POSITIVE, "dropout": _SHARE},
    Tokenizer: {"vocab_size": _from(2)},
    Source: {"weight": _POSITIVE, "limit": _from(1)},
    Fold: {"of": _from(2), "hold_out": _from(0)},
    Reward: {"weight": Range()},
    EngineChoice: {"deadline": _POSITIVE, "cache_gib": _from(0)},
    Sampling: {
        "max_new_tokens": _from(1),
        "temperature": _POSITIVE,
        "top_k": _from(0),
        "top_p": Range(0, 1, above=True),
        "min_p": _SHARE,
    },
    Kl: {"beta": _from(0), "target": _POSITIVE, "horizon": _from(1)},
    Correction: {"cap": _POSITIVE, "floor": _from(0)},
    Critic: {"learning_rate": _POSITIVE, "clip": _POSITIVE, "warmup_steps": _from(0)},
    Refresh: {"every": _from(1), "share": Range(0, 1, above=True)},
    Training: {
        "steps": _from(1),
        "epochs": _POSITIVE,
        "learning_rate": _POSITIVE,
        "warmup": _from(0),
        "weight_decay": _from(0),
        "betas": _SHARE,
        "max_grad_norm": _from(0),
        "tokens_per_pass": _from(1),
        "aux_loss_coef": _from(0),
        "max_length": _from(2),
        "checkpoint_every": _from(1),
        "keep_checkpoints": _from(1),
        "log_every": _from(1),
    },
    Sft: {"batch_size": _from(1)},
    Dpo: {"batch_size": _from(1), "nll": _from(0)},
    Kto: {"batch_size": _from(2)},
    RewardModel: {"batch_size": _from(1)},
    ProcessRewardModel: {"batch_size": _from(1)},
    Value: {
        "prompts": _from(1),
        "group_size": _from(1),
        "updates": _from(1),
        "hindsight": Range(0, 1),
        "hindsight_tokens": _from(1),
    },
    Rollouts: {
        "prompts": _from(1),
        "group_size": _from(1),
        "updates": _from(1),
        "passes": _from(1),
        "turns": _from(1),
        "table_every": _from(0),
    },
    Grouped: {"resample": _from(0), "fresh_rollouts": _from(1)},
    Grpo: {"entropy": _from(0)},
    Trpo: {
        "learning_rate": Range(0, 1, above=True),
        "delta": _POSITIVE,
        "damping": _from(0),
        "iterations": _from(1),
        "backtracks": _from(0),
    },
    Ppo: {"gamma": Range(0, 1, above=True), "lam": Range(0, 1), "entropy": _from(0)},
    OnlineDpo: {"min_gap": _from(0)},
    Pairs: {"prompts": _from(1), "group_size": _from(2), "min_gap": _from(0)},
    Guided: {"prompts": _from(1), "group_size": _from(1), "candidates": _from(0)},
    StepLabels: {"prompts": _from(1), "group_size": _from(1), "fresh_rollouts": _from(1)},
    Evaluation: {"samples": _from(0), "turns": _from(1), "pass_at": _from(1), "show": _from(0), "batch": _from(1)},
}


def out_of_range(value: Any, where: str) -> Iterator[str]:
    """One line for each number of the dataclass `value` outside its range."""
    for cls in type(value).__mro__:
        for name, accepted in RANGES.get(cls, {}).items():
            given = getattr(value, name)
            path = join(where, name)
            numbers = enumerate(given) if isinstance(given, list | tuple) else [(None, given)]
            for i, number in numbers:
                if number is not None and number not in accepted:
                    yield f"{path if i is None else join(path, i)}: expected {accepted}, got {number}"
