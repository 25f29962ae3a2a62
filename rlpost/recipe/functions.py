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
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

from rlpost.data.params import Source
from rlpost.engine.params import LOCAL, EngineChoice
from rlpost.errors import RecipeError
from rlpost.recipe.files import expanded, packaged_folder
from rlpost.recipe.keys import join
from rlpost.recipe.schema import Recipe
from rlpost.recipe.users import UsersFile
from rlpost.rewards.params import Reward
from rlpost.suggest import hint_or_list
from rlpost.usercode.bound import Bound
from rlpost.usercode.load import public_functions
from rlpost.usercode.params import Function, OnFailure

_TASKS = "rlpost.data.tasks"
_LITERAL = re.compile(r"(?:typing\.)?Literal\[([^\[\]]*)\]")
_FILE = re.compile(r"(?P<file>.+\.py):(?P<name>[^:]*)")


@dataclass(frozen=True)
class Field:
    """Where a field's functions are looked up and what the program gives them."""

    module: str
    supplied: tuple[str, ...]
    """Positional arguments, in order; where they go by name, the parameters' names."""
    by_name: bool = False
    some: bool = False
    """By name: a function takes what it needs of them, and not necessarily all."""
    key: str = "fn"
    """The key that names the function."""


_SURROGATE = Field("rlpost.objectives.surrogates", ("logp_N", "old_logp_N", "advantage_N", "rows"))
_PAIR_LOSS = Field("rlpost.objectives.preference", ("pairs",))
FIELDS = {
    "reward": Field(
        "rlpost.rewards",
        ("completion", "example", "completions", "examples", "steps", "all_steps", "groups", "model"),
        by_name=True,
        some=True,
    ),
    "advantage": Field(
        "rlpost.objectives.advantages",
        (
            *("reward_PG", "length_PG", "greedy_P", "reward_PGK", "weight_K", "running_mean"),
            *("reward_S", "reward_N", "rows", "steps", "step_reward_K", "value_K", "group_size"),
        ),
        by_name=True,
        some=True,
    ),
    "grpo.loss": _SURROGATE,
    "ppo.loss": _SURROGATE,
    "dpo.loss": Field(_PAIR_LOSS.module, ("pairs", "delta_PK", "reward_PK"), by_name=True, some=True),
    "online_dpo.loss": _PAIR_LOSS,
    "dpo.modifiers": Field("rlpost.objectives.preference_modifiers", ("pairs",)),
    "kto.loss": Field("rlpost.objectives.unpaired", ("unpaired",)),
    "reward_model.loss": Field(
        "rlpost.objectives.ranking", ("score_P2", "margin_P", "score_PK", "reward_PK"), by_name=True, some=True
    ),
    "process_reward_model.loss": Field("rlpost.objectives.ranking", ("logit_K", "label_K")),
    "sft.loss": Field(
        "rlpost.objectives.supervised",
        ("logp_N", "logp_NV", "teacher_NV", "target_N", "label_N"),
        by_name=True,
        some=True,
    ),
    "environment": Field(_TASKS, ("text", "turns", "example"), by_name=True, some=True),
    "engine": Field("", ("policy",), by_name=True, key="engine"),
    "task": Field(_TASKS, (), by_name=True),
    "map": Field(_TASKS, ("row",), by_name=True),
    "present": Field(_TASKS, ("row", "random"), by_name=True),
}


def bind_all(recipe: Recipe, base: Path) -> list[Bound]:
    """Bind every function of the enabled stages and the evaluation, before anything loads.

    Raises:
        RecipeError: as `bind`.
    """
    return [bind(function, field, where, base) for function, field, where in functions_of(recipe)]


def functions_of(recipe: Recipe) -> Iterator[tuple[Function, str, str]]:
    """The functions of a recipe: each with its kind of field (a key of FIELDS) and its key path."""
    if recipe.model.tokenizer:
        yield from _of_sources(recipe.model.tokenizer.data, "model.tokenizer.data")
    for name, stage in recipe.stages.items():
        if stage.enabled:
            yield from _of_stage(stage, join("stages", name))
    if recipe.evaluation:
        yield from _of_stage(recipe.evaluation, "evaluation")
    yield from _of_engine(recipe.rollouts, "rollouts")


def _of_stage(stage: Any, where: str) -> Iterator[tuple[Function, str, str]]:
    yield from _of_sources(stage.data, f"{where}.data")
    for name in ("loss", "modifiers"):
        given = getattr(stage, name, None) or []
        for i, function in enumerate(given if isinstance(given, list) else [given]):
            place = f"{where}.{name}[{i}]" if isinstance(given, list) else f"{where}.{name}"
            yield function, f"{stage.kind.value}.{name}", place
    for name in ("advantage", "environment"):
        if getattr(stage, name, None) is not None:
            yield getattr(stage, name), name, f"{where}.{name}"
    yield from ((leaf, "reward", place) for leaf, place in reward_leaves(getattr(stage, "rewards", []), where))
    yield from _of_engine(getattr(stage, "rollouts", None), f"{where}.rollouts")


def _of_engine(chosen: EngineChoice | None, where: str) -> Iterator[tuple[Function, str, str]]:
    if chosen is not None and chosen.engine != LOCAL:
        yield Function(chosen.engine, chosen.args), "engine", where


def bind_engine(chosen: EngineChoice, where: str, base: Path) -> Bound | None:
    """The function behind a choice of engine, which stands at `where`; None for the local one.

    Raises:
        RecipeError: as `bind`.
    """
    function = next(_of_engine(chosen, where), None)
    return None if function is None else bind(*function, base)


def reward_leaves(rewards: Sequence[Reward], where: str) -> Iterator[tuple[Reward, str]]:
    """The reward functions of a tree of rewards, each with its key path; `where` is the stage's."""
    for i, reward in enumerate(rewards):
        yield from _leaves_below(reward, f"{where}.rewards[{i}]")


def _leaves_below(reward: Reward, where: str) -> Iterator[tuple[Reward, str]]:
    if not reward.of:
        yield reward, where
    for i, child in enumerate(reward.of):
        yield from _leaves_below(child, f"{where}.of[{i}]")


def _of_sources(data: dict[str, Source], where: str) -> Iterator[tuple[Function, str, str]]:
    for name, source in data.items():
        for field in ("task", "map", "present"):
            function = getattr(source, field)
            if function is not None:
                yield function, field, f"{where}.{name}.{field}"


def bind(function: Function, field: str, where: str, base: Path) -> Bound:
    """Find the function that a recipe names and apply its arguments.

    Args:
        function: name and arguments.
        field: the kind of field it stands in, a key of FIELDS.
        where: its key path, for errors.
        base: the recipe's folder.

    Raises:
        RecipeError: there is no such function, its file fails to load, or the arguments do not fit.
    """
    owner = FIELDS[field]
    if match := _FILE.fullmatch(function.fn):
        place = f"{where}.{owner.key}"
        name, file = match["name"], _allowed(Path(function.fn[: match.end("file")]), place, base)
        users = UsersFile(file, place, function)
        digest, found = users.digest, _chosen(users.functions, name, str(file), place, field)
        _check_arguments(found, function.args, owner, field, where)
        _check_model(function, found, where)
        lenient = getattr(function, "on_failure", None) is OnFailure.unscored
        return Bound(users.bound(found, field, where), name, where, file, digest, lenient)
    for key in ("deadline", "on_failure"):
        if getattr(function, key, None) is not None:
            raise RecipeError(f"{where}.{key}: is for functions of a file, not for {function.fn!r} - remove it")
    if field == "engine":
        near = hint_or_list(function.fn, [LOCAL, "file.py:function"], "there are")
        raise RecipeError(f"{where}.{owner.key}: no engine {function.fn!r}{near}")
    if field == "reward" and "." not in function.fn:
        module, name, place = importlib.import_module(owner.module), function.fn, owner.module
    elif owner.module == _TASKS or field == "reward":
        module, name = _task(function.fn, f"{where}.fn")
        place = module.__name__
    else:
        module, name, place = importlib.import_module(owner.module), function.fn, owner.module
    found = _chosen(public_functions(module), name, place, f"{where}.fn", field)
    _check_arguments(found, function.args, owner, field, where)
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
    package = importlib.import_module(_TASKS)
    tasks = [m.name for m in pkgutil.iter_modules(package.__path__) if not m.name.startswith("_")]
    if not dot:
        raise RecipeError(f"{where}: {fn!r} - write 'task.function' (tasks: {', '.join(tasks)}) or 'file.py:function'")
    if task not in tasks:
        raise RecipeError(f"{where}: no task {task!r} in {_TASKS}{hint_or_list(task, tasks, 'there are')}")
    return importlib.import_module(f"{_TASKS}.{task}"), name


def _chosen(
    options: Mapping[str, Callable[..., Any]], name: str, place: str, where: str, field: str
) -> Callable[..., Any]:
    """The function of that name among those that a module offers."""
    if name not in options:
        offered = [key for key, function in options.items() if _fits(function, field)]
        raise RecipeError(f"{where}: no function {name!r} in {place}{hint_or_list(name, offered, 'it has')}")
    return options[name]


def _fits(function: Callable[..., Any], field: str) -> bool:
    """Whether the function takes what such a field gives: its module has helpers too, which are nothing to offer."""
    owner, parameters = FIELDS[field], inspect.signature(function).parameters
    if not owner.by_name:
        return tuple(p.name for p in parameters.values() if p.kind != p.KEYWORD_ONLY) == owner.supplied
    try:
        _check_named([name for name in parameters if name in owner.supplied], function.__name__, field, "")
    except RecipeError:
        return False
    return True


def _check_arguments(function: Callable[..., Any], args: dict[str, Any], owner: Field, field: str, where: str) -> None:
    parameters = inspect.signature(function).parameters.values()
    named = [p for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    if owner.by_name:
        own = [p.name for p in named if p.name in owner.supplied]
        settable = [p for p in named if p.name not in owner.supplied]
        _check_named(own, function.__name__, field, where)
    else:
        own = [p.name for p in named if p.kind != p.KEYWORD_ONLY]
        settable = [p for p in named if p.kind == p.KEYWORD_ONLY]
        # A user's function may call them as it likes; one of rlpost's own with other names is for something else.
        foreign = function.__module__.startswith("rlpost.") and tuple(own) != owner.supplied
        if foreign or len(own) != len(owner.supplied):
            raise RecipeError(
                f"{where}.fn: {function.__name__!r} takes ({', '.join(own)}) from the program, which gives "
                f"({', '.join(owner.supplied)}) - what a recipe sets stands after `*`"
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


def _check_named(own: list[str], name: str, field: str, where: str) -> None:
    """Rewards take one completion or all of them; other functions all that the program supplies, or some of it."""
    if field == "reward":
        single, several = {"completion", "example", "steps"}, {"completions", "examples", "all_steps", "groups"}
        asked = {"completion", "completions", "groups", "steps", "all_steps"} & set(own)
        if not asked or (single & set(own) and several & set(own)):
            raise RecipeError(
                f"{where}.fn: {name!r} takes ({', '.join(own)}) - a reward takes (completion, example) or "
                "(completions, examples)"
            )
        return
    needed = FIELDS[field].supplied
    if not own if FIELDS[field].some else set(own) != set(needed):
        what = "some of " if FIELDS[field].some else ""
        raise RecipeError(
            f"{where}.fn: {name!r} takes ({', '.join(own)}) - a `{field}` function takes {what}({', '.join(needed)})"
        )


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
