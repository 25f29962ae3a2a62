"""Single-edit typos in the packaged recipes: of keys, names, functions, choices and arguments.

A typo drops, inserts or replaces one letter, or swaps two. One that makes another valid word is no typo. What is valid
is read from what `rlpost show` prints and from the lists in error messages; nothing inside of rlpost is asked.
"""

from __future__ import annotations

import random
import re
import string
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any

import yaml

from rlpost.errors import RecipeError
from rlpost.recipe.files import listing, packaged, packaged_folder
from rlpost.recipe.resolve import resolve

NONSENSE = "zqxzqxzqx"
"""Near to no word: the answer lists all there is."""
KINDS = {
    "key in a file": 110,
    "key as an override": 110,
    "stage, source or variable": 60,
    "name of a recipe": 60,
    "function": 70,
    "choice": 50,
    "argument": 40,
}
"""How many of 500 typos are of each kind."""
NAMES_STAGES = ("start", "reference", "stage")
"""Keys whose value may be the name of a stage."""
KeyPath = tuple[str | int, ...]


@dataclass(frozen=True)
class Typo:
    """A word typed wrong in a recipe, its overrides or its name."""

    kind: str
    recipe: str
    """As given on the command line; where `text` is given, the name of the packaged recipe that it replaces."""
    typed: str
    place: str
    """Where the message is to say that it is."""
    meant: tuple[str, ...]
    """The word that was meant, and the full paths or names that mean it too."""
    overrides: tuple[str, ...] = ()
    text: str | None = None
    choices: frozenset[str] | None = None
    """All that may be suggested, where that is known."""


def single_edit(word: str, rng: random.Random) -> str:
    """The word with one letter dropped, inserted or replaced, or two neighbours swapped."""
    letters = string.ascii_lowercase + "_"
    i = rng.randrange(len(word))
    how = rng.choice(["drop", "insert", "replace", "swap"] if len(word) > 2 else ["insert", "replace"])
    if how == "drop":
        return word[:i] + word[i + 1 :]
    if how == "swap":
        i = min(i, len(word) - 2)
        return word[:i] + word[i + 1] + word[i] + word[i + 2 :]
    return word[:i] + rng.choice(letters) + word[i + (how == "replace") :]


def misspelt(word: str, valid: Sequence[str], rng: random.Random) -> str:
    """A typo of the word that is none of the valid ones, nor a word that YAML reads as something else."""
    while True:
        typed = single_edit(word, rng)
        if typed not in (*valid, "on", "off", "yes", "no", "y", "n", "null", "true", "false"):
            return typed


def dotted(path: Sequence[str | int]) -> str:
    """A key path as an override names it."""
    return ".".join(map(str, path))


def is_own_name(path: KeyPath) -> bool:
    """Whether the last key is a name that the recipe's author chose: of a stage, a source or a variable."""
    return len(path) > 1 and (path[:-1] in (("stages",), ("vars",)) or path[-2] == "data")


def is_open(path: KeyPath) -> bool:
    """Whether rlpost does not know the last key: below a variable, of transformers, a column, below an argument."""
    free = path[:1] == ("vars",) or path[:2] == ("model", "config")
    return (free and len(path) > 2) or "columns" in path[:-1] or "args" in path[:-2]


def is_argument(path: KeyPath) -> bool:
    """Whether the last key is the name of a function's argument."""
    return path[-2:-1] == ("args",)


def is_key(path: KeyPath) -> bool:
    """Whether the last key is one of rlpost's own."""
    return isinstance(path[-1], str) and not (is_own_name(path) or is_open(path) or is_argument(path))


def walk(value: Any, path: KeyPath = ()) -> Iterator[tuple[KeyPath, Any]]:
    """(key path, value) of everything in a tree."""
    for key, inner in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        yield (*path, key), inner
        yield from walk(inner, (*path, key))


def nodes(node: yaml.Node, path: KeyPath = ()) -> Iterator[tuple[KeyPath, yaml.Node, yaml.Node | None]]:
    """(key path, value, key) of everything in a YAML document, with its place in the text."""
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            yield (*path, key.value), value, key
            yield from nodes(value, (*path, key.value))
    elif isinstance(node, yaml.SequenceNode):
        for i, value in enumerate(node.value):
            yield (*path, i), value, None
            yield from nodes(value, (*path, i))


def at(tree: Any, path: KeyPath) -> Any:
    for key in path:
        tree = tree[key]
    return tree


def replaced(text: str, node: yaml.Node, word: str) -> str:
    """The text with another word where the node stands."""
    return text[: node.start_mark.index] + word + text[node.end_mark.index :]


class Shipped:
    """A packaged recipe, and what may be typed wrong in it."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.text = (packaged_folder() / f"{name}.yaml").read_text("utf-8")
        self.given = tuple(f"vars.{key}=x" for key, value in self.raw.get("vars", {}).items() if value == "???")
        """Overrides for what it leaves open."""

    @cached_property
    def raw(self) -> dict[str, Any]:
        """Its keys and those it inherits, with references as they are written."""
        return _raw(self.name)

    @cached_property
    def tree(self) -> dict[str, Any]:
        """Every key that it has, as `rlpost show` prints them."""
        found: dict[str, Any] = yaml.safe_load(resolve(self.name, self.given).to_yaml())
        return found

    @cached_property
    def settable(self) -> list[KeyPath]:
        """Every path that an override can name: nothing below a value that refers to another."""
        return [path for path, _ in walk(self.tree) if not self._refers(path[:-1])]

    def looks_into(self, path: KeyPath) -> bool:
        """Whether rlpost looks at the value: not at variables nobody may use, nor into stages that are left out."""
        return path[0] != "vars" and (path[0] != "stages" or at(self.tree, path[:2]).get("enabled", True))

    def _refers(self, path: KeyPath) -> bool:
        value: Any = self.raw
        for key in path:
            value = value.get(key) if isinstance(value, dict) else value[key] if isinstance(value, list) else None
            if isinstance(value, str) and "${" in value:
                return True
        return False

    @cached_property
    def nodes(self) -> list[tuple[KeyPath, yaml.Node, yaml.Node | None]]:
        """All that stands in the file itself."""
        return list(nodes(yaml.compose(self.text, Loader=yaml.SafeLoader)))

    def offered(self, path: KeyPath, value: str) -> list[str]:
        """What there is to choose from at a key, as the answer to a nonsensical override says; [] where it lists none.

        The answer ends in `(it has: a, b)`, or in `expected one of a, b, got ...`.
        """
        return _offered(self.name, self.given, f"{dotted(path)}={value}")


@cache
def _runnable() -> list[str]:
    """The recipes that are not only there for others to inherit from."""
    return [recipe.name for recipe in listing() if not recipe.description.startswith("(shared")]


@cache
def shipped(name: str) -> Shipped:
    return Shipped(name)


@cache
def _offered(name: str, given: tuple[str, ...], override: str) -> list[str]:
    try:
        resolve(name, [*given, override])
    except RecipeError as error:
        found = re.search(r"\([^()]*: ([^()]*)\)$", str(error)) or re.search(r"expected one of (.*), got ", str(error))
        words = found[1].split(", ") if found else []
        return [word for word in words if word != "none"]
    return []


@cache
def _raw(name: str) -> dict[str, Any]:
    own = yaml.safe_load((packaged_folder() / f"{name}.yaml").read_text("utf-8"))
    merged: dict[str, Any] = {}
    for entry in own.pop("defaults", []):
        beside = f"{name.rpartition('/')[0]}/{entry}".lstrip("/")
        found = next((n for n in (beside, str(entry)) if n in packaged()), None)
        _merge(merged, _raw(found) if found else {})
    _merge(merged, own)
    return merged


def _merge(old: dict[str, Any], new: dict[str, Any]) -> None:
    for key, value in new.items():
        if isinstance(value, dict) and isinstance(old.get(key), dict):
            old[key] = dict(old[key])
            _merge(old[key], value)
        else:
            old[key] = value


def key_in_file(recipe: Shipped, rng: random.Random) -> Typo | None:
    found = [(path, key) for path, _, key in recipe.nodes if key is not None and is_key(path)]
    if not found:
        return None
    path, key = rng.choice(found)
    siblings = at(yaml.safe_load(recipe.text), path[:-1])
    known = at(recipe.tree, path[:-1]) if path[0] != "defaults" else {}
    typed = misspelt(str(path[-1]), [*siblings, *known], rng)
    text = replaced(recipe.text, key, typed)
    return Typo(
        "key in a file",
        recipe.name,
        typed,
        dotted((*path[:-1], typed)),
        (str(path[-1]), dotted(path)),
        recipe.given,
        text,
    )


def key_as_override(recipe: Shipped, rng: random.Random) -> Typo | None:
    path = rng.choice([p for p in recipe.settable if is_key(p)])
    at_segment = rng.choice([i for i in range(1, len(path) + 1) if is_key(path[:i])])
    typed = misspelt(str(path[at_segment - 1]), list(at(recipe.tree, path[: at_segment - 1])), rng)
    wrong = dotted((*path[: at_segment - 1], typed, *path[at_segment:]))
    meant = (str(path[at_segment - 1]), dotted(path))
    return Typo("key as an override", recipe.name, typed, wrong, meant, (*recipe.given, f"{wrong}=1"))


def own_name(recipe: Shipped, rng: random.Random) -> Typo | None:
    stages = list(recipe.tree["stages"])
    kind = "stage, source or variable"
    looked_into = [p for p in recipe.settable if recipe.looks_into(p)]
    referring = [p for p in looked_into if p[-1] in NAMES_STAGES and at(recipe.tree, p) in stages]
    if referring and rng.random() < 0.4:
        path = rng.choice(referring)
        word = at(recipe.tree, path)
        typed = misspelt(word, [*stages, "start", "base"], rng)
        return Typo(kind, recipe.name, typed, dotted(path), (word,), (*recipe.given, f"{dotted(path)}={typed}"))
    found = [p for p in recipe.settable if is_own_name(p)]
    if not found:
        return None
    path = rng.choice(found)
    typed = misspelt(str(path[-1]), list(at(recipe.tree, path[:-1])), rng)
    wrong = dotted((*path[:-1], typed))
    return Typo(kind, recipe.name, typed, wrong, (str(path[-1]), dotted(path)), (*recipe.given, f"{wrong}=1"))


def recipe_name(recipe: Shipped, rng: random.Random) -> Typo | None:
    if recipe.name not in _runnable():
        return None
    last = recipe.name.rpartition("/")[2]
    known = [*packaged(), *(name.rpartition("/")[2] for name in packaged())]
    typed = misspelt(recipe.name if rng.random() < 0.5 else last, known, rng)
    return Typo("name of a recipe", typed, typed, typed, (recipe.name,), choices=frozenset(_runnable()))


def function(recipe: Shipped, rng: random.Random) -> Typo | None:
    in_file = [(path, value) for path, value, _ in recipe.nodes if path[-1] == "fn" and recipe.looks_into(path)]
    as_override = [p for p in recipe.settable if p[-1] == "fn" and recipe.looks_into(p)]
    node: yaml.Node | None = None
    if in_file and rng.random() < 0.5:
        path, node = rng.choice(in_file)
    elif as_override:
        path = rng.choice(as_override)
    else:
        return None
    word = str(at(recipe.tree, path))
    task, dot, name = word.rpartition(".")
    edits_task = bool(dot) and rng.random() < 0.3
    part = task if edits_task else name
    choices = recipe.offered(path, f"{NONSENSE}.{name}" if edits_task else f"{task}{dot}{NONSENSE}")
    if part not in choices:
        raise LookupError(f"{recipe.name}: {dotted(path)}: {part!r} is not among what is offered: {choices}")
    typed = misspelt(part, choices, rng)
    wrong = f"{typed}.{name}" if edits_task else f"{task}{dot}{typed}"
    about = (recipe.name, typed, dotted(path), (part,))
    text, overrides = None, recipe.given
    if node is None:
        overrides = (*overrides, f"{dotted(path)}={wrong}")
    else:
        text = replaced(recipe.text, node, wrong)
    return Typo("function", *about, overrides, text, frozenset(choices))


def choice(recipe: Shipped, rng: random.Random) -> Typo | None:
    words = [p for p in recipe.settable if isinstance(at(recipe.tree, p), str) and p[-1] != "fn" and is_key(p)]
    rng.shuffle(words)
    for path in words:
        # What is offered beside words is a form, `file.py:function`.
        if choices := [word for word in recipe.offered(path, NONSENSE) or () if ":" not in word]:
            word = rng.choice(choices)
            typed = misspelt(word, choices, rng)
            override = f"{dotted(path)}={typed}"
            return Typo(
                "choice",
                recipe.name,
                typed,
                dotted(path),
                (word,),
                (*recipe.given, override),
                choices=frozenset(choices),
            )
    return None


def argument(recipe: Shipped, rng: random.Random) -> Typo | None:
    found = [p for p in recipe.settable if p[-1] == "args" and recipe.looks_into(p) and "fn" in at(recipe.tree, p[:-1])]
    rng.shuffle(found)
    for path in found:
        choices = recipe.offered((*path, NONSENSE), "1")
        if not choices:
            continue
        keys = {p[-1]: key for p, _, key in recipe.nodes if p[:-1] == path}
        word = rng.choice(choices)
        typed = misspelt(word, choices, rng)
        about = (recipe.name, typed, dotted((*path, typed)), (word, dotted((*path, word))))
        text, overrides = None, recipe.given
        if (key := keys.get(word)) is not None and rng.random() < 0.7:
            text = replaced(recipe.text, key, typed)
        else:
            overrides = (*overrides, f"{dotted((*path, typed))}=1")
        return Typo("argument", *about, overrides, text, frozenset(choices))
    return None


MAKERS: dict[str, Callable[[Shipped, random.Random], Typo | None]] = {
    "key in a file": key_in_file,
    "key as an override": key_as_override,
    "stage, source or variable": own_name,
    "name of a recipe": recipe_name,
    "function": function,
    "choice": choice,
    "argument": argument,
}


def typos(kind: str, count: int, seed: int, recipes: Sequence[str] = ()) -> list[Typo]:
    """That many typos of one kind, in the recipes of these names or in all."""
    rng = random.Random(f"{seed} {kind}")
    names = list(recipes) or packaged()
    made: dict[Typo, None] = {}
    while len(made) < count:
        typo = MAKERS[kind](shipped(rng.choice(names)), rng)
        if typo is not None:
            made[typo] = None
    return list(made)
