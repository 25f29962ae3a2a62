"""Puts `key=value` overrides from the command line into a recipe's tree."""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import islice
from typing import Any

from rlpost.errors import RecipeError
from rlpost.recipe.references import is_reference
from rlpost.section import MISSING, join
from rlpost.suggest import hint_or_list, shortened

MAX_CHARACTERS = 20_000
MOST_VALUES = 1000
"""Of one key, in a sweep."""
_INTEGER = re.compile(r"-?(0|[1-9][0-9]{0,17})")
_FLOAT = re.compile(r"-?(0|[1-9][0-9]{0,9})(\.[0-9]{1,17})?(e-?[0-9]{1,2})?")
_TEXT = re.compile(r"[A-Za-z_/][A-Za-z0-9_/.-]*")
_NAMED = {"true": True, "false": False, "null": None}
_OF_THE_GRAMMAR = ("true", "false", "null", "nan", "inf")
_OWN_NAMES = {
    "stage": "stages",
    "variable": "vars",
    "source": r"(stages\.[^.]+(\.expert)?|evaluation|model\.tokenizer)\.data",
}
"""Things that a recipe names itself, and where: an override may change one, but not add one."""


def apply(tree: dict[str, Any], overrides: Sequence[str]) -> dict[str, str]:
    """Put the overrides into `tree`, in order; unknown keys are found later, when the tree is validated.

    Returns:
        The values as typed, by key path: where text is expected, `run=1` means the text "1".

    Raises:
        RecipeError: an override is malformed, or is of a stage, source or variable that the recipe does not have.
    """
    typed = {}
    for override in overrides:
        key, value = parse(override)
        _assign(tree, key, value)
        typed[key] = override.partition("=")[2]
    return typed


def parse(override: str) -> tuple[str, Any]:
    """Key and value of one override, in Hydra's grammar: `a.b=1`, `a=[1,2]`, `a={b: c}`, `a='x, y'`.

    Raises:
        RecipeError: it is no plain `key=value`.
    """
    key, text, shown = _parts(override)
    return key, _value(text, shown)


def alternatives(override: str) -> tuple[str, list[str] | None]:
    """Key and values of an override that may have several, in Hydra's grammar: `a=1,2`, `a=range(1,4)`.

    Returns:
        The values as text, in order; None if it has one value only, which is not parsed.

    Raises:
        RecipeError: it is malformed, its values cannot be listed (`interval(0,1)`), or one stands twice.
    """
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.core.override_parser.types import Transformer
    from hydra.errors import HydraException

    key, text, shown = _parts(override)
    try:
        parsed = OverridesParser.create().parse_overrides([f"value={text}"])[0]
    except (HydraException, RecursionError, ValueError):
        return key, None  # plain text, or wrong: `parse` says which
    if not parsed.is_sweep_override():
        return key, None
    try:
        # Beyond the limit, the rest is only counted by its absence.
        values = list(islice(map(_as_text, parsed.sweep_iterator(Transformer.encode)), MOST_VALUES + 1))
    except (HydraException, ZeroDivisionError) as error:
        raise RecipeError(f"{shown}: values that cannot be listed - write a=1,2 or a=range(1,4)") from error
    if len(values) > MOST_VALUES:
        raise RecipeError(f"{shown}: more than {MOST_VALUES} values")
    if not values:
        raise RecipeError(f"{shown}: no values")
    twice = [value for value in values if values.count(value) > 1]
    if twice:
        raise RecipeError(f"{shown}: {twice[0]} stands twice")
    return key, values


def _as_text(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    # 0.1 + 0.1 + 0.1, the last of range(0.1,0.35,0.1), is meant to be 0.3.
    return f"{value:.12g}" if isinstance(value, float) else str(value)


def written(key: str, value: Any) -> str | None:
    """`key=value`, as `parse` reads it; None where the grammar of overrides has no way to write the value."""
    text = f"{key}={_written(value)}"
    try:
        return text if parse(text) == (key, value) else None
    except RecipeError:
        return None


def _written(value: Any) -> str:
    if isinstance(value, dict):
        return "{" + ",".join(f"{key}:{_written(inner)}" for key, inner in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ",".join(map(_written, value)) + "]"
    if isinstance(value, str):
        from hydra.core.override_parser.types import Quote, QuotedString

        return QuotedString(value, Quote.single).with_quotes()
    if isinstance(value, bool):
        return "true" if value else "false"
    return "null" if value is None else repr(value)


def _parts(override: str) -> tuple[str, str, str]:
    """Key, value, and the override as a message shows it."""
    key, equals, text = override.partition("=")
    shown = shortened(" ".join(override.split()))
    if not equals:
        raise RecipeError(f"{shown}: expected key=value")
    if key[:1] in ("+", "~"):
        raise RecipeError(f"{shown}: '{key[0]}' is not needed and refused - write key=value")
    if re.match(r"hydra([./@]|$)", key):
        raise RecipeError(f"{shown}: hydra's own settings are refused")
    if not re.fullmatch(r"[\w-]+(\.[\w-]+|\[\d+\])*", key):
        raise RecipeError(f"{shown}: {shortened(repr(key))} is no key - write it like stages.sft.steps=100")
    if len(key) > MAX_CHARACTERS // 40:
        raise RecipeError(f"{shown}: no key is as long as that")
    if len(override) > MAX_CHARACTERS:
        raise RecipeError(f"{shortened(key)}: longer than {MAX_CHARACTERS} characters - put it into a recipe")
    return key, text, shown


def _value(text: str, shown: str) -> Any:
    # What parses Hydra's grammar takes 0.2 s to import: the values that most overrides have are read without it.
    if _INTEGER.fullmatch(text):
        return int(text)
    if _FLOAT.fullmatch(text):
        return float(text)
    if text in _NAMED:
        return _NAMED[text]
    if _TEXT.fullmatch(text) and text.lower() not in _OF_THE_GRAMMAR:
        return text
    return _parsed(text, shown)


def _parsed(text: str, shown: str) -> Any:
    """A value by Hydra's grammar."""
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.core.override_parser.types import OverrideType
    from hydra.errors import HydraException

    try:
        parsed = OverridesParser.create().parse_overrides([f"value={text}"])[0]
    except (HydraException, RecursionError, ValueError) as error:  # ValueError: a number of thousands of digits
        # Hydra's grammar has no place for ~, # and letters beyond ASCII: plain text all the same.
        if re.search(r"""[][{}'"$,\\\n]""", text):
            raise RecipeError(f"{shown}: the value cannot be read - quote it: key='\"...\"'") from error
        return text
    one = parsed.type is OverrideType.CHANGE and not parsed.is_sweep_override()
    value = parsed.value() if one else None
    if not one or not _plain(value):
        raise RecipeError(f"{shown}: expected one value - write a list as [a,b] and quote text with commas")
    return value


def _plain(value: object) -> bool:
    if isinstance(value, dict):
        return all(isinstance(k, str) and _plain(v) for k, v in value.items())
    if isinstance(value, list):
        return all(map(_plain, value))
    return value is None or isinstance(value, str | int | float | bool)


def _assign(tree: dict[str, Any], key: str, value: Any) -> None:
    """Set the last key, adding sections on the way that are not there yet."""
    parts = key.replace("[", ".").replace("]", "").split(".")
    node: Any = tree
    where = ""
    while True:
        name, parts = _step(node, where, parts)
        where = join(where, name)
        if not parts:
            break
        below = node.get(name) if isinstance(node, dict) else node[name]
        if below is None or below == MISSING:
            node[name] = below = {}
        if is_reference(below):
            raise RecipeError(
                f"{where}: is {shortened(repr(below))} in the recipe - change that key, or replace {where} as a whole"
            )
        if not isinstance(below, dict | list):
            raise RecipeError(f"{where}: a single value, there are no keys below it - give `{where}=VALUE`")
        node = below
    old = node.get(name) if isinstance(node, dict) else node[name]
    if isinstance(value, dict) and isinstance(old, dict):
        _merge(old, value)
    else:
        node[name] = value


def _merge(old: dict[Any, Any], new: dict[Any, Any]) -> None:
    for key, value in new.items():
        if isinstance(value, dict) and isinstance(old.get(key), dict):
            _merge(old[key], value)
        else:
            old[key] = value


def _step(node: Any, where: str, parts: list[str]) -> tuple[str | int, list[str]]:
    """The next key, and the rest of the path."""
    first, rest = parts[0], parts[1:]
    if isinstance(node, list):
        if not first.isdigit() or int(first) >= len(node):
            raise RecipeError(f"{join(where, first)}: {where} has {len(node)} entries, counted from 0")
        return int(first), rest
    what = next((what for what, places in _OWN_NAMES.items() if re.fullmatch(places, where)), "")
    if not what or first in node:
        return first, rest
    # Names of sources may hold dots: the longest name that is there wins.
    for n in range(len(parts), 1, -1):
        if ".".join(parts[:n]) in node:
            return ".".join(parts[:n]), parts[n:]
    raise RecipeError(
        f"{join(where, '.'.join(parts))}: the recipe has no {what} {first!r}"
        f"{hint_or_list(first, map(str, node), f'keys of {where}')}"
    )
