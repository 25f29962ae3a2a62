"""A whole recipe. A stage's class is in specs/, a section's in the `params.py` of the package that it is for."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from pydantic import Field

from rlpost.engine.params import EngineChoice
from rlpost.evaluate.params import Evaluation
from rlpost.policy.params import Model
from rlpost.section import Section
from rlpost.trackers.params import Logging
from rlpost.train.params import Parallel


class Recipe(Section):
    """A whole recipe."""

    description: str = ""
    """One line for `rlpost list`."""
    run: str
    """Name of the run directory: letters, digits, `.`, `_` and `-`; by default the recipe's file name without its
    ending."""
    runs: str = "runs"
    """The folder that holds run directories."""
    folder: str | None = None
    """What relative paths and `file.py:function` refer to: the recipe's own folder by default. A resolved recipe, which
    lies in its run, names the folder it came from."""
    seed: int = Field(0, ge=0, le=2**32 - 1)
    """Seed of everything random."""
    threads: int | None = Field(None, ge=1)
    """CPU threads; by default as torch chooses."""
    parallel: Parallel = Field(default_factory=Parallel)
    """How many processes share the work of `train`, `eval` and `pairs`."""
    vars: dict[str, Any] = Field(default_factory=dict)
    """The recipe's own variables, for `${vars.name}`."""
    model: Model = Field(default_factory=Model)
    """The model that all stages start from."""
    rollouts: EngineChoice = Field(default_factory=EngineChoice)
    """What samples completions, unless a stage or the evaluation has its own `rollouts`."""
    stages: dict[str, Any] = Field(default_factory=dict)
    """Stages by name, in order. A name is the stage's directory: letters, digits, `_` and `-`, but not `base`,
    `start`, `evaluation` or `trackers`."""
    logging: Logging = Field(default_factory=Logging)
    """Trackers that mirror the run; none by default."""
    evaluation: Evaluation | None = None
    """Held-out evaluation; without it there is none."""

    def enabled(self) -> dict[str, Any]:
        """The stages that are not disabled."""
        return {name: stage for name, stage in self.stages.items() if stage.enabled}

    def sections(self) -> Iterator[tuple[str, Section]]:
        """The sections that are used, each with its key path: all but disabled stages."""
        yield "model", self.model
        yield "rollouts", self.rollouts
        yield "logging", self.logging
        yield "parallel", self.parallel
        yield from ((f"stages.{name}", stage) for name, stage in self.enabled().items())
        if self.evaluation is not None:
            yield "evaluation", self.evaluation
