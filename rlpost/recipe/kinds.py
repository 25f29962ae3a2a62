"""The kinds of stages: those of specs/, each a module there and a class in it, and what each of them does."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable
from functools import cache
from pathlib import Path

from rlpost.recipe import specs
from rlpost.recipe.specs.common import Stage


@cache
def kinds() -> tuple[str, ...]:
    """The names of all kinds that come with rlpost."""
    return tuple(sorted(m.name for m in pkgutil.iter_modules(specs.__path__) if m.name != "common"))


def spec_of(kind: str) -> type[Stage]:
    """The class of a kind: `ProcessRewardModel` of specs/process_reward_model.py."""
    module = importlib.import_module(f"{specs.__name__}.{kind}")
    found: type[Stage] = getattr(module, "".join(word.capitalize() for word in kind.split("_")))
    return found


def function_of(stage: Stage) -> Callable[..., Path]:
    """What a stage does: (context, stage) -> the folder of its result."""
    module, _, name = stage.function.partition(":")
    found: Callable[..., Path] = getattr(importlib.import_module(module), name)
    return found
