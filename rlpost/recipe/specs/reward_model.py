"""Models that score completions."""

from __future__ import annotations

from typing import Annotated, ClassVar

from pydantic import Field

from rlpost.data.params import DataRole
from rlpost.recipe.rules import Leaves
from rlpost.recipe.specs.common import Offline
from rlpost.usercode.params import Function, Lookup
from rlpost.usercode.signatures import info_of

LOSS = Lookup(
    "reward_model.loss",
    "rlpost.objectives.reward_model",
    ("score_P2", "margin_P", "score_PK", "reward_PK"),
    by_name=True,
    some=True,
    returns="elements",
)


class RewardModel(Offline):
    """A model that scores completions, for `rewards: [{fn: reward_model, model: NAME}]`, `critic.start` and `judge`;
    the policy passes unchanged. Rows are pairs, or with `loss: {fn: plackett_luce}` ranked completions."""

    kind: str = "reward_model"
    batch_size: int = Field(32, ge=1)
    """Pairs, or ranked groups, an update."""
    loss: Annotated[Function, LOSS] = Field(default_factory=lambda: Function(fn="bradley_terry"))
    """`bradley_terry` of pairs, `plackett_luce` of ranked completions; in `rlpost/objectives/reward_model.py`."""

    function: ClassVar[str] = "rlpost.stages.reward_model:reward_model"
    measured = ("loss", "accuracy", "margin", "score")
    leaves = Leaves.reward_model

    def rows(self) -> DataRole:
        """Pairs, or ranked completions."""
        return DataRole.ranked if info_of(self.loss, LOSS).takes("score_PK", "reward_PK") else DataRole.pairs
