"""Calls functions of data, rlpost's own and users', for many rows; errors become one line."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from rlpost.errors import DataError, RlpostError
from rlpost.usercode.calls import CallError, Failed, Remote

BATCH = 512
"""Calls sent to a user's process at a time."""


def each(function: Callable[..., Any], calls: Sequence[Mapping[str, Any]], names: Sequence[str]) -> Iterator[Any]:
    """The function's result for each call; `names` are for messages.

    Raises:
        DataError: a call failed.
    """
    remote = getattr(function, "call", function)
    if not isinstance(remote, Remote):
        for arguments, name in zip(calls, names, strict=True):
            yield _here(function, arguments, name)
        return
    for first in range(0, len(calls), BATCH):
        some = slice(first, first + BATCH)
        try:
            found = remote.each(calls[some])
        except CallError as error:
            raise DataError(f"{names[first]}: {error}") from error
        for value, name in zip(found, names[some], strict=False):
            if isinstance(value, Failed):
                slow = f"; raise its deadline ({remote.deadline:g} s)" if value.reason.startswith("ran for") else ""
                raise DataError(f"{name} {value.reason}{slow}") from value.error
            yield value


def _here(function: Callable[..., Any], arguments: Mapping[str, Any], name: str) -> Any:
    try:
        return function(**arguments)
    except RlpostError as error:
        raise type(error)(f"{name}: {error}") from error
    except Exception as error:
        message = " ".join(str(error).split())[:300]
        raise DataError(f"{name} failed with {type(error).__name__}: {message}") from error
