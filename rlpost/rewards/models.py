"""Rewards from reward models, process reward models and models of reversed text.

They take whole groups and a `model`, which a recipe names by stage or checkpoint.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Literal, Protocol

from rlpost.errors import RecipeError
from rlpost.types import Group


class Judge(Protocol):
    """A model that scores completions."""

    backwards: bool
    """True for a model of reversed text: its scores are log-likelihoods of the prompt."""

    def scores(self, groups: Sequence[Group]) -> list[float]:
        """[S] a score a completion; only differences within a prompt mean anything."""
        ...

    def step_scores(self, groups: Sequence[Group], step_end: str) -> list[list[float]]:
        """[S] for every step of a completion, the probability that it is right.

        `step_end` splits completions that are not split into steps yet.
        """
        ...


_REDUCTIONS: dict[str, Callable[[list[float]], float]] = {
    "min": min,
    "last": lambda scores: scores[-1],
    "product": math.prod,
    "mean": lambda scores: math.fsum(scores) / len(scores),
}


def process_steps(
    groups: Sequence[Group],
    all_steps: Sequence[Sequence[str]],  # noqa: ARG001 - marks it as a reward by step
    model: Judge,
) -> list[list[float]]:
    """The probability of each step of a completion, by a process reward model: a reward by step."""
    return model.step_scores(groups, "\n")


def reward_model(groups: Sequence[Group], model: Judge) -> list[float]:
    """The score of each completion, by a reward model."""
    return model.scores(groups)


def process_reward_model(
    groups: Sequence[Group],
    model: Judge,
    *,
    reduce: Literal["min", "last", "product", "mean"] = "min",
    step_end: str = "\n",
) -> list[float | None]:
    """A process reward model's probabilities for the steps of a completion, reduced to one number.

    The product is the probability that all are right if they were independent; the minimum is that of the worst
    step (Lightman et al. 2023, arXiv:2305.20050, compare the two). A completion without a step is unscored.

    Args:
        groups: completions, split into steps or not.
        model: the process reward model.
        reduce: `min`, `last`, `product` or `mean`.
        step_end: what a step ends with, where the stage does not say; empty: every token is a step.

    Raises:
        RecipeError: another `reduce`.
    """
    if reduce not in _REDUCTIONS:
        raise RecipeError(f"process_reward_model: reduce={reduce!r} - give one of {', '.join(_REDUCTIONS)}")
    return [_REDUCTIONS[reduce](scores) if scores else None for scores in model.step_scores(groups, step_end)]


def reverse_likelihood(groups: Sequence[Group], model: Judge) -> list[float]:
    """log p_reverse(prompt | completion), in nats, by a model of reversed text: how well an answer predicts its prompt.

    The second term of MMI-bidi (Li et al. 2016, arXiv:1510.03055), which reranks answers by mutual information.

    Raises:
        RecipeError: the model reads forwards.
    """
    if not model.backwards:
        raise RecipeError(
            "reverse_likelihood: asks a model of reversed text - name an sft stage with direction: reverse, "
            "or a checkpoint of one"
        )
    return model.scores(groups)
