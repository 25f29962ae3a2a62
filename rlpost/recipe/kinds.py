"""The kinds of stages: those of specs/, each a module there and a class in it, and users' own, from files of theirs."""

from __future__ import annotations

import hashlib
import importlib
import inspect
import pkgutil
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

from pydantic import PydanticUndefinedAnnotation, PydanticUserError

from rlpost.errors import RecipeError
from rlpost.recipe import specs
from rlpost.recipe.rules import Leaves
from rlpost.recipe.specs.common import Stage
from rlpost.suggest import hint_or_list
from rlpost.usercode import load
from rlpost.usercode.places import OF_FILE


@cache
def kinds() -> tuple[str, ...]:
    """The names of all kinds that come with rlpost."""
    return tuple(sorted(m.name for m in pkgutil.iter_modules(specs.__path__) if m.name != "common"))


def spec_of(kind: str, where: str = "kind") -> type[Stage]:
    """The class of a kind: `ProcessRewardModel` of specs/process_reward_model.py, or that of a user's own kind.

    Args:
        kind: the name of a kind, or `/folder/file.py:function`, whose second parameter is annotated with the class.
        where: its key path, for errors.

    Raises:
        RecipeError: the user's file cannot be loaded, or holds no such function or class.
    """
    if match := OF_FILE.fullmatch(kind):
        file = Path(match["file"])
        return _users_spec(file, hashlib.sha256(file.read_bytes()).hexdigest(), match["name"], where)
    module = importlib.import_module(f"{specs.__name__}.{kind}")
    found: type[Stage] = getattr(module, "".join(word.capitalize() for word in kind.split("_")))
    return found


def function_of(stage: Stage) -> Callable[..., Path]:
    """What a stage does: (context, stage) -> the folder of its result."""
    module, _, name = stage.function.partition(":")
    found: Callable[..., Path] = getattr(importlib.import_module(module), name)
    return found


@cache
def _users_spec(file: Path, digest: str, name: str, where: str) -> type[Stage]:
    try:
        module = load.load(file, digest)
    except (Exception, SystemExit) as error:
        raise RecipeError(f"{load.not_loaded(error, file)} ({where})") from error
    functions = load.public_functions(module)
    if name not in functions:
        raise RecipeError(f"{where}: no function {name!r} in {file}{hint_or_list(name, functions, 'it has')}")
    parameters = list(inspect.signature(functions[name]).parameters.values())
    spec: Any = parameters[1].annotation if len(parameters) == 2 else None
    if isinstance(spec, str):
        spec = getattr(module, spec, None)
    if not (isinstance(spec, type) and issubclass(spec, Stage)):
        raise RecipeError(
            f"{where}: {name} of {file} is no stage - write `def {name}(context, cfg: MyStage) -> Path`, with "
            "MyStage a class of the same file that derives from Training, say"
        )
    try:
        spec.model_rebuild()
    except (PydanticUserError, PydanticUndefinedAnnotation) as error:
        problem = str(error).splitlines()[0].rstrip(".")
        raise RecipeError(f"{where}: {spec.__name__} of {file}: {problem} - mend that key's type") from error
    about: dict[str, Any] = {"function": f"{module.__name__}:{name}", "file": (str(file), digest)}
    if isinstance(spec.leaves, str):
        if spec.leaves not in (known := [str(leaves) for leaves in Leaves]):
            near = hint_or_list(spec.leaves, known, "there are")
            raise RecipeError(f"{where}: {spec.__name__}.leaves: {spec.leaves!r}{near}")
        about["leaves"] = Leaves(spec.leaves)
    return type(spec.__name__, (spec,), {"__module__": spec.__module__, **about})
