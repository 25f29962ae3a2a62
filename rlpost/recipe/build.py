"""Builds a checked `Recipe` from a plain tree; each of pydantic's errors becomes one line with a remedy."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from enum import Enum
from typing import Any, TypeAlias, TypeVar, cast, get_args, get_origin

import yaml
from pydantic import ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from rlpost.errors import RecipeError
from rlpost.evaluate.params import Evaluation
from rlpost.recipe.kinds import kinds, spec_of
from rlpost.recipe.references import Filled
from rlpost.recipe.schema import Recipe
from rlpost.section import MISSING, Local, Section, join, marked, set_by_default
from rlpost.suggest import closest, hint, shortened
from rlpost.usercode.places import OF_FILE

MOST_STAGES = 100
S = TypeVar("S", bound=Section)
Loc: TypeAlias = Sequence[str | int]
"""A path of keys from the top of the recipe; an integer indexes a list."""
_TRUTH = {
    **dict.fromkeys(("yes", "on", "y", "1", "true"), "true"),
    **dict.fromkeys(("no", "off", "n", "0", "false"), "false"),
}
_EXPECTED = {
    "dict_type": "names with values, like {{name: value}}",
    "tuple_type": "a list, like [..., ...]",
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "int_parsing_size": "a whole number of fewer digits",
    "float_type": "a number",
    "bool_type": "true or false",
    "finite_number": "a finite number",
    "string_type": "text",
    "too_long": "{max_length} values",
    "missing": "a value",
}
"""What was expected, by pydantic's error type."""
_BOUNDS = ("greater_than", "greater_than_equal", "less_than", "less_than_equal")


class Build:
    """A recipe built from one tree whose references are filled in.

    Attributes:
        recipe: the built recipe.
        missing: paths of values that are still to be given.
    """

    def __init__(self, filled: Filled, typed: Mapping[str, str], lenient: bool = False) -> None:
        """Build it.

        Args:
            filled: the tree.
            typed: override values as typed on the command line, by key path.
            lenient: accept missing values everywhere; disabled stages may always have some.

        Raises:
            RecipeError: the first mistake, or else every missing value.
        """
        tree = filled.tree
        self._tree = tree
        self._origins = filled.origins
        self._typed = typed
        self._kinds = kinds_of(tree)
        self.missing = [loc for loc in _not_given(tree, ()) if loc[0] != "vars" and not self._is_disabled(loc)]
        # In the order of a recipe, so that the first mistake is reported.
        self.recipe = self._section(Recipe, {**tree, "stages": {}, "evaluation": None}, ())
        for name, kind in self._kinds.items():
            self.recipe.stages[name] = self._section(kind, tree["stages"][name], ("stages", name))
        if tree.get("evaluation") is not None:
            self.recipe.evaluation = self._section(Evaluation, tree["evaluation"], ("evaluation",))
        if filled.unknown:
            raise RecipeError(filled.unknown[0])
        if self.missing and not lenient:
            raise RecipeError("; ".join(dict.fromkeys(map(self._ask, self.missing))))

    def _section(self, section: type[S], tree: Any, above: Loc) -> S:
        try:
            return section.model_validate(tree)
        except ValidationError as error:
            problems = error.errors(include_url=False)
        for problem in problems:
            loc = (*above, *problem["loc"])
            if problem["type"] == "string_type" and _is_number(problem["input"]) and path_of(loc) in self._typed:
                _put(tree, problem["loc"], self._typed[path_of(loc)])
                continue
            if problem["type"] == "missing" and isinstance(loc[-1], str):
                _put(tree, problem["loc"], MISSING)
                if not self._is_disabled(loc):
                    self.missing.append(loc)
            elif problem["input"] != MISSING or problem["type"] == "extra_forbidden":
                raise RecipeError(self._line(problem, loc))
        return _unfinished(section, tree) if list(_not_given(tree, ())) else section.model_validate(tree)

    def _is_disabled(self, loc: Loc) -> bool:
        return len(loc) > 1 and loc[0] == "stages" and self._tree["stages"][loc[1]].get("enabled") is False

    def _ask(self, loc: Loc) -> str:
        """How to give a missing value: at its own key, or at the variable that it refers to."""
        where = path_of(loc)
        origin = self._origins.get(where, where)
        info = self._field(loc)
        kind = "PATH" if info and marked(info, Local) else "VALUE"
        if origin.startswith("vars."):
            return f"{origin}: give it as `{origin}={kind}`"
        return f"{origin}: missing - give it in the recipe or as `{origin}={kind}`"

    def _line(self, problem: ErrorDetails, loc: Loc) -> str:
        kind, given, about = problem["type"], problem["input"], problem.get("ctx", {})
        if isinstance(loc[-1], int) and kind == "missing":  # a list of so many values, and this one is not there
            info = self._field(loc)
            return (
                f"{path_of(loc[:-1])}: expected {len(get_args(info and info.annotation))} values, got {_shown(given)}"
            )
        where = path_of(loc)
        if kind == "extra_forbidden":
            return self.unknown(loc)
        if given is None and kind != "missing":
            info = self._field(loc)
            default = info.default if info and not isinstance(loc[-1], int) else None
            plain = isinstance(default, str | int | float) and default != ""
            return f"{where}: needs a value - {f'without the key it is {default}' if plain else 'it is empty'}"
        if kind == "enum":
            options = re.findall(r"'([^']*)'", about["expected"])
            return f"{where}: expected one of {', '.join(options)}, got {_shown(given)}{hint(str(given), options)}"
        if kind == "bool_type" and (right := _TRUTH.get(str(given).lower())):
            return f"{where}: expected true or false, got {_shown(given)} - write {right}"
        return f"{where}: expected {self._expected(problem, loc)}, got {_shown(given)}"

    def _expected(self, problem: ErrorDetails, loc: Loc) -> str:
        kind, given = problem["type"], problem["input"]
        accepted = range_of(self._field(loc))
        if kind == "float_type" and _is_number(given):  # a whole number of hundreds of digits
            return "a number of fewer digits"
        if kind in ("finite_number", *_BOUNDS) and accepted:
            return accepted
        if kind == "model_type":
            inner = self._owner((*loc, ""))
            first = next(iter(inner.model_fields)) if inner else ""
            return f"keys, like {{{first}: {shortened(given) if isinstance(given, str) else '...'}}}"
        if kind == "list_type":
            return f"a list, like [{_shown(given)}]"
        if kind == "string_type" and isinstance(given, int | float):  # bool is one
            return "text (put it in quotes)"
        return _EXPECTED[kind].format(**problem.get("ctx", {})) if kind in _EXPECTED else problem["msg"]

    def unknown(self, loc: Loc) -> str:
        """The message for an unknown key, with the likeliest key meant."""
        *above, key = loc
        section, where, around = self._owner(loc), path_of(loc), path_of(above)
        options = list(section.model_fields) if section else []
        near = closest(str(key), options)
        elsewhere = [path for path in self._paths() if path.rpartition(".")[2] == key]
        elsewhere.sort(key=lambda path: not path.startswith(around))
        rest = next((typed[len(where) :] for typed in self._typed if typed.startswith((f"{where}.", f"{where}["))), "")
        likely = [join(around, near)] if near else []
        likely += elsewhere[: 2 if near else 3]
        if likely:
            likely = [f"{path}{rest}" for path in likely]
            return f"{where}{rest}: unknown key - did you mean {' or '.join(map(repr, likely))}?"
        listed = f"keys of {around}" if around else "keys"
        return f"{where}: unknown key ({listed}: {', '.join(options) or 'none'})"

    def _owner(self, loc: Loc) -> type[Section] | None:
        """The section class that the last key of `loc` belongs to."""
        section: type[Section] | None = Recipe
        rest = list(loc)
        while section is not None and len(rest) > 1:
            key = str(rest.pop(0))
            if section is Recipe and key == "stages":
                section = self._kinds.get(str(rest.pop(0)))
                continue
            annotation = section.model_fields[key].annotation if key in section.model_fields else None
            if _holds_several(annotation):
                rest.pop(0)
            section = section_in(annotation) if rest else None
        return section

    def _field(self, loc: Loc) -> FieldInfo | None:
        """The field of a key; for an entry of a list, the field of the list."""
        keys = loc[:-1] if isinstance(loc[-1], int) else loc
        section = self._owner(keys)
        return section.model_fields.get(str(keys[-1])) if section else None

    def _paths(self) -> Iterator[str]:
        """Every key path of this recipe, including its stages and sources."""
        yield from _paths_of(Recipe, self._tree, "")
        for name, kind in self._kinds.items():
            yield f"stages.{name}"
            yield from _paths_of(kind, self._tree["stages"][name], f"stages.{name}")


def kinds_of(tree: Mapping[str, Any]) -> dict[str, type[Section]]:
    """The class of each stage by the stage's name, found from its `kind`.

    Raises:
        RecipeError: a stage is no mapping, or its kind is missing or unknown.
    """
    stages = tree.get("stages", {})
    if not isinstance(stages, dict):
        raise RecipeError(f"stages: expected stages by name, like {{sft: {{kind: sft}}}}, got {_shown(stages)}")
    if len(stages) > MOST_STAGES:
        raise RecipeError(f"stages: {len(stages)} of them - at most {MOST_STAGES}; start the next recipe from the last")
    return {name: _kind_of(stage, join("stages", name)) for name, stage in stages.items()}


def _kind_of(stage: Any, where: str) -> type[Section]:
    if stage is None:
        raise RecipeError(f"{where}: empty - to leave a stage out, give `{where}.enabled=false`")
    if not isinstance(stage, dict):
        raise RecipeError(f"{where}: expected the keys of a stage, got {_shown(stage)}")
    kind = stage.get("kind", MISSING)
    if kind == MISSING:
        if misspelt := closest("kind", map(str, stage)):
            raise RecipeError(f"{join(where, misspelt)}: unknown key - did you mean {join(where, 'kind')!r}?")
        raise RecipeError(f"{where}.kind: missing - give one of {', '.join(kinds())}")
    if kind not in kinds() and not (isinstance(kind, str) and OF_FILE.fullmatch(kind)):
        near = hint(str(kind), kinds())
        raise RecipeError(f"{where}.kind: expected one of {', '.join(kinds())}, got {_shown(kind)}{near}")
    return spec_of(kind, f"{where}.kind")


def _paths_of(section: type[Section], value: Any, where: str) -> Iterator[str]:
    for key, info in section.model_fields.items():
        place, given = join(where, key), value.get(key) if isinstance(value, dict) else None
        yield place
        inner = section_in(info.annotation)
        if inner is None:
            continue
        if not _holds_several(info.annotation):
            yield from _paths_of(inner, given, place)
        elif isinstance(given, dict | list):
            for name, one in given.items() if isinstance(given, dict) else enumerate(given):
                yield join(place, name)
                yield from _paths_of(inner, one, join(place, name))


def section_in(annotation: Any) -> type[Section] | None:
    """The section class inside an annotation: `Reward` for `list[Reward] | None`."""
    if isinstance(annotation, type) and get_origin(annotation) is None:
        return annotation if issubclass(annotation, Section) else None
    return next((found for part in get_args(annotation) if (found := section_in(part))), None)


def _holds_several(annotation: Any) -> bool:
    """Whether the annotation is a list or mapping of sections."""
    origin = get_origin(annotation)
    return origin in (dict, list) or any(map(_holds_several, get_args(annotation)))


def _unfinished(section: type[S], tree: Any) -> S:
    """Build the section without validation, because values are missing; the others have been validated."""
    if not isinstance(tree, dict):
        return cast(S, tree)
    values: dict[str, Any] = {}
    for key, value in tree.items():
        inner, kept = section_in(section.model_fields[key].annotation), set_by_default(section).get(key, {})
        if inner is None or not isinstance(value, dict | list):
            values[key] = value
        elif isinstance(value, list):
            values[key] = [_unfinished(inner, one) for one in value]
        elif _holds_several(section.model_fields[key].annotation):
            values[key] = {name: _unfinished(inner, one) for name, one in value.items()}
        else:
            values[key] = _unfinished(inner, {**kept, **value})
    return cast(S, section.model_construct(**values))


def _not_given(value: Any, above: Loc) -> Iterator[Loc]:
    if value == MISSING:
        yield above
    elif isinstance(value, dict | list):
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _not_given(inner, (*above, key))


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _put(tree: Any, loc: Loc, value: Any) -> None:
    *above, key = loc
    for part in above:
        tree = tree[part]
    tree[key] = value


def range_of(info: FieldInfo | None) -> str:
    """The allowed range of a key, or of the numbers in its list, in words."""
    bounds = dict(_bounds(info)) if info is not None else {}
    low, high = bounds.get("ge", bounds.get("gt")), bounds.get("le", bounds.get("lt"))
    if low is None or high is None:
        words = {"ge": "at least", "gt": "more than", "le": "at most", "lt": "less than"}
        return " and ".join(f"{words[key]} {bound}" for key, bound in bounds.items())
    exclusive = [" (exclusive)" * (end in bounds) for end in ("gt", "lt")]
    return f"from {low}{exclusive[0]} to {high}{exclusive[1]}"


def _bounds(info: FieldInfo) -> Iterator[tuple[str, float]]:
    for mark in info.metadata:
        yield from ((key, getattr(mark, key)) for key in ("gt", "ge", "lt", "le") if hasattr(mark, key))
    left = list(get_args(info.annotation))
    for part in left:
        left += get_args(part)
        if isinstance(part, FieldInfo):
            yield from _bounds(part)


def path_of(loc: Loc) -> str:
    """The key path as text: `stages.sft.data.a.path`."""
    where = ""
    for key in loc:
        where = join(where, key)
    return where


def _shown(value: object) -> str:
    """The value as it would be written in a recipe, shortened."""
    if isinstance(value, dict):
        text = yaml.safe_dump(value, default_flow_style=True, sort_keys=False, width=10**9)
        return shortened(" ".join(text.split()), 60)
    return shortened(repr(value.value if isinstance(value, Enum) else value), 60)
