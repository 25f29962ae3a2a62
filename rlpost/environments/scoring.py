"""Scores completions, by step too where they have steps: those of an episode are its turns."""

from __future__ import annotations

from collections.abc import Sequence

from rlpost.data.step_split import step_texts
from rlpost.policy.policy import Policy
from rlpost.rewards.score import RewardBatch, Scorer
from rlpost.types import Group, completions


def scored(scorer: Scorer, groups: Sequence[Group], policy: Policy) -> RewardBatch:
    """The rewards of any completions, by step too if they are split into steps."""
    flat = completions(groups)
    if any(c.actions for c in flat) and not any(len(c.steps) for c in flat):
        return scorer.score(groups)
    return scorer.score(groups, steps=[step_texts(c, policy.tokenizer, policy.end_ids) for c in flat])
