"""Functions named in a recipe: found, their arguments checked, and bound before anything heavy loads.

What the program supplies is positional; what a recipe may set by `args` is keyword-only. Rewards and
functions of data are told what they take by their parameters' names instead.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import pkgutil
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import fields
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

from rlpost.engine.params import ENGINE, LOCAL, EngineChoice
from rlpost.errors import RecipeError
from rlpost.recipe.files import expanded, packaged_folder
from rlpost.recipe.keys import join
from rlpost.recipe.schema import Recipe
from rlpost.recipe.users import UsersFile
from rlpost.recipe.walk import walk
from rlpost.rewards.params import REWARD, Reward
from rlpost.suggest import hint_or_list
from rlpost.usercode.bound import Bound
from rlpost.usercode.load import public_functions
from rlpost.usercode.params import TASKS, Function, Lookup, OnFailure

_LITERAL = re.compile(r"(?:typing\.)?Literal\[([^\[\]]*)\]")
_FILE = re.compile(r"(?P<file>.+\.py):(?P<name>[^:]*)")


def bind_all(recipe: Recipe, base: Path) -> list[Bound]:
    """Bind every function of the enabled stages and the evaluation, before anything loads.

    Raises:
        RecipeError: as `bind`.
    """
    return [bind(function, lookup, where, base) for function, lookup, where in functions_of(recipe)]


def functions_of(recipe: Recipe) -> Iterator[tuple[Function, Lookup, str]]:
    """The functions of a recipe's model, enabled stages and evaluation, each with where it is looked up and its key."""
    stages = [(join("stages", name), stage) for name, stage in recipe.stages.items() if stage.enabled]
    others = [("evaluation", recipe.evaluation), ("rollouts", recipe.rollouts)]
    for top, value in [("model", recipe.model), *stages, *others]:
        for where, section in walk(value, top):
            if isinstance(section, EngineChoice):
                yield from _of_engine(section, where)
            for f in fields(section):
                yield from functions_at(section, f.name, where)


def functions_at(section: Any, key: str, where: str) -> Iterator[tuple[Function, Lookup, str]]:
    """The same of one key of the section at `where`: of one that names a function, or several; a node names none."""
    lookup = next(f.metadata.get("lookup") for f in fields(section) if f.name == key)
    given, place = getattr(section, key), join(where, key)
    for i, function in enumerate(given if isinstance(given, list) else [given]):
        if lookup is not None and function is not None and not getattr(function, "of", None):
            yield function, lookup, join(place, i) if isinstance(given, list) else place


def _of_engine(chosen: EngineChoice, where: str) -> Iterator[tuple[Function, Lookup, str]]:
    if chosen.engine != LOCAL:
        yield Function(chosen.engine, chosen.args), ENGINE, where


def bind_engine(chosen: EngineChoice, where: str, base: Path) -> Bound | None:
    """The function behind a choice of engine, which stands at `where`; None for the local one.

    Raises:
        RecipeError: as `bind`.
    """
    function = next(_of_engine(chosen, where), None)
    return None if function is None else bind(*function, base)


def bind(function: Function, lookup: Lookup, where: str, base: Path) -> Bound:
    """Find the function that a recipe names and apply its arguments.

    Args:
        function: name and arguments.
        lookup: where it is looked up, as its key says.
        where: its key path, for errors.
        base: the recipe's folder.

    Raises:
        RecipeError: there is no such function, its file fails to load, or the arguments do not fit.
    """
    if match := _FILE.fullmatch(function.fn):
        place = f"{where}.{lookup.key}"
        name, file = match["name"], _allowed(Path(function.fn[: match.end("file")]), place, base)
        users = UsersFile(file, place, function)
        digest, found = users.digest, _chosen(users.functions, name, str(file), place, lookup)
        _check_arguments(found, function.args, lookup, where)
        _check_model(function, found, where)
        lenient = getattr(function, "on_failure", None) is OnFailure.unscored
        return Bound(users.bound(found, lookup, where), name, where, file, digest, lenient)
    for key in ("deadline", "on_failure"):
        if getattr(function, key, None) is not None:
            raise RecipeError(f"{where}.{key}: is for functions of a file, not for {function.fn!r} - remove it")
    if lookup is ENGINE:
        near = hint_or_list(function.fn, [LOCAL, "file.py:function"], "there are")
        raise RecipeError(f"{where}.{lookup.key}: no engine {function.fn!r}{near}")
    if lookup.module == TASKS or (lookup is REWARD and "." in function.fn):
        module, name = _task(function.fn, f"{where}.fn")
    else:
        module, name = importlib.import_module(lookup.module), function.fn
    found = _chosen(public_functions(module), name, module.__name__, f"{where}.fn", lookup)
    _check_arguments(found, function.args, lookup, where)
    _check_model(function, found, where)
    return Bound(partial(found, **function.args) if function.args else found, name, where)


def _check_model(function: Function, found: Callable[..., Any], where: str) -> None:
    """A reward that asks for a model is given one, and no other."""
    if isinstance(function, Reward):
        name, asks = found.__name__, "model" in inspect.signature(found).parameters
        if asks != (function.model is not None):
            missing = f"missing - {name!r} asks a model: name a stage or a checkpoint"
            raise RecipeError(f"{where}.model: {missing if asks else f'{name!r} asks no model - remove it'}")


def locate(fn: str, where: str, folders: Sequence[Path]) -> str:
    """`file.py:function` with the file's absolute path; other names as they are.

    Raises:
        RecipeError: none of the folders has the file.
    """
    match = _FILE.fullmatch(fn)
    if not match:
        return fn
    given = expanded(match["file"], where)
    try:
        found = next((place for folder in folders if (place := folder / given).is_file()), None)
    except OSError as error:
        raise RecipeError(f"{where}: {given}: {error.strerror} - give another path") from error
    if found is not None:
        return f"{found.resolve()}:{match['name']}"
    raise RecipeError(f"{where}: no file {match['file']!r} in {_either(folders[0], folders[-1])}")


def _either(one: Path, other: Path) -> str:
    return str(one) if one.resolve() == other.resolve() else f"{one} or {other}"


def _allowed(file: Path, where: str, base: Path) -> Path:
    folders = [base.resolve(), Path.cwd().resolve()]
    places = [folder / file for folder in folders]
    path = next((place for place in places if place.is_file()), places[0]).resolve()
    if not any(path.is_relative_to(folder) for folder in (*folders, packaged_folder().resolve())):
        raise RecipeError(f"{where}: {file} lies outside the recipe's folder and the working directory - move it")
    if not path.is_file():
        raise RecipeError(f"{where}: no file {str(file)!r} in {_either(base, Path.cwd())}")
    return path


def _task(fn: str, where: str) -> tuple[ModuleType, str]:
    """The module of `task.function` in rlpost.data.tasks."""
    task, dot, name = fn.partition(".")
    package = importlib.import_module(TASKS)
    tasks = [m.name for m in pkgutil.iter_modules(package.__path__) if not m.name.startswith("_")]
    if not dot:
        raise RecipeError(f"{where}: {fn!r} - write 'task.function' (tasks: {', '.join(tasks)}) or 'file.py:function'")
    if task not in tasks:
        raise RecipeError(f"{where}: no task {task!r} in {TASKS}{hint_or_list(task, tasks, 'there are')}")
    return importlib.import_module(f"{TASKS}.{task}"), name


def _chosen(
    options: Mapping[str, Callable[..., Any]], name: str, place: str, where: str, lookup: Lookup
) -> Callable[..., Any]:
    """The function of that name among those that a module offers."""
    if name not in options:
        offered = [key for key, function in options.items() if _fits(function, lookup)]
        raise RecipeError(f"{where}: no function {name!r} in {place}{hint_or_list(name, offered, 'it has')}")
    return options[name]


def _fits(function: Callable[..., Any], lookup: Lookup) -> bool:
    """Whether the function takes what such a key gives: its module has helpers too, which are nothing to offer."""
    parameters = inspect.signature(function).parameters
    if not lookup.by_name:
        return tuple(p.name for p in parameters.values() if p.kind != p.KEYWORD_ONLY) == lookup.supplied
    try:
        _check_named([name for name in parameters if name in lookup.supplied], function.__name__, lookup, "")
    except RecipeError:
        return False
    return True


def _check_arguments(function: Callable[..., Any], args: dict[str, Any], lookup: Lookup, where: str) -> None:
    parameters = inspect.signature(function).parameters.values()
    named = [p for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    if lookup.by_name:
        own = [p.name for p in named if p.name in lookup.supplied]
        settable = [p for p in named if p.name not in lookup.supplied]
        _check_named(own, function.__name__, lookup, where)
    else:
        own = [p.name for p in named if p.kind != p.KEYWORD_ONLY]
        settable = [p for p in named if p.kind == p.KEYWORD_ONLY]
        # A user's function may call them as it likes; one of rlpost's own with other names is for something else.
        foreign = function.__module__.startswith("rlpost.") and tuple(own) != lookup.supplied
        if foreign or len(own) != len(lookup.supplied):
            raise RecipeError(
                f"{where}.fn: {function.__name__!r} takes ({', '.join(own)}) from the program, which gives "
                f"({', '.join(lookup.supplied)}) - what a recipe sets stands after `*`"
            )
    names = [p.name for p in settable]
    for key, value in args.items():
        if key in own:
            raise RecipeError(f"{where}.args.{key}: the program supplies it - remove it")
        parameter = next((p for p in settable if p.name == key), None)
        if parameter is not None:
            _check_type(parameter, value, f"{where}.args.{key}")
        elif not any(p.kind == p.VAR_KEYWORD for p in parameters):
            near = hint_or_list(key, names, "it takes")
            raise RecipeError(f"{where}.args.{key}: {function.__name__!r} has no argument {key!r}{near}")
    for p in settable:
        if p.default is p.empty and p.name not in args:
            raise RecipeError(
                f"{where}.args.{p.name}: missing - {function.__name__!r} has no default for it - give one"
            )


def _check_named(own: list[str], name: str, lookup: Lookup, where: str) -> None:
    """Rewards take one completion or all of them; other functions all that the program supplies, or some of it."""
    if lookup is REWARD:
        single, several = {"completion", "example", "steps"}, {"completions", "examples", "all_steps", "groups"}
        asked = {"completion", "completions", "groups", "steps", "all_steps"} & set(own)
        if not asked or (single & set(own) and several & set(own)):
            raise RecipeError(
                f"{where}.fn: {name!r} takes ({', '.join(own)}) - a reward takes (completion, example) or "
                "(completions, examples)"
            )
        return
    if not own if lookup.some else set(own) != set(lookup.supplied):
        wanted = f"{'some of ' * lookup.some}({', '.join(lookup.supplied)})"
        raise RecipeError(f"{where}.fn: {name!r} takes ({', '.join(own)}) - a `{lookup.name}` function takes {wanted}")


def _check_type(parameter: inspect.Parameter, value: Any, where: str) -> None:
    """Refuse a value that a plain annotation rules out: a step too late it would be a traceback."""
    annotation = parameter.annotation
    name = annotation if isinstance(annotation, str) else inspect.formatannotation(annotation)
    options = _LITERAL.fullmatch(name)
    if options and value not in (given := ast.literal_eval(f"({options[1]},)")):
        raise RecipeError(f"{where}: no choice {value!r}{hint_or_list(str(value), list(map(str, given)), 'there are')}")
    accepted = {"int": int, "float": (int, float), "bool": bool, "str": str}.get(name)
    wrong_bool = isinstance(value, bool) and name in ("int", "float")
    if accepted is not None and (wrong_bool or not isinstance(value, accepted)):  # type: ignore[arg-type]
        raise RecipeError(f"{where}: expected {name}, got {value!r}")
