"""A recipe's functions from files of its user: looked at in a process of their own, and called there where they can be.

Losses, advantages and modifiers need gradients, and a reward that asks for a model needs the model: these are called
here, and what goes wrong in them is a message of one line.
"""

from __future__ import annotations

import hashlib
import inspect
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from rlpost.engine.params import ENGINE
from rlpost.errors import EngineError, RecipeError, RewardError, RlpostError
from rlpost.usercode import calls, load
from rlpost.usercode.calls import DEADLINE, CallError, Remote
from rlpost.usercode.params import Function, Lookup


class UsersFile:
    """A user's file, described by the process that ran it.

    Raises:
        RecipeError: it cannot be loaded.
    """

    def __init__(self, file: Path, where: str, function: Function) -> None:
        self._file = file
        self._where = where
        self._function = function
        self.digest = hashlib.sha256(file.read_bytes()).hexdigest()
        self._given = getattr(function, "deadline", None)
        self._deadline = DEADLINE if self._given is None else float(self._given)
        try:
            self._described = calls.describe(file, self.digest, max(calls.LOADING, self._given or 0.0))
        except CallError as error:
            raise RecipeError(f"{error} ({where})") from error
        self.functions: Mapping[str, Remote] = {
            name: Remote(file, self.digest, name, {}, one, self._deadline) for name, one in self._described.items()
        }

    def bound(self, found: Any, lookup: Lookup, where: str) -> Callable[..., Any]:
        """The function with its arguments applied, called apart or here as its key asks.

        Raises:
            RecipeError: it is called here, and has a deadline or a policy for failures; or it does not load here; or it
                cannot be a tool.
        """
        args = self._function.args
        if lookup.by_model:
            return self._tool(found.__name__, f"{where}.{lookup.key}")
        if lookup.apart and "model" not in inspect.signature(found).parameters:
            described = self._described[found.__name__]
            return Remote(self._file, self.digest, found.__name__, args, described, self._deadline)
        if found.together:
            raise RecipeError(
                f"{where}.{lookup.key}: {found.__name__!r} is `async def`, but this process calls it and waits - "
                "write it with `def`"
            )
        for key in ("deadline", "on_failure"):
            if getattr(self._function, key, None) is not None:
                raise RecipeError(
                    f"{where}.{key}: {found.__name__!r} asks a model, so it runs in this process and cannot be ended "
                    "- remove it"
                )
        calls.unneeded(self._file, self.digest)
        try:
            module = load.load(self._file, self.digest)
        except (Exception, SystemExit) as error:
            raise RecipeError(f"{load.not_loaded(error, self._file)} ({self._where})") from error
        return Here(load.public_functions(module)[found.__name__], args, self._file, lookup, where)

    def _tool(self, name: str, where: str) -> Remote:
        about = self._file, self.digest, name, self._function.args, self._described[name]
        try:
            Remote(*about, max(calls.LOADING, self._deadline), tool=True).schema()  # it imports a library
        except CallError as error:
            raise RecipeError(f"{where}: {error} ({self._file})") from error
        return Remote(*about, self._deadline, tool=True)


class Here:
    """A user's function called in this process; an exception, or a wrong return value, becomes a message."""

    def __init__(
        self, function: Callable[..., Any], args: Mapping[str, Any], file: Path, lookup: Lookup, where: str
    ) -> None:
        self._function = function
        self._args = dict(args)
        self._file = file
        self._lookup = lookup
        self.facts = getattr(function, "facts", {})
        self._where = where
        self.__name__ = function.__name__
        signature = inspect.signature(function)
        left = [p for p in signature.parameters.values() if p.name not in args]
        self.__signature__ = signature.replace(parameters=left)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call it.

        Raises:
            RewardError: it raised, or returned something of a wrong kind.
            EngineError: it raised, and is to make an engine.
        """
        try:
            found = self._function(*args, **kwargs, **self._args)
        except RlpostError:
            raise
        except (Exception, SystemExit) as error:
            if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
                raise
            kind = EngineError if self._lookup is ENGINE else RewardError
            raise kind(
                f"{self._where}: {self.__name__} {load.raised(error, self._file)} - mend the function"
            ) from error
        if wrong := self._wrong(found, [*args, *kwargs.values()]):
            raise RewardError(f"{self._where}: {self.__name__} returned {wrong} ({self._file})")
        return found

    def _wrong(self, found: Any, given: list[Any]) -> str:
        """What is wrong with what it returned."""
        if not self._lookup.returns:
            return ""
        if self._lookup.returns == "the same":
            kind = type(given[0])
            return "" if type(found) is kind else f"{_kind(found)} - return {kind.__name__}"
        torch: Any = sys.modules["torch"]
        tensors = [x for x in given if isinstance(x, torch.Tensor)]
        if not isinstance(found, torch.Tensor):
            return f"{_kind(found)} - return a tensor"
        if self._lookup.returns == "tensor":
            return ""
        if found.ndim != 1:
            shape = tuple(found.shape)
            return f"a tensor of shape {shape} - return one number for each element, [N], and not their sum or mean"
        if tensors and len(found) != len(tensors[0]):
            return f"{len(found)} numbers for {len(tensors[0])} elements - return one for each"
        learns = torch.is_grad_enabled() and any(x.requires_grad for x in tensors)
        return "a tensor without a gradient - compute it from what it is given" if learns > found.requires_grad else ""


def _kind(value: object) -> str:
    return "None" if value is None else f"a {type(value).__name__}"
