"""An expert's rows beside a policy's own samples: what a stage has of it in a recipe."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated

from pydantic import Field

from rlpost.data.params import DataRole, Direction, Source
from rlpost.recipe.rules import Earlier, source_problems
from rlpost.recipe.specs.sft import LOSS
from rlpost.section import Section
from rlpost.stages.params import Weight
from rlpost.usercode.params import Function
from rlpost.usercode.signatures import info_of


class ExpertWeight(Section):
    """μ, the share of the expert's rows in the loss; the stage's own has 1 − μ (CHORD, arXiv:2508.11408)."""

    peak: float = Field(0.1, ge=0, le=1)
    """Its largest value."""
    valley: float | None = Field(None, ge=0, le=1)
    """What it falls to; by default it stays at the peak."""
    warmup_steps: int = Field(0, ge=0)
    """Steps in which it rises from 0 to the peak."""
    decay_steps: int = Field(0, ge=0)
    """Steps in which it falls from there to the valley, along a cosine."""

    def problems(self, where: str) -> Iterator[str]:
        """Of a fall that is none."""
        if self.valley is not None and self.valley > self.peak:
            yield f"{where}.valley: {self.valley:g} is above peak={self.peak:g} - give at most that"
        if self.valley is None and self.decay_steps:
            yield f"{where}.valley: missing - what the weight falls to in {self.decay_steps} steps, such as 0.05"
        if self.valley is not None and self.valley != self.peak and not self.decay_steps:
            yield f"{where}.decay_steps: missing - the steps in which the weight falls to {self.valley:g}"


class Expert(Section):
    """Rows of an expert that are learned from in every update, beside the policy's own samples: one optimiser step on
    (1 − μ) times the stage's loss and μ times a supervised loss of these rows (CHORD, Zhang et al. 2025,
    arXiv:2508.11408)."""

    data: dict[str, Source] = Field(default_factory=dict)
    """Sources of rows by name, as an `sft` stage has them; at least one."""
    batch_size: int = Field(32, ge=1)
    """Rows an update."""
    loss: Annotated[Function, LOSS] = Field(default_factory=lambda: Function(fn="nll"))
    """The loss of a token of them; in `rlpost/objectives/supervised.py`, those that need no teacher."""
    weight: Weight = Weight.token_mean
    """How much each token of them counts."""
    mu: ExpertWeight = Field(default_factory=ExpertWeight)
    """μ, by the stage's steps."""

    def rows(self) -> DataRole:
        """Completions; with labels, where the loss asks for them."""
        return DataRole.labelled if info_of(self.loss, LOSS).takes("label_N") else DataRole.completions

    def rules(self, where: str, earlier: Earlier) -> Iterator[str]:
        """Of its sources, and of a loss that needs what there is not."""
        if not self.data:
            yield f"{where}.data: missing - name at least one source, like {{train: {{path: rows.jsonl}}}}"
        yield from source_problems(self.data, f"{where}.data", earlier)
        for name, source in self.data.items():
            if source.direction is Direction.reverse:
                yield f"{where}.data.{name}.direction: reverse is for sft - remove it"
        if info_of(self.loss, LOSS).takes("teacher_NV"):
            yield f"{where}.loss.fn: {self.loss.called} imitates a teacher, and here are rows alone - take another one"
