"""What an advantage reads in a column of the rows: a number, or a value that rows have in common."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from typing import Any

from rlpost.errors import DataError
from rlpost.suggest import hint_or_list


def value_in(example: Mapping[str, Any], column: str, where: str) -> Any:
    """What stands in a column of a row; `where` the recipe names it, for errors.

    Raises:
        DataError: there is no such column.
    """
    if column not in example:
        raise DataError(f"{where}: a row has no column {column!r}{hint_or_list(column, map(str, example), 'it has')}")
    return example[column]


def role_in(example: Mapping[str, Any], column: str, where: str) -> str:
    """The value in a column as JSON, so that 1, true and "1" are three roles; errors as of `value_in`."""
    return json.dumps(value_in(example, column, where), sort_keys=True, default=str)


def number_in(example: Mapping[str, Any], column: str, where: str) -> float:
    """The number in a column of a row.

    Raises:
        DataError: there is no such column, or something else stands in it.
    """
    found = value_in(example, column, where)
    if isinstance(found, bool) or not isinstance(found, int | float) or not math.isfinite(found):
        raise DataError(f"{where}: {column!r} is {found!r} in a row - give a number")
    return float(found)


READS: dict[str, tuple[str, Callable[[Mapping[str, Any], str, str], object]]] = {
    "by": ("running_mean_P", role_in),
    "column": ("column_P", number_in),
}
"""Argument of an advantage that names a column -> (what the function is given of it, what reads a row)."""
