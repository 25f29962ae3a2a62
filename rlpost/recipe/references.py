"""References `${key}` in a recipe: what they may be, and how much they amount to once they are filled in.

A recipe of a kilobyte whose variables name each other twice would fill the memory; it is refused before it is
filled in.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from fnmatch import fnmatchcase
from typing import Any

from rlpost.errors import RecipeError
from rlpost.recipe.keys import is_reference, join

MOST = 1_000_000
"""Characters that all references of a recipe may amount to together; each of them counts as COST beside its text."""
COST = 50
LONGEST = 20_000
"""Characters of a value with references."""
DEEPEST = 5
"""References inside one another, `${vars.${vars.name}}`."""
_INNERMOST = re.compile(r"\$\{([^${}]*)\}")


def references(value: Any, where: str = "") -> Iterator[tuple[str, str]]:
    """(key path, text) of every value with a reference in it."""
    if isinstance(value, dict | list):
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
            yield from references(inner, join(where, key))
    elif is_reference(value):
        yield where, value


def refuse_resolvers(tree: Any) -> None:
    """Refuse all but `${key}`: `${oc.env:TOKEN}` would be saved with the run, others change from run to run.

    Raises:
        RecipeError: a value names a resolver, is too long, or has too many references inside one another.
    """
    for where, text in references(tree):
        if len(text) > LONGEST:
            raise RecipeError(
                f"{where}: a value with references and more than {LONGEST} characters - put it into a file"
            )
        rest, before = text, ""
        for _ in range(DEEPEST + 1):
            rest, before = re.sub(r"\$\{[^${}:]*\}", "_", rest), rest
        if rest != before:
            raise RecipeError(
                f"{where}: references more than {DEEPEST} deep inside one another - name the value itself"
            )
        if re.search(r"(?<!\\)\$\{[^}]*$", rest):
            raise RecipeError(f"{where}: a reference is not closed - write ${{key}}, or \\${{ for the two characters")
        if re.search(r"\$\{[^}]*:", rest):
            env = "only names of environment variables go into recipes"
            raise RecipeError(f"{where}: {text!r} is refused - {env if 'env' in text else 'only ${key} is known'}")


def refuse_excess(tree: dict[str, Any]) -> None:
    """Refuse a recipe that would grow beyond all measure when its references are filled in.

    Raises:
        RecipeError: it does, or a reference leads back to itself.
    """
    measure = _Measure(tree)
    total = 0
    for where, text in references(tree):
        total += measure.of_text(text, where)
        if total > MOST:
            raise RecipeError(
                f"{where}: references amount to more than {MOST} characters - let variables repeat each other less"
            )


class _Measure:
    """How much a value amounts to when its references are filled in; each value is measured once."""

    def __init__(self, tree: dict[str, Any]) -> None:
        self._values: dict[str, Any] = {}
        self._known: dict[str, int] = {}
        self._open: list[str] = []
        self._enter(tree, "")

    def _enter(self, value: Any, where: str) -> None:
        self._values[where] = value
        if isinstance(value, dict | list):
            for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
                self._enter(inner, join(where, key))

    def of_text(self, text: str, where: str) -> int:
        size = len(text)
        while found := _INNERMOST.search(text):
            names = self._meant(found[1].strip(), where)
            size += COST + max((self._of(name) for name in names), default=0)
            value = self._values[names[0]] if len(names) == 1 else None
            # What stands inside another reference: a plain value, or what is not known yet, and may be any name.
            plain = isinstance(value, str | int) and not is_reference(value) and len(str(value)) <= 100
            text = f"{text[: found.start()]}{value if plain else '*'}{text[found.end() :]}"
        return size

    def _meant(self, name: str, where: str) -> list[str]:
        """The keys that a reference may mean; relative ones (`${.x}`) start from the mapping around `where`."""
        dots = len(name) - len(name.lstrip("."))
        parts = re.split(r"[.\[]", where)
        around = ".".join(parts[:-dots]) if dots else ""
        full = ".".join(filter(None, [around, name[dots:]]))
        if "*" in full:
            return [key for key in self._values if fnmatchcase(key, full) and key not in self._open]
        full = re.sub(r"\.(\d+)(?=[.\[]|$)", r"[\1]", full) if full not in self._values else full
        return [full] if full in self._values else []

    def _of(self, where: str) -> int:
        if where in self._known:
            return self._known[where]
        if where in self._open:
            circle = " -> ".join([*self._open[self._open.index(where) :], where][:6])
            raise RecipeError(f"{where}: refers to itself ({circle}) - give one of them a value")
        self._open.append(where)
        value = self._values[where]
        if isinstance(value, dict | list):
            keys = value if isinstance(value, dict) else range(len(value))
            size = sum(1 + self._of(join(where, key)) for key in keys)
        else:
            size = self.of_text(value, where) if is_reference(value) else len(str(value))
        self._open.pop()
        self._known[where] = size = min(size, 10 * MOST)
        return size
