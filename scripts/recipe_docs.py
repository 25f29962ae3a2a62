"""The reference in docs/recipes.md, written from the specs: a table for each section and kind of stage.

    python scripts/recipe_docs.py    # writes what stands below "## Reference"

Types, defaults and descriptions come from the classes (see recipe_keys.py), other toolkits' names from docs/peers.yaml.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args, get_origin

import yaml
from peers import PEERS, TABLE, names_in
from recipe_keys import Key, bases, choices, own_keys, sections, summary, write

from rlpost.recipe.kinds import kinds, spec_of
from rlpost.recipe.schema import Recipe
from rlpost.recipe.specs.common import Stage
from rlpost.rewards.params import REWARD
from rlpost.section import Choice, Local, Section
from rlpost.usercode.binding import offered
from rlpost.usercode.params import Lookup

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "recipes.md"
HEADING = "## Reference\n"
TITLES = ("TRL", "verl", "OpenRLHF")
PLAIN = {str: "text", bool: "true or false", int: "whole number", float: "number", Any: "anything"}
INTRODUCTION = """
<!-- Written by scripts/recipe_docs.py: change the specs or docs/peers.yaml instead, and run it. -->

A type ending in `?` may be `null`; a default of "required" means that the recipe has to give the key. The last columns
name the nearest thing in TRL {trl} (for PPO and process reward models: in TRL 1.12), verl {verl} and
OpenRLHF {openrlhf}: a hint for those who come from there, since units and defaults differ.
"""


def page() -> str:
    """The whole page: what is written by hand, and the reference."""
    by_hand = PAGE.read_text("utf-8").partition(HEADING)[0]
    return by_hand + HEADING + reference()


def reference() -> str:
    """The reference."""
    peers = yaml.safe_load(TABLE.read_text("utf-8"))
    parts = [INTRODUCTION.format(**peers["versions"])]
    for section in sections():
        parts.append("\n".join(_section(section, peers["sections"].get(section.__name__, {}))))
    parts.append("\n".join(_arguments(peers["arguments"])))
    return "\n".join(parts)


def _section(section: type[Section], peers: dict[str, Any]) -> Iterator[str]:
    own = own_keys(section)
    above = ", ".join(f"[{_heading(base)}]({_anchor(base)})" for base in bases(section))
    yield f"### {_heading(section)}"
    yield ""
    yield _linked(summary(section)) + (f" Besides the keys of {above}:" if above and own else "")
    yield ""
    if own:
        named = any(cell for key in own for cell in peers.get(key.name, ()))
        yield from _table(
            ["key", "type", "default", "meaning", *(TITLES if named else ())],
            ([*_cells(section, key), *(_names(peers.get(key.name)) if named else ())] for key in own),
        )
        yield ""


def _table(titles: list[str], lines: Iterator[list[str]]) -> Iterator[str]:
    yield f"| {' | '.join(titles)} |"
    yield "|" + "---|" * len(titles)
    for line in lines:
        yield f"| {' | '.join(line)} |"


def _cells(section: type[Section], key: Key) -> list[str]:
    bare = next((cls for cls in _classes(key.type) if issubclass(cls, Choice)), None)
    told = [f"`{name}`: {text}" for name, text in choices(bare).items() if text] if bare else []
    lookup = key.marked(Lookup)
    if lookup is not None and lookup is not REWARD:  # docs/rewards.md has those
        told = [f"Functions: {', '.join(f'`{fn}`' for fn, _, _ in offered(lookup))}"]
    meaning = "<br>".join(_linked(text) for text in [key.description, *told])
    return [f"`{key.name}`", _type(section, key), _default(section, key), meaning]


def _type(section: type[Section], key: Key) -> str:
    if section is Stage and key.name == "kind":
        return ", ".join(f"[`{kind}`]({_anchor(spec_of(kind))})" for kind in kinds())
    if section is Recipe and key.name == "stages":
        return f"{_words(Stage)} by name"
    told = "path or name" if key.marked(Local) else _words(key.type)
    return _limited(told, key) + "?" * key.optional


def _words(annotation: Any) -> str:
    """A type in plain words.

    Raises:
        TypeError: it is none that a recipe's keys have.
    """
    origin, arguments = get_origin(annotation), get_args(annotation)
    if annotation in PLAIN:
        return PLAIN[annotation]
    if origin is list:
        return f"list of {_several(arguments[0])}"
    if origin is tuple:
        return f"{len(arguments)} {_several(arguments[0])}"
    if origin is dict:
        return "mapping" if arguments[1] is Any else f"{_words(arguments[1])} by name"
    if isinstance(annotation, type) and issubclass(annotation, Choice):
        return ", ".join(f"`{name}`" for name in choices(annotation))
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return f"[{_heading(annotation)}]({_anchor(annotation)})"
    raise TypeError(f"no words for {annotation}")


def _several(annotation: Any) -> str:
    return f"{_words(annotation)}s" if annotation in (int, float) else _words(annotation)


def _limited(told: str, key: Key) -> str:
    low, high = _bound(key, "gt", "ge"), _bound(key, "lt", "le")
    if low and high:
        return f"{told}, {low[1]} {'<' if low[0] == 'gt' else '≤'} x {'<' if high[0] == 'lt' else '≤'} {high[1]}"
    signs = {"gt": ">", "ge": "≥", "lt": "<", "le": "≤"}
    return told + "".join(f" {signs[bound]} {number}" for bound, number in filter(None, [low, high]))


def _bound(key: Key, *bounds: str) -> tuple[str, str] | None:
    return next(((bound, f"{at:.10g}") for bound in bounds if (at := key.bound(bound)) is not None), None)


def _default(section: type[Section], key: Key) -> str:
    if section is Recipe and key.name == "run":
        return "the file's name"
    if key.required:
        return "required"
    given = key.default
    if isinstance(given, dict):
        return f"`{{{', '.join(f'{name}: {value}' for name, value in given.items())}}}`"
    plain = isinstance(given, str) and given.isidentifier()
    return f"`{given if plain else json.dumps(given)}`"


def _names(cells: list[Any] | None) -> list[str]:
    """Other toolkits' names for a key; a dash where there is none."""
    return ["<br>".join(f"`{name}`" for name in names_in(cell)) or "—" for cell in cells or [None] * len(PEERS)]


def _arguments(peers: dict[str, dict[str, list[Any]]]) -> Iterator[str]:
    rows = ([f"`{fn}`", f"`{name}`", *_names(cells)] for fn, found in peers.items() for name, cells in found.items())
    yield "### Arguments of functions"
    yield ""
    yield "What functions do and take stands in [objectives](objectives.md); those that have a name elsewhere:"
    yield ""
    yield from _table(["function", "argument", *TITLES], rows)
    yield ""


def _heading(section: type[Section]) -> str:
    """A stage's kind, as a recipe names it; else the class."""
    kind = section.model_fields.get("kind")
    return str(kind.default) if issubclass(section, Stage) and kind and not kind.is_required() else section.__name__


def _anchor(section: type[Section]) -> str:
    return f"#{_heading(section).lower()}"


def _linked(text: str) -> str:
    """Pages that a description names as links, and what would end a cell of a table kept from it."""
    text = re.sub(r"docs/([\w-]+)\.md(#[\w-]+)?", lambda m: f"[{m[1]}]({m[1]}.md{m[2] or ''})", text)
    return text.replace("|", "\\|").replace("[recipes](recipes.md", "[above](")


def _classes(annotation: Any) -> list[type]:
    return [annotation] if isinstance(annotation, type) and get_origin(annotation) is None else []


if __name__ == "__main__":
    write(PAGE, page())
