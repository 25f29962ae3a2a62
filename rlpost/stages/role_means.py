"""A running mean of rewards for every role, where a column of the rows says which role a prompt is played in.

Axes: P prompts, G completions a prompt.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from rlpost.data.row_values import role_in
from rlpost.objectives.advantages import ema
from rlpost.types import Group

MEANS = "role_means"
"""In a state: the mean of each role."""
DECAY = 0.95
"""Of the running means, where the estimator's `args` give no other."""


class RoleMeans:
    """The means; a role that is new has none yet."""

    def __init__(self, where: str, args: Mapping[str, Any]) -> None:
        """Begin without any.

        Args:
            where: key path of the estimator, for errors.
            args: the recipe's for it: `by` names the column, `decay` says how slowly means move.
        """
        self._where = f"{where}.args.by"
        self._args = args
        self._means: dict[str, float] = {}

    def of(self, groups: Sequence[Group]) -> Tensor:
        """[P] the mean of each prompt's role, 0 where it has none yet.

        Raises:
            DataError: a row has no such column.
        """
        return torch.tensor([self._means.get(role, 0.0) for role in self._roles(groups)], dtype=torch.float64)

    def move(self, groups: Sequence[Group], reward_PG: Tensor) -> None:
        """Move the mean of every role that there is, once, towards the mean of its rewards."""
        roles = self._roles(groups)
        decay = float(self._args.get("decay", DECAY))
        for role in dict.fromkeys(roles):
            own_P = torch.tensor([r == role for r in roles])
            moved = ema(self._means.get(role), reward_PG[own_P], decay)
            if moved is not None:
                self._means[role] = moved

    def state(self) -> dict[str, Any]:
        """The means, as JSON."""
        return {MEANS: dict(self._means)}

    def load(self, state: Mapping[str, Any]) -> None:
        """Go on from there."""
        self._means = dict(state.get(MEANS, {}))

    def _roles(self, groups: Sequence[Group]) -> list[str]:
        return [role_in(group.example, self._args["by"], self._where) for group in groups]
