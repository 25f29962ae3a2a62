"""Reward functions that a recipe can name under `rewards`.

A reward takes what the program supplies by parameter name, `(completion, example)` or `(completions, examples)`, and
keyword-only arguments that a recipe sets with `args`. It returns a number, or None to leave the completion
unscored.
"""

from rlpost.rewards.code import code
from rlpost.rewards.episodes import environment_reward
from rlpost.rewards.judge import judge
from rlpost.rewards.math import math_answer
from rlpost.rewards.models import process_reward_model, process_steps, reverse_likelihood, reward_model
from rlpost.rewards.text import ends, length, pattern, repetition

__all__ = [
    "code",
    "ends",
    "environment_reward",
    "judge",
    "length",
    "math_answer",
    "pattern",
    "process_reward_model",
    "process_steps",
    "repetition",
    "reverse_likelihood",
    "reward_model",
]
