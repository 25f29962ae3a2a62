"""Functions named in a recipe: found, their arguments checked, and bound before anything heavy loads.

What the program supplies is positional; what a recipe may set by `args` is keyword-only. Rewards and
functions of data get what they take by their parameters' names instead.
"""

from __future__ import annotations

import ast
import hashlib
import importlib
import inspect
import re
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from inspect import Parameter
from pathlib import Path
from typing import Any, TypeVar

from rlpost.engine.params import BUILT_IN, ENGINE, USERS, EngineChoice, ScoringChoice
from rlpost.errors import RecipeError
from rlpost.rewards.params import REWARD, Reward
from rlpost.section import Section, join, marked, walk
from rlpost.suggest import hint_or_list, shortened
from rlpost.usercode import gym, signatures, verifiers
from rlpost.usercode.bound import Bound
from rlpost.usercode.episodes import as_function, is_environment
from rlpost.usercode.here import UsersFile
from rlpost.usercode.params import TASKS, Function, Lookup, OnFailure
from rlpost.usercode.places import OF_FILE, users_file
from rlpost.usercode.signatures import owner

_GYM = f"{TASKS}.{gym.GYM}"
_LITERAL = re.compile(r"(?:typing\.)?Literal\[([^\[\]]*)\]")
T = TypeVar("T")


def functions_in(section: Any, where: str) -> Iterator[tuple[Function, Lookup, str]]:
    """The functions that a section and those below it name, each with where it is looked up and its key path."""
    for place, inner in walk(section, where):
        if isinstance(inner, EngineChoice | ScoringChoice):
            yield from _of_engine(inner, place)
        for key in type(inner).model_fields:
            yield from functions_at(inner, key, place)


def functions_at(section: Section, key: str, where: str) -> Iterator[tuple[Function, Lookup, str]]:
    """The same of one key of the section at `where`: of one that names a function, or several; a node names none."""
    lookup = marked(type(section).model_fields[key], Lookup)
    given, place = getattr(section, key), join(where, key)
    for i, function in enumerate(given if isinstance(given, list) else [given]):
        if lookup is not None and function is not None and not getattr(function, "of", None):
            yield function, lookup, join(place, i) if isinstance(given, list) else place


def _of_engine(chosen: EngineChoice | ScoringChoice, where: str) -> Iterator[tuple[Function, Lookup, str]]:
    if chosen.is_users:
        yield Function(fn=chosen.engine, args=chosen.args), ENGINE, where


def bind_engine(chosen: EngineChoice | ScoringChoice, where: str, base: Path) -> Bound | None:
    """The function behind a choice of engine, which stands at `where`; None for one of rlpost's.

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
    place = f"{where}.{lookup.key}"
    if file := users_file(function.fn, place, base):
        name = function.fn.rpartition(":")[2]
        users = UsersFile(file, place, function)
        names = [key for key, function in users.functions.items() if _fits(inspect.signature(function), lookup)]
        found = _chosen(users.functions, name, names, f"{place}: no function {shortened(repr(name))} in {file}")
        _check(function, name, inspect.signature(found), lookup, where)
        lenient = getattr(function, "on_failure", None) is OnFailure.unscored
        return Bound(users.bound(found, lookup, where), name, where, file, users.digest, lenient)
    check(function, lookup, where)
    module, name = owner(function.fn, lookup, place)
    if module == _GYM and not gym.installed():
        raise RecipeError(f"{place}: {function.fn!r} needs the package reasoning-gym: {gym.INSTALL}")
    if module == verifiers.MODULE:
        return _apart(function, lookup, where, base)
    call = getattr(importlib.import_module(module), name)
    call = as_function(call, here=True) if is_environment(call) else call
    ready = getattr(call, "ready", None)  # it checks its arguments now, and keeps something from call to call
    made = ready(function.args, f"{where}.args", base) if ready else None
    if lookup.by_model:
        from rlpost.usercode.tools import ToolHere  # a recipe without tools is shown without it

        return Bound(ToolHere(call, function.args, made), name, where)
    if made is not None:
        return Bound(made, name, where)
    return Bound(partial(call, **function.args) if function.args else call, name, where)


def _apart(function: Function, lookup: Lookup, where: str, base: Path) -> Bound:
    """A function for environments of verifiers, called in a process of its own; its file is that of the environment."""
    place = f"{where}.{lookup.key}"
    if missing := verifiers.missing():
        raise RecipeError(f"{place}: {function.fn!r} {missing}")
    env = base / Path(function.args["env"]).expanduser()
    args = function.args | ({"env": str(env.resolve())} if env.exists() else {})
    users = UsersFile(verifiers.FILE, place, function.model_copy(update={"args": args}))
    name = function.called.rpartition(".")[2]
    file, digest = (env, hashlib.sha256(env.read_bytes()).hexdigest()) if env.is_file() else (None, None)
    lenient = getattr(function, "on_failure", None) is OnFailure.unscored
    return Bound(users.bound(users.functions[name], lookup, where), name, where, file, digest, lenient)


def check(function: Function, lookup: Lookup, where: str) -> None:
    """Look up a function of rlpost in its source, and its arguments; one of a user's file waits until it is bound.

    Raises:
        RecipeError: there is no such function, or the arguments do not fit.
    """
    if OF_FILE.fullmatch(function.fn):
        return
    place = f"{where}.{lookup.key}"
    for key in ("deadline", "on_failure"):
        apart = function.fn.startswith(f"{verifiers.PACKAGE}.")
        if getattr(function, key, None) is not None and not apart:
            raise RecipeError(f"{where}.{key}: is for functions of a file, not for {function.fn!r} - remove it")
    if lookup is ENGINE:
        near = hint_or_list(function.fn, [*BUILT_IN, USERS], "there are")
        raise RecipeError(f"{place}: no engine {function.fn!r}{near}")
    module, name = owner(function.fn, lookup, place)
    if module == _GYM and name not in signatures.functions_in(module) and not gym.installed():
        return  # its names are the package's: a recipe can be shown without it, and is refused when it is bound
    named = signatures.named_by_package(module)
    options = named | {key: info.signature for key, info in signatures.functions_in(module).items()}
    own_names = [key.rpartition(".")[2] for key, of, _ in offered(lookup) if of == module]
    names = own_names + [key for key, own in named.items() if _fits(own, lookup)]
    signature = _chosen(options, name, names, f"{place}: no function {shortened(repr(name))} in {module}")
    own = _own(signature, lookup)
    if not lookup.by_name and tuple(own) != lookup.supplied:  # a user's may call them as it likes
        raise RecipeError(_supplied_otherwise(name, own, lookup, where))
    _check(function, name, signature, lookup, where)


def offered(lookup: Lookup) -> Iterator[tuple[str, str, inspect.Signature]]:
    """What a key may name of rlpost's own functions: each name with its module and signature, helpers left out."""
    for before, module in signatures.modules_of(lookup):
        for name, info in signatures.functions_in(module).items():
            given = {p.name for p in info.signature.parameters.values() if p.kind is not p.KEYWORD_ONLY}
            if (given <= set(lookup.supplied) or lookup.by_model) and _fits(info.signature, lookup):
                yield f"{before}{name}", module, info.signature


def settable(signature: inspect.Signature, lookup: Lookup) -> dict[str, Parameter]:
    """The parameters that a recipe gives by `args`: all that the program does not supply."""
    own, free = _own(signature, lookup), (Parameter.VAR_POSITIONAL, Parameter.VAR_KEYWORD)
    return {p.name: p for p in signature.parameters.values() if p.name not in own and p.kind not in free}


def _chosen(options: Mapping[str, T], name: str, names: Iterable[str], refusal: str) -> T:
    """The function (or signature) of that name; `names` are those that may be meant where there is none."""
    if name not in options:
        raise RecipeError(refusal + hint_or_list(name, names, "it has"))
    return options[name]


def _fits(signature: inspect.Signature, lookup: Lookup) -> bool:
    """Whether a function takes what such a key gives: its module has helpers too, which are nothing to offer."""
    own = _own(signature, lookup)
    if not lookup.by_name:
        return tuple(own) == lookup.supplied
    try:
        _check_named(own, "", lookup, "")
    except RecipeError:
        return False
    return True


def _own(signature: inspect.Signature, lookup: Lookup) -> list[str]:
    """The parameters that the program supplies."""
    named = [p for p in signature.parameters.values() if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    if lookup.by_name or lookup.by_model:
        return [p.name for p in named if p.name in lookup.supplied]
    return [p.name for p in named if p.kind != p.KEYWORD_ONLY]


def _check(function: Function, name: str, signature: inspect.Signature, lookup: Lookup, where: str) -> None:
    """Refuse arguments that the function does not take, and a function that takes what it is not given."""
    own, parameters = _own(signature, lookup), signature.parameters.values()
    if lookup.by_name:
        _check_named(own, name, lookup, where)
    elif len(own) != len(lookup.supplied):
        raise RecipeError(_supplied_otherwise(name, own, lookup, where))
    given = settable(signature, lookup)
    for key, value in function.args.items():
        if key in own:
            raise RecipeError(f"{where}.args.{key}: the program supplies it - remove it")
        if key in given:
            _check_type(given[key], value, f"{where}.args.{key}")
        elif not any(p.kind == p.VAR_KEYWORD for p in parameters):
            near = hint_or_list(key, given, "it takes")
            raise RecipeError(f"{where}.args.{key}: {name!r} has no argument {key!r}{near}")
    for p in given.values():
        if lookup.by_model and p.kind is not p.KEYWORD_ONLY:
            continue
        if p.default is p.empty and p.name not in function.args:
            raise RecipeError(f"{where}.args.{p.name}: missing - {name!r} has no default for it - give one")
    if isinstance(function, Reward) and ("model" in own) != (function.model is not None):
        missing = f"missing - {name!r} asks a model: name a stage or a checkpoint"
        raise RecipeError(f"{where}.model: {missing if 'model' in own else f'{name!r} asks no model - remove it'}")


def _supplied_otherwise(name: str, own: list[str], lookup: Lookup, where: str) -> str:
    return (
        f"{where}.{lookup.key}: {name!r} takes ({', '.join(own)}) from the program, which gives "
        f"({', '.join(lookup.supplied)}) - what a recipe sets stands after `*`"
    )


def _check_named(own: list[str], name: str, lookup: Lookup, where: str) -> None:
    """Rewards take one completion or all of them; other functions all that the program supplies, or some of it."""
    if lookup is REWARD:
        single, several = {"completion", "example", "steps"}, {"completions", "examples", "all_steps", "groups"}
        inputs = {"completion", "completions", "groups", "steps", "all_steps"} & set(own)
        if not inputs or (single & set(own) and several & set(own)):
            raise RecipeError(
                f"{where}.fn: {name!r} takes ({', '.join(own)}) - a reward takes (completion, example) or "
                "(completions, examples)"
            )
        return
    if not own if lookup.some else set(own) != set(lookup.supplied):
        told = [given for given in lookup.supplied if not given.startswith("_")]
        wanted = f"{'some of ' * lookup.some}({', '.join(told)})"
        raise RecipeError(
            f"{where}.{lookup.key}: {name!r} takes ({', '.join(own)}) - a `{lookup.name}` function takes {wanted}"
        )


def _check_type(parameter: inspect.Parameter, value: Any, where: str) -> None:
    """Refuse a value that a plain annotation rules out: a step too late it would be a traceback."""
    annotation = parameter.annotation
    written = annotation if isinstance(annotation, str) else inspect.formatannotation(annotation)
    name = written.removesuffix(" | None")
    if value is None and name != written:
        return
    options = _LITERAL.fullmatch(name)
    if options and value not in (given := ast.literal_eval(f"({options[1]},)")):
        raise RecipeError(f"{where}: no choice {value!r}{hint_or_list(str(value), list(map(str, given)), 'there are')}")
    accepted = {"int": int, "float": (int, float), "bool": bool, "str": str, "LocalPath": str}.get(name)
    called = {"int": "a whole number", "float": "a number", "bool": "true or false"}.get(name, "text")
    wrong_bool = isinstance(value, bool) and name in ("int", "float")
    if accepted is not None and (wrong_bool or not isinstance(value, accepted)):  # type: ignore[arg-type]
        raise RecipeError(f"{where}: expected {called}, got {shortened(repr(value))}")
