"""Learning from completions that are each desirable or not."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, ClassVar

from pydantic import Field

from rlpost.data.params import DataRole
from rlpost.recipe.rules import Earlier
from rlpost.recipe.specs.common import Offline
from rlpost.usercode.params import Function, Lookup

LOSS = Lookup("kto.loss", "rlpost.objectives.unpaired", ("unpaired",), returns="elements")


class Kto(Offline):
    """Learning from completions that are each desirable or not, without pairs. Rows are `prompt, completion, label`."""

    kind: str = "kto"
    batch_size: int = Field(32, ge=2)
    """Rows an update."""
    loss: Annotated[Function, LOSS] = Field(default_factory=lambda: Function(fn="kto"))
    """The loss of a completion; in `rlpost/objectives/unpaired.py`."""
    reference: str = "start"
    """The reference model: `start` (where this stage begins), `base`, or an earlier stage that trains."""

    function: ClassVar[str] = "rlpost.stages.kto:kto"
    measured = ("loss", "desirable_logratio", "undesirable_logratio", "z")

    def rows(self) -> DataRole:
        """Completions with labels."""
        return DataRole.labelled

    def rules(self, where: str, earlier: Earlier) -> Iterator[str]:
        yield from super().rules(where, earlier)
        yield from earlier.no_policy(self.reference, f"{where}.reference", ("start", "base"))
