"""The rewards of a recipe that choose among samples of a prompt, and a check of the columns they read."""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping
from typing import Any

from rlpost.errors import DataError, RecipeError, RewardError
from rlpost.recipe.resolve import Resolved
from rlpost.rewards.params import REWARD, Reward, reward_leaves
from rlpost.rewards.score import Scorer
from rlpost.rewards.tree import BoundReward
from rlpost.types import Completion, Group
from rlpost.usercode.binding import bind

_COLUMN = re.compile(r"(?:KeyError: |column )['\"]([^'\"]+)['\"]")
_ROW = {"example", "examples", "groups"}
"""Parameters of rewards that read rows."""


def rewards_of(resolved: Resolved) -> tuple[list[Reward], str]:
    """The rewards of a recipe's evaluation, or of its last enabled stage with rewards; and their section's key path.

    Raises:
        RecipeError: it has none.
    """
    if resolved.config.evaluation and resolved.config.evaluation.rewards:
        return resolved.config.evaluation.rewards, "evaluation"
    stages = [(name, getattr(s, "rewards", None)) for name, s in resolved.config.stages.items() if s.enabled]
    for name, rewards in reversed(stages):
        if rewards:
            return rewards, f"stages.{name}"
    raise RecipeError(f"{resolved.file}: it has no rewards to choose by")


def check_row(resolved: Resolved, row: Mapping[str, Any]) -> None:
    """Call each reward that reads rows with this row, before a model is loaded.

    Raises:
        RecipeError: it reads a column that is missing, or needs steps, which a plain sample does not have.
    """
    rewards, where = rewards_of(resolved)
    probe = Group((0,), (Completion((0,), (True,), text=str(row.get("prompt", ""))),), row)
    for leaf, location in reward_leaves(rewards, where):
        bound = bind(leaf, REWARD, location, resolved.folder)
        if leaf.model is not None or not _ROW & set(inspect.signature(bound.call).parameters):
            continue
        try:
            Scorer([BoundReward(bound.name, 1.0, bound.call, None)]).score([probe])
        except (DataError, RewardError) as error:
            if isinstance(error, RewardError) and "KeyError" not in str(error):
                continue  # it may work on a real sample
            match = _COLUMN.search(str(error))
            reads = f"{bound.name} reads the column {match[1]!r} of a row" if match else str(error)
            raise RecipeError(
                f"{location}: {reads}, and a prompt on the command line has none - give it as "
                f"--example {match[1] if match else 'COLUMN'}=TEXT"
            ) from error
