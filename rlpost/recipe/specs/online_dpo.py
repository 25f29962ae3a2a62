"""DPO on pairs of fresh samples."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, ClassVar

from pydantic import Field, model_validator

from rlpost.recipe.rules import Earlier
from rlpost.recipe.specs.common import Rollouts
from rlpost.recipe.specs.dpo import LOSSES, WeightedLoss, loss_problems, one_of_both
from rlpost.stages.params import Against, Correction
from rlpost.usercode.params import Function, Lookup

LOSS = Lookup("online_dpo.loss", "rlpost.objectives.preference", ("pairs",), returns="elements")


class OnlineDpo(Rollouts):
    """DPO on pairs of fresh samples: the best and the worst of each group by reward, or the policy's and another's."""

    kind: str = "online_dpo"
    loss: Annotated[Function | None, LOSS] = Field(default_factory=lambda: Function(fn="dpo"))
    """The loss of a pair; in `rlpost/objectives/preference.py`."""
    losses: Annotated[list[WeightedLoss], LOSSES] = Field(default_factory=list)
    """Instead of `loss`: several losses of pairs, whose weighted sum is minimised."""
    min_gap: float = Field(0.0, ge=0)
    """A pair's rewards must differ by more than this."""
    against: Against | None = None
    """Whom the policy meets: each pair is then a completion of its own and one of another policy. By default pairs are
    of its own completions, the best and the worst of each group."""
    explore: float = Field(0.0, ge=0)
    """Weight α of log π of the other policy's completion in a pair's loss, which drives the policy away from it (XPO,
    arXiv:2405.21046)."""

    function: ClassVar[str] = "rlpost.stages.online_dpo:online_dpo"

    _one_of_both = model_validator(mode="before")(one_of_both)

    def rules(self, where: str, earlier: Earlier) -> Iterator[str]:
        yield from super().rules(where, earlier)
        yield from loss_problems(self.loss, self.losses, where)
        if self.against is not None:
            yield from self.against_problems(where, earlier)
        elif self.group_size < 2:
            yield f"{where}.group_size: a pair needs two completions - give at least 2"
        if self.explore and self.against is None:
            yield f"{where}.explore: is of another policy's completions - give {where}.against, {{share: 1.0}}, or 0"
        if self.correction != Correction():
            yield f"{where}.correction: online_dpo learns from pairs, whatever sampled them - remove it"
        if self.kl.beta:
            yield (
                f"{where}.kl.beta: the loss of online_dpo holds to the reference by itself - use 0, and loss.args.beta"
            )
