"""A whole recipe. A stage's class is in specs/, a section's in the `params.py` of the package that it is for."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from pydantic import Field

from rlpost.engine.params import EngineChoice
from rlpost.evaluate.params import Evaluation
from rlpost.policy.params import Model
from rlpost.section import Section


class Recipe(Section):
    """A whole recipe."""

    description: str = ""
    """One line for `rlpost list`."""
    run: str
    """Name of the run directory: letters, digits, `.`, `_`, `-`; the recipe file's name by default."""
    runs: str = "runs"
    """Folder that holds run directories."""
    folder: str | None = None
    """What relative paths and `file.py:function` refer to: the recipe's own folder by default.
    A resolved recipe, which lies in its run, names the folder it came from."""
    seed: int = Field(0, ge=0, le=2**32 - 1)
    """Of everything random."""
    threads: int | None = Field(None, ge=1)
    """CPU threads (as torch chooses by default)."""
    vars: dict[str, Any] = Field(default_factory=dict)
    """The recipe's own variables, for `${vars.name}`."""
    model: Model = Field(default_factory=Model)
    """What all stages start from."""
    rollouts: EngineChoice = Field(default_factory=EngineChoice)
    """What samples, unless a stage or the evaluation says otherwise for itself."""
    stages: dict[str, Any] = Field(default_factory=dict)
    """Stages by name, in order; the name is the stage's directory, of letters, digits, `_` and `-`."""
    evaluation: Evaluation | None = None
    """Held-out evaluation."""

    def enabled(self) -> dict[str, Any]:
        """The stages that are not disabled."""
        return {name: stage for name, stage in self.stages.items() if stage.enabled}

    def sections(self) -> Iterator[tuple[str, Section]]:
        """The sections that are used, each with its key path: all but disabled stages."""
        yield "model", self.model
        yield "rollouts", self.rollouts
        yield from ((f"stages.{name}", stage) for name, stage in self.enabled().items())
        if self.evaluation is not None:
            yield "evaluation", self.evaluation
