"""Maps columns to the roles that a format needs."""

from __future__ import annotations

import string
from collections.abc import Mapping
from typing import Any

from rlpost.errors import DataError, RecipeError
from rlpost.suggest import hint

Row = dict[str, Any]


class Naming:
    """Adds the roles of `columns` to a row: role -> a column, or a template with {column} in braces.

    All roles are made from the original row; the other columns stay, since rewards may read them.
    """

    def __init__(self, columns: Mapping[str, str], where: str) -> None:
        """Read the templates; raises RecipeError where one is malformed."""
        self._where = where
        self._roles = [(role, value, _parse(value, f"{where}.{role}")) for role, value in columns.items()]

    def __call__(self, row: Row, location: str) -> Row:
        """A new row with the roles; `location` is for messages.

        Raises:
            DataError: it lacks a column.
        """
        made = {r: _fill(row, value, parts, f"{self._where}.{r}: {location}") for r, value, parts in self._roles}
        return {**row, **made}


def missing(column: str, row: Mapping[str, Any]) -> str:
    """The message about a missing column: "has no 'completion' (columns: prompt, answer)"."""
    columns = [str(c) for c in row]
    return f"has no {column!r} (columns: {', '.join(columns) or 'none'}){hint(column, columns)}"


def _parse(value: str, where: str) -> list[tuple[str, str | None]]:
    """[(text, column after it)] of a template; column names in braces are taken literally.

    Attributes, indices, conversions and formats are refused: a template names columns and does nothing else.
    """
    try:
        parsed = list(string.Formatter().parse(value))
    except ValueError as error:
        raise RecipeError(f"{where}: {value!r} is not a template ({error}): double a literal brace") from error
    parts: list[tuple[str, str | None]] = []
    for text, column, form, conversion in parsed:
        if column is not None and (not column or form or conversion or set(column) & set(".[]{}")):
            raise RecipeError(f"{where}: {value!r} may hold plain column names in braces, like {{question}}")
        parts.append((text, column))
    return parts


def _fill(row: Mapping[str, Any], value: str, parts: list[tuple[str, str | None]], location: str) -> Any:
    if all(column is None for _, column in parts):
        if value not in row:
            raise DataError(f"{location} {missing(value, row)}")
        return row[value]
    filled = ""
    for text, column in parts:
        filled += text
        if column is None:
            continue
        if column not in row:
            raise DataError(f"{location} {missing(column, row)}")
        if not isinstance(row[column], str | int | float):
            raise DataError(f"{location}: column {column!r} is neither text nor a number: it cannot go into a template")
        filled += str(row[column])
    return filled
