"""The recipe as dataclasses: a key in YAML is a field of one, and nothing else is a key.

A stage's class is in specs/, a section's in the `params.py` of the package that it is for.
"""

from dataclasses import dataclass, field
from typing import Any, Optional

from omegaconf import MISSING

from rlpost.engine.params import EngineChoice
from rlpost.evaluate.params import Evaluation
from rlpost.key import key
from rlpost.policy.params import Model

# OmegaConf reads these annotations and refuses `X | None` of dataclasses in places: hence Optional.
# ruff: noqa: UP045


@dataclass
class Recipe:
    """A whole recipe."""

    description: str = ""
    run: str = MISSING
    """Name of the run directory."""
    runs: str = "runs"
    """Folder that holds run directories."""
    folder: Optional[str] = None
    """What relative paths and `file.py:function` refer to: the recipe's own folder by default.
    A resolved recipe, which lies in its run, names the folder it came from."""
    seed: int = key(0, ge=0, le=2**32 - 1)
    threads: Optional[int] = key(None, ge=1)
    """CPU threads (as torch chooses by default)."""
    vars: dict[str, Any] = field(default_factory=dict)
    """The recipe's own variables, for `${vars.name}`."""
    model: Model = field(default_factory=Model)
    rollouts: EngineChoice = field(default_factory=EngineChoice)
    """What samples, unless a stage or the evaluation says otherwise for itself."""
    stages: dict[str, Any] = field(default_factory=dict)
    """Stages by name, in order; the name is the stage's directory."""
    evaluation: Optional[Evaluation] = None
