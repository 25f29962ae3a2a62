"""A function as a tool: what a model is told of it, and a call with arguments that a model wrote.

This runs where the function does: in the process of its file, or in the trainer's for rlpost's own. The model gives the
parameters that the recipe's `args` leave, by name; keyword-only ones are the recipe's alone.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial
from typing import Any, TypedDict, get_type_hints

from rlpost.errors import RlpostError

LONGEST_ERROR = 300
"""Characters of an error's message."""


class Result(TypedDict):
    """What came of a call, for the model."""

    text: str
    """What the tool returned, or what is wrong."""
    failed: bool


class UnfitError(Exception):
    """A function that cannot be a tool; its message says why, and what to do."""


class ToolHere:
    """A tool of rlpost, called in this process."""

    def __init__(
        self, function: Callable[..., Any], given: Mapping[str, Any], made: Callable[..., Any] | None = None
    ) -> None:
        """Of a function with its recipe's arguments; `made`, if any, is called instead, with those of the model."""
        self._function = function
        self._given = dict(given)
        self._made = partial(function, **given) if made is None else made

    def __call__(self, arguments: Mapping[str, Any]) -> Result:
        """Call it with a model's arguments."""
        return _called(self._function, self._made, arguments, frozenset(self._given))

    def schema(self) -> dict[str, Any]:
        """Its JSON schema, as a model is told of it."""
        return schema(self._function, self._given)


def schema(function: Callable[..., Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """The function's JSON schema, by transformers' `get_json_schema`, without the parameters in `given`.

    Raises:
        UnfitError: it has no docstring, or a parameter has no type, no description, or a type that JSON has not.
    """
    name = function.__name__
    if not (inspect.getdoc(function) or "").strip():
        raise UnfitError(f"{name} has no docstring, which tells a model what it does - write one")
    left = parameters(function, given)
    for p in left:
        if p.kind in (p.POSITIONAL_ONLY, p.VAR_POSITIONAL, p.VAR_KEYWORD):
            raise UnfitError(f"{name} takes {p}, but a model gives arguments by name - name each parameter")
        if p.annotation is p.empty:
            raise UnfitError(f"{name}: its parameter {p.name!r} has no type - annotate it, like `{p.name}: str`")
    try:
        with _without_torch() as get_json_schema:
            found: dict[str, Any] = get_json_schema(_stub(function, left))
    except Exception as error:  # the types are anybody's
        reason = " ".join(str(error).split())[:LONGEST_ERROR]
        raise UnfitError(
            f"{name}: {reason} - give types that JSON has, and a line for each parameter below `Args:`"
        ) from error
    return found


def parameters(function: Callable[..., Any], given: Mapping[str, Any]) -> list[inspect.Parameter]:
    """The parameters that are the model's to give."""
    every = inspect.signature(function).parameters.values()
    return [p for p in every if p.name not in given and p.kind is not p.KEYWORD_ONLY]


def call(function: Callable[..., Any], arguments: Mapping[str, Any], given: Mapping[str, Any]) -> Any:
    """A `Result`: of the function, or of its arguments where they do not fit; awaitable for a coroutine function.

    Arguments are converted to the parameters' types as pydantic does: "7" is an `int` too.
    """
    made = partial(function, **given)
    called = _called_together if inspect.iscoroutinefunction(function) else _called
    return called(function, made, arguments, frozenset(given))


def returned(found: Any) -> Result:
    """What a tool returned: text as it is, anything else as JSON.

    Raises:
        TypeError: it is not JSON.
    """
    text = found if isinstance(found, str) else json.dumps(found, ensure_ascii=False)
    return {"text": text.encode("utf-8", "replace").decode("utf-8"), "failed": False}


def failure(reason: str) -> Result:
    """What the model reads of a call that failed."""
    return {"text": f"Error: {reason}", "failed": True}


def _called(
    function: Callable[..., Any], made: Callable[..., Any], arguments: Mapping[str, Any], given: frozenset[str]
) -> Result:
    """Read arguments for `function`, and call `made` with them; what rlpost itself raises is none of the model's."""
    read = _read(function, arguments, given)
    if isinstance(read, Refused):
        return failure(read.reason)
    try:
        return returned(made(**read))
    except RlpostError:
        raise
    except (Exception, SystemExit) as error:
        return failure(_line(error))


async def _called_together(
    function: Callable[..., Any], made: Callable[..., Any], arguments: Mapping[str, Any], given: frozenset[str]
) -> Result:
    """The same for a coroutine function."""
    read = _read(function, arguments, given)
    if isinstance(read, Refused):
        return failure(read.reason)
    try:
        return returned(await made(**read))
    except (Exception, SystemExit) as error:
        return failure(_line(error))


@dataclass(frozen=True)
class Refused:
    """Arguments that do not fit."""

    reason: str


def _read(
    function: Callable[..., Any], arguments: Mapping[str, Any], given: frozenset[str]
) -> dict[str, Any] | Refused:
    try:
        return _reader(function, given)(**arguments)
    except Exception as error:  # pydantic's own, or that of a validator
        return Refused(_refused(error, function.__name__))


@cache
def _reader(function: Callable[..., Any], given: frozenset[str]) -> Callable[..., dict[str, Any]]:
    """Checks arguments against the types of the parameters that the model gives; defaults are filled in."""
    from pydantic import validate_call

    left = parameters(function, dict.fromkeys(given))
    return validate_call(_stub(function, [p.replace(kind=p.KEYWORD_ONLY) for p in left]))


def _stub(function: Callable[..., Any], left: list[inspect.Parameter]) -> Callable[..., dict[str, Any]]:
    """A function with the name, text and types of another, but only these parameters; it returns its arguments."""

    def stub(**arguments: Any) -> dict[str, Any]:
        return arguments

    hints = get_type_hints(function, include_extras=True)
    kept = {p.name: hints[p.name] for p in left if p.name in hints}
    stub.__name__, stub.__doc__, stub.__annotations__ = function.__name__, function.__doc__, kept
    typed = [p.replace(annotation=kept.get(p.name, p.annotation)) for p in left]
    stub.__signature__ = inspect.Signature(typed)  # type: ignore[attr-defined]
    return stub


@contextmanager
def _without_torch() -> Iterator[Callable[..., dict[str, Any]]]:
    """`get_json_schema`, which would import torch for the one type of it that it knows."""
    from transformers.utils import chat_template_utils as library

    asked = library.is_torch_available
    library.is_torch_available = lambda: False
    try:
        yield library.get_json_schema
    finally:
        library.is_torch_available = asked


def _refused(error: Exception, name: str) -> str:
    """Why arguments do not fit, in one line."""
    from pydantic import ValidationError

    if not isinstance(error, ValidationError):
        return f"arguments of {name}: {_line(error)}"
    wrong = []
    for one in error.errors(include_url=False, include_context=False, include_input=False):
        place = ".".join(str(part) for part in one["loc"])
        kind, message = one["type"], one["msg"]
        said = {"missing": "is missing", "unexpected": "there is no such parameter"}.get(kind.split("_")[0], message)
        wrong.append(f"{place}: {said}")
    return f"arguments of {name}: {'; '.join(wrong)}"[:LONGEST_ERROR]


def _line(error: BaseException) -> str:
    message = " ".join(str(error).split())
    return f"{type(error).__name__}: {message}"[:LONGEST_ERROR] if message else type(error).__name__
