"""Plain trees against the schema: unknown keys, wrong shapes and types, by full key path.

OmegaConf converts values too, but names a key inside a list by its last part only and knows no suggestions.
"""

from __future__ import annotations

import re
import types
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, is_dataclass
from enum import Enum
from functools import cache
from typing import Any, Union, get_args, get_origin, get_type_hints

from rlpost.errors import RecipeError
from rlpost.recipe.kinds import kinds, spec_of
from rlpost.recipe.places import OF_FILE
from rlpost.recipe.schema import Recipe
from rlpost.recipe.specs.common import Stage
from rlpost.suggest import closest, hint

MISSING = "???"
TRUE = ("true", "yes", "on", "y", "1")
MOST_STAGES = 100
_DIGITS = 100
_LARGEST = 10**_DIGITS
FALSE = ("false", "no", "off", "n", "0")


@dataclass(frozen=True)
class Shape:
    """What a field holds."""

    base: Any
    """A dataclass, `dict`, `list`, `tuple`, an Enum, a scalar type or Any."""
    items: tuple[Any, ...] = ()
    """Types of what a dict, list or tuple holds."""
    optional: bool = False


@cache
def shape(annotation: Any) -> Shape:
    """The shape behind an annotation: `Optional[Lora]` is `Shape(Lora, (), True)`."""
    origin, args = get_origin(annotation), get_args(annotation)
    if origin in (Union, types.UnionType):
        (inner,) = (a for a in args if a is not type(None))
        found = shape(inner)
        return Shape(found.base, found.items, True)
    if origin is dict:
        return Shape(dict, (args[1],))
    if origin in (list, tuple):
        return Shape(origin, args)
    return Shape(annotation)


@cache
def fields_of(cls: type) -> dict[str, Any]:
    """Annotations of a dataclass by field, in order."""
    hints = get_type_hints(cls)
    return {f.name: hints[f.name] for f in fields(cls)}


def join(where: str, key: object) -> str:
    """The full path of `key` below `where`; a number is a place in a list."""
    if isinstance(key, int):
        return f"{where}[{key}]"
    return f"{where}.{key}" if where else str(key)


def is_reference(value: object) -> bool:
    """Whether a value is filled in from elsewhere, as `${vars.x}` is."""
    return isinstance(value, str) and "${" in value


def kinds_of(tree: Mapping[str, Any]) -> dict[str, type[Stage]]:
    """Each stage's dataclass by the stage's name, from the `kind` in the recipe.

    Raises:
        RecipeError: a stage is no mapping, or its kind is missing or unknown.
    """
    stages = tree.get("stages") or {}
    _expect(isinstance(stages, dict), "stages", "stages by name", stages)
    if len(stages) > MOST_STAGES:
        raise RecipeError(f"stages: {len(stages)} of them - at most {MOST_STAGES}; start the next recipe from the last")
    found: dict[str, type[Stage]] = {}
    for name, stage in stages.items():
        _expect(isinstance(name, str), "stages", "names as keys (put it in quotes)", name)
        where = join("stages", name)
        if stage is None:
            raise RecipeError(f"{where}: empty - to leave a stage out, give `{where}.enabled=false`")
        _expect(isinstance(stage, dict), where, "the keys of a stage", stage)
        kind = stage.get("kind", MISSING)
        if kind == MISSING:
            misspelt = closest("kind", (str(k) for k in stage))
            also = f" (is {misspelt!r} meant for it?)" if misspelt else ""
            raise RecipeError(f"{where}.kind: missing - give one of {', '.join(kinds())}{also}")
        if kind not in kinds() and not (isinstance(kind, str) and OF_FILE.fullmatch(kind)):
            raise RecipeError(
                f"{where}.kind: expected one of {', '.join(kinds())}, got {kind!r}{hint(str(kind), kinds())}"
            )
        found[name] = spec_of(kind, f"{where}.kind")
        if kind not in kinds():
            _refuse_unreadable(found[name], f"{where}.kind")
    return found


def _refuse_unreadable(spec: Any, where: str) -> None:
    """Refuse a user's class with a key that no recipe could give."""
    try:
        for key, annotation in fields_of(spec).items():
            if not _is_readable(annotation):
                shown = str(annotation).replace("typing.", "")
                raise RecipeError(
                    f"{where}: {spec.__name__}.{key}: {shown} - a key holds text, a number, true or false, an enum, a "
                    "dataclass, a list or a mapping of these, or Optional of one"
                )
    except NameError as error:
        raise RecipeError(f"{where}: {spec.__name__}: {error} - import it at the top of the file") from error


def _is_readable(annotation: Any) -> bool:
    if get_origin(annotation) in (Union, types.UnionType) and len(set(get_args(annotation)) - {type(None)}) != 1:
        return False
    found = shape(annotation)
    if found.items:
        return all(map(_is_readable, found.items))
    plain = found.base in (Any, bool, int, float, str, dict, list)
    return plain or (isinstance(found.base, type) and (is_dataclass(found.base) or issubclass(found.base, Enum)))


class Keys:
    """The valid keys of one recipe, whose stages have the given dataclasses."""

    def __init__(self, tree: dict[str, Any]) -> None:
        self.tree = tree
        self.kinds = kinds_of(tree)

    def child(self, where: str, key: object, annotation: Any) -> Any:
        """What is expected at `key` below `where`, where `annotation` is expected."""
        if where == "stages":
            return self.kinds.get(str(key), Stage)
        found = shape(annotation)
        if is_dataclass(found.base):
            return fields_of(found.base)[str(key)]  # type: ignore[arg-type]
        if not found.items:
            return Any
        return found.items[key] if found.base is tuple and isinstance(key, int) else found.items[0]

    def paths(self) -> list[str]:
        """Every key path that the schema knows, with this recipe's own stages and sources."""
        return list(self._paths(Recipe, self.tree, ""))

    def _paths(self, annotation: Any, value: Any, where: str) -> Iterator[str]:
        found = shape(annotation)
        if is_dataclass(found.base):
            names: list[Any] = list(fields_of(found.base))  # type: ignore[arg-type]
        elif isinstance(value, dict) and (found.items or where in ("stages", "vars")):
            names = list(value)
        elif isinstance(value, list) and found.base is list:
            names = list(range(len(value)))
        else:
            return
        for name in names:
            path = join(where, name)
            yield path
            inner = _at(value, name)
            yield from self._paths(self.child(where, name, annotation), inner, path)

    def unknown(self, where: str, key: str, options: list[str], rest: str = "") -> RecipeError:
        """The error for a key that `options`, the keys at `where`, do not hold."""
        near = closest(key, options)
        elsewhere = [p for p in self.paths() if re.split(r"[.]", p)[-1] == key]
        elsewhere.sort(key=lambda path: not path.startswith(where))
        likely = [join(where, near) + rest] if near else []
        likely += [path + rest for path in elsewhere[: 2 if near else 3]]
        full = join(where, key) + rest
        if likely:
            return RecipeError(f"{full}: unknown key - did you mean {' or '.join(map(repr, likely))}?")
        listed = f"keys of {where}" if where else "keys"
        return RecipeError(f"{full}: unknown key ({listed}: {', '.join(options) or 'none'})")

    def check(self) -> None:
        """Refuse whatever in the tree the schema does not expect.

        Raises:
            RecipeError: an unknown key, a wrong shape or a wrong type.
        """
        self._check(Recipe, self.tree, "")

    def _check(self, annotation: Any, value: Any, where: str) -> None:
        found = shape(annotation)
        if found.base is Any or value == MISSING or is_reference(value):
            return
        if value is None:
            if not found.optional:
                raise RecipeError(f"{where}: needs a value - it is empty")
        elif is_dataclass(found.base):
            self._check_keys(annotation, value, where)
        elif found.base is dict:
            _expect(isinstance(value, dict), where, "names with values, like {name: value}", value)
            for name, inner in value.items():
                _expect(isinstance(name, str), where, "names as keys (put it in quotes)", name)
                self._check(self.child(where, name, annotation), inner, join(where, name))
        elif found.base in (list, tuple):
            _expect(isinstance(value, list), where, "a list, like [..., ...]", value)
            if found.base is tuple:
                _expect(len(value) == len(found.items), where, f"{len(found.items)} values", value)
            for i, inner in enumerate(value):
                self._check(self.child(where, i, annotation), inner, join(where, i))
        else:
            _check_scalar(found.base, value, where)

    def _check_keys(self, annotation: Any, value: Any, where: str) -> None:
        options = list(fields_of(shape(annotation).base))
        example = f"keys, like {{{options[0]}: {value if isinstance(value, str) else '...'}}}"
        _expect(isinstance(value, dict), where, example, value)
        for key, inner in value.items():
            if key not in options:
                raise self.unknown(where, str(key), options)
            self._check(self.child(where, key, annotation), inner, join(where, key))


def _at(value: Any, name: Any) -> Any:
    return value.get(name) if isinstance(value, dict) else value[name] if isinstance(value, list) else None


def _expect(holds: bool, where: str, what: str, value: object) -> None:
    if not holds:
        raise RecipeError(f"{where or 'recipe'}: expected {what}, got {_shown(value)}")


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _check_scalar(base: Any, value: Any, where: str) -> None:
    if isinstance(base, type) and issubclass(base, Enum):
        options = [member.value for member in base]
        if value not in options:
            word = str(value)
            raise RecipeError(
                f"{where}: expected one of {', '.join(options)}, got {_shown(value)}{hint(word, options)}"
            )
    elif base is bool:
        _expect(isinstance(value, bool) or str(value).lower() in TRUE + FALSE, where, "true or false", value)
    elif base is str:
        _expect(isinstance(value, str | int | float), where, "text", value)
        _expect(type(value) not in (bool, float), where, "text (put it in quotes)", value)
    else:
        what = "a whole number" if base is int else "a number"
        numeric = isinstance(value, int | float | str) and not isinstance(value, bool)
        _expect(numeric and not (base is int and isinstance(value, float)), where, what, value)
        _expect(not isinstance(value, int) or abs(value) < _LARGEST, where, f"{what} of fewer digits", value)
        if isinstance(value, str):
            pattern = r"[-+]?\d+" if base is int else r"[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?"
            fits = len(value) <= _DIGITS and re.fullmatch(pattern, value.strip(), re.ASCII) is not None
            _expect(fits, where, what, value)
