"""Supervised fine-tuning."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, ClassVar

from pydantic import Field

from rlpost.data.params import DataRole, Direction
from rlpost.recipe.rules import Earlier, Leaves
from rlpost.recipe.specs.common import Offline
from rlpost.section import Local
from rlpost.stages.params import Weight
from rlpost.usercode.params import Function, Lookup
from rlpost.usercode.signatures import info_of

LOSS = Lookup(
    "sft.loss",
    "rlpost.objectives.supervised",
    ("logp_N", "logp_NV", "teacher_NV", "target_N", "label_N"),
    by_name=True,
    some=True,
    returns="elements",
)


class Sft(Offline):
    """Supervised fine-tuning: maximise the likelihood of completions, or imitate a teacher's distributions."""

    kind: str = "sft"
    batch_size: int = Field(32, ge=1)
    """Rows an update."""
    loss: Annotated[Function, LOSS] = Field(default_factory=lambda: Function(fn="nll"))
    """The loss of a token; in `rlpost/objectives/supervised.py`."""
    weight: Weight = Weight.token_mean
    """How much each token counts."""
    teacher: Annotated[str | None, Local()] = None
    """For losses that ask for a teacher: a model of the same tokenizer, by stage, checkpoint, folder or hub name."""

    function: ClassVar[str] = "rlpost.stages.sft:sft"

    @property
    def leaves(self) -> Leaves:  # type: ignore[override]
        """A policy, or from reversed text a model that is none."""
        reverse = any(source.direction is Direction.reverse for source in self.data.values())
        return Leaves.reverse if reverse else Leaves.policy

    def rows(self) -> DataRole:
        """Completions; with labels, where the loss asks for them."""
        return DataRole.labelled if info_of(self.loss, LOSS).takes("label_N") else DataRole.completions

    def eval_metrics(self) -> tuple[str, ...]:
        """With labels also the likelihood of what is to be avoided."""
        more = ("unsaid_nll",) if self.rows() is DataRole.labelled else ()
        return ("loss", "nll", *more) if self.eval_data else ()

    def rules(self, where: str, earlier: Earlier) -> Iterator[str]:
        yield from super().rules(where, earlier)
        if self.teacher is None and info_of(self.loss, LOSS).takes("teacher_NV"):
            name = self.loss.called
            yield f"{where}.teacher: missing - {name} imitates a teacher: name a stage, a checkpoint or a model"
        if self.teacher in earlier.all:
            yield from earlier.no_policy(self.teacher, f"{where}.teacher", ("base",))

    def _direction_problems(self, where: str) -> Iterator[str]:
        turned = [name for name, source in self.data.items() if source.direction is Direction.reverse]
        if turned and len(turned) < len(self.data):
            yield (
                f"{where}.{turned[0]}.direction: a model reads one way - give all sources of the stage the same "
                "direction"
            )
