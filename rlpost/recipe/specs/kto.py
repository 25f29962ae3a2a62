"""Learning from completions that are each desirable or not."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from rlpost.data.params import Need
from rlpost.key import key
from rlpost.recipe.rules import Earlier
from rlpost.recipe.specs.common import Training
from rlpost.usercode.params import Function, Lookup

LOSS = Lookup("kto.loss", "rlpost.objectives.unpaired", ("unpaired",), returns="elements")


@dataclass
class Kto(Training):
    """Learning from completions that are each desirable or not, without pairs."""

    kind: str = "kto"
    batch_size: int = key(32, ge=2)
    """Rows an update."""
    loss: Function = key(factory=lambda: Function("kto"), lookup=LOSS)
    reference: str = "start"
    """`start` (where this stage begins), `base`, or an earlier stage by name."""

    function: ClassVar[str] = "rlpost.stages.kto:kto"

    def rows(self) -> Need:
        """Completions with labels."""
        return Need.labelled

    def problems(self, where: str, earlier: Earlier) -> Iterator[str]:
        """Those of training, and of the reference."""
        yield from super().problems(where, earlier)
        yield from earlier.no_policy(self.reference, f"{where}.reference", ("start", "base"))
