"""Models that score every step of a completion."""

from __future__ import annotations

from typing import Annotated, ClassVar

from pydantic import Field

from rlpost.data.params import DataRole
from rlpost.recipe.rules import Leaves
from rlpost.recipe.specs.common import Offline
from rlpost.usercode.params import Function, Lookup

LOSS = Lookup("process_reward_model.loss", "rlpost.objectives.reward_model", ("logit_K", "label_K"), returns="elements")


class ProcessRewardModel(Offline):
    """A model that scores every step of a completion, for `rewards: [{fn: process_reward_model, model: NAME}]`; the
    policy passes unchanged. Rows are `prompt, steps, labels`."""

    kind: str = "process_reward_model"
    batch_size: int = Field(32, ge=1)
    """Rows an update."""
    loss: Annotated[Function, LOSS] = Field(default_factory=lambda: Function(fn="process_reward"))
    """The loss of a completion's steps; in `rlpost/objectives/reward_model.py`."""

    function: ClassVar[str] = "rlpost.stages.process_reward_model:process_reward_model"
    measured = ("loss", "accuracy", "predicted", "label")
    leaves = Leaves.process_reward_model

    def rows(self) -> DataRole:
        """Steps with labels."""
        return DataRole.steps
