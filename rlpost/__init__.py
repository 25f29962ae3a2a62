"""rlpost: one recipe through SFT, preference optimisation and reinforcement learning.

From Python: ``run = rlpost.train("recipe.yaml", ["seed=1"])``, ``rlpost.load(run.path).generate("47+38=")``. Nothing
heavy is imported before it is used.
"""

from __future__ import annotations

from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rlpost.api.generation import Generator, load
    from rlpost.api.run import Run, Score
    from rlpost.api.training import train
    from rlpost.errors import RlpostError
    from rlpost.types import Completion
else:
    from rlpost import train

    class _Train(ModuleType):
        """The package `rlpost.train`, which can be called too: importing a package binds its name here."""

        def __call__(self, *args: Any, **kwargs: Any) -> Run:
            from rlpost.api.training import train as run

            return run(*args, **kwargs)

    train.__class__ = _Train

__version__ = "0.1.0"
__all__ = ["Completion", "Generator", "RlpostError", "Run", "Score", "__version__", "load", "train"]
_WHERE = {
    "Completion": "rlpost.types",
    "Generator": "rlpost.api.generation",
    "RlpostError": "rlpost.errors",
    "Run": "rlpost.api.run",
    "Score": "rlpost.api.run",
    "load": "rlpost.api.generation",
}


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module 'rlpost' has no attribute {name!r}")
    return getattr(import_module(_WHERE[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
