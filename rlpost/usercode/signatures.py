"""What functions say of themselves, read from their source: nothing is imported, and torch takes seconds.

What a function takes is its signature; what that cannot say is declared beside it (rlpost/facts.py).
"""

from __future__ import annotations

import ast
import hashlib
import inspect
import pkgutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from inspect import Parameter
from pathlib import Path

from rlpost.errors import RecipeError
from rlpost.facts import FACTS
from rlpost.rewards.params import REWARD
from rlpost.section import MISSING
from rlpost.suggest import hint_or_list
from rlpost.usercode import calls, gym
from rlpost.usercode.params import EPISODE, TASKS, Function, Lookup
from rlpost.usercode.places import OF_FILE

_PACKAGE = Path(__file__).parents[1]


@dataclass(frozen=True)
class FunctionInfo:
    """A function's parameters and declared facts, read from its source."""

    signature: inspect.Signature = field(default_factory=inspect.Signature)
    facts: Mapping[str, bool] = field(default_factory=dict)

    def takes(self, *names: str) -> bool:
        """Whether it has one of these parameters."""
        return not self.signature.parameters.keys().isdisjoint(names)

    def has(self, fact: str) -> bool:
        """Whether a fact holds of it."""
        return self.facts.get(fact, FACTS[fact])


def info_of(function: Function, lookup: Lookup) -> FunctionInfo:
    """What is known of a function that a resolved recipe names; nothing of one that is not there."""
    if match := OF_FILE.fullmatch(function.fn):
        return _of_users(Path(match["file"]), match["name"])
    module, name = owner(function.fn, lookup, "fn")
    return functions_in(module).get(name, FunctionInfo())


def paths_in(function: Function, lookup: Lookup) -> list[str]:
    """The arguments given to a function of rlpost that name local files: annotated with `LocalPath`."""
    module, name = lookup.module, function.fn
    if module == TASKS and not OF_FILE.fullmatch(name):
        task, _, name = name.partition(".")
        module = f"{TASKS}.{task}" if task in _tasks() else ""
    if "." in name or module in ("", TASKS) or not isinstance(function.args, dict):
        return []  # of a user's file, an engine, a reward of a task; or the arguments are still to be given
    known = functions_in(module).get(name, FunctionInfo()).signature.parameters
    marked = [name for name, p in known.items() if str(p.annotation).removesuffix(" | None") == "LocalPath"]
    given = {name: function.args.get(name) for name in marked}
    return [name for name, value in given.items() if isinstance(value, str) and value != MISSING]


def owner(fn: str, lookup: Lookup, where: str) -> tuple[str, str]:
    """Module and name of a function of rlpost; `where` it is named, for errors.

    Raises:
        RecipeError: of a task: there is none of that name.
    """
    if lookup.module != TASKS and not (lookup is REWARD and "." in fn):
        return lookup.module, fn
    task, dot, name = fn.partition(".")
    tasks = _tasks()
    if not dot:
        raise RecipeError(f"{where}: {fn!r} - write 'task.function' (tasks: {', '.join(tasks)}) or 'file.py:function'")
    if task not in tasks:
        raise RecipeError(f"{where}: no task {task!r} in {TASKS}{hint_or_list(task, tasks, 'there are')}")
    return f"{TASKS}.{task}", name


def modules_of(lookup: Lookup) -> Iterator[tuple[str, str]]:
    """Where a key looks for functions of rlpost: what stands before a function's name there, and the module."""
    if lookup.module not in ("", TASKS):
        yield "", lookup.module
    if lookup.module == TASKS or lookup is REWARD:
        yield from ((f"{task}.", f"{TASKS}.{task}") for task in _tasks())


def _tasks() -> list[str]:
    folder = _PACKAGE.joinpath(*TASKS.split(".")[1:])
    return [m.name for m in pkgutil.iter_modules([str(folder)]) if not m.name.startswith("_")]


@cache
def named_by_package(module: str) -> dict[str, inspect.Signature]:
    """Signatures of what a task offers besides its own functions: rows of each task of the installed package."""
    if module != f"{TASKS}.{gym.GYM}":
        return {}
    tree = ast.parse(_PACKAGE.joinpath(*module.split(".")[1:]).with_suffix(".py").read_text("utf-8"))
    rows = next(node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == "_rows")
    _, *given = _signature(rows.args).parameters.values()  # the first is the task's name
    return dict.fromkeys(gym.names(), inspect.Signature(given))


@cache
def functions_in(module: str) -> dict[str, FunctionInfo]:
    """The functions that a module of rlpost offers: those it exports, or else those it defines."""
    file = _PACKAGE.joinpath(*module.split(".")[1:])
    tree = ast.parse((file / "__init__.py" if file.is_dir() else file.with_suffix(".py")).read_text("utf-8"))
    found = _defined(tree)
    exported = next((_names(node.value) for node in tree.body if _assigns(node, "__all__")), None)  # type: ignore[attr-defined]
    for node in tree.body:
        if isinstance(node, ast.ImportFrom) and str(node.module).startswith("rlpost."):
            wanted = {alias.name for alias in node.names} & set(exported or ())
            found |= {name: functions_in(str(node.module))[name] for name in sorted(wanted)}
    return found if exported is None else {name: found[name] for name in exported if name in found}


def _of_users(file: Path, name: str) -> FunctionInfo:
    """Of a function in a user's file; its process is asked about one that the source does not show as it is."""
    try:
        data = file.read_bytes()
        found = _defined(ast.parse(data)).get(name)
    except (OSError, SyntaxError, ValueError, RecursionError):
        return FunctionInfo()
    if found is not None:
        return found
    try:
        described = calls.describe(file, hashlib.sha256(data).hexdigest(), calls.LOADING)
    except calls.CallError:
        return FunctionInfo()  # the error comes when the function is bound
    return FunctionInfo(described[name].signature) if name in described else FunctionInfo()


def _defined(tree: ast.Module) -> dict[str, FunctionInfo]:
    """Public functions and class environments at the top of a module; one behind a decorator may be any other."""
    facts: dict[str, dict[str, bool]] = {}
    for node in tree.body:
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Call) and _called(node.value) == "declare":
            declared = {
                k.arg: k.value.value for k in node.value.keywords if k.arg and isinstance(k.value, ast.Constant)
            }
            for function in (name.id for name in node.value.args if isinstance(name, ast.Name)):
                facts.setdefault(function, {}).update({fact: bool(value) for fact, value in declared.items()})
    public = [node for node in tree.body if isinstance(node, _NAMED) and not node.name.startswith("_")]
    known = {node.name: _known(node) for node in public if not node.decorator_list}
    for alone in (node.name for node in public if isinstance(node, ast.ClassDef) and _is_alone(node)):
        facts.setdefault(alone, {})["one_player"] = True
    return {
        name: FunctionInfo(signature, facts.get(name, {})) for name, signature in known.items() if signature is not None
    }


_FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
_NAMED = (*_FUNCTIONS, ast.ClassDef)


def _known(node: ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) -> inspect.Signature | None:
    """The signature of a function, or of a class environment as one; None of another class."""
    if not isinstance(node, ast.ClassDef):
        return _signature(node.args)
    methods = {method.name: method for method in node.body if isinstance(method, _FUNCTIONS)}
    if not {"reset", "step"} <= set(methods):
        return None
    own = list(_signature(methods["__init__"].args).parameters.values())[1:] if "__init__" in methods else []
    episode = Parameter(EPISODE, Parameter.POSITIONAL_OR_KEYWORD)
    by_name = [p.replace(kind=p.KEYWORD_ONLY) if p.kind is p.POSITIONAL_OR_KEYWORD else p for p in own]
    return inspect.Signature([episode, *by_name])


def _is_alone(node: ast.ClassDef) -> bool:
    """Whether a class environment has no second player, of its own or of a class that it extends."""
    return not node.bases and all(getattr(part, "name", "") != "step_other" for part in node.body)


def _signature(args: ast.arguments) -> inspect.Signature:
    kinds = [Parameter.POSITIONAL_ONLY] * len(args.posonlyargs) + [Parameter.POSITIONAL_OR_KEYWORD] * len(args.args)
    positional = list(zip([*args.posonlyargs, *args.args], kinds, strict=True))
    without = len(positional) - len(args.defaults)
    made = [_parameter(a, kind, number >= without) for number, (a, kind) in enumerate(positional)]
    if args.vararg:
        made.append(_parameter(args.vararg, Parameter.VAR_POSITIONAL, False))
    keywords = zip(args.kwonlyargs, args.kw_defaults, strict=True)
    made += [_parameter(a, Parameter.KEYWORD_ONLY, default is not None) for a, default in keywords]
    if args.kwarg:
        made.append(_parameter(args.kwarg, Parameter.VAR_KEYWORD, False))
    return inspect.Signature(made)


def _parameter(arg: ast.arg, kind: inspect._ParameterKind, has_default: bool) -> Parameter:
    annotation = Parameter.empty if arg.annotation is None else ast.unparse(arg.annotation)
    return Parameter(arg.arg, kind, default=... if has_default else Parameter.empty, annotation=annotation)


def _called(call: ast.Call) -> str:
    return call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")


def _assigns(node: ast.stmt, name: str) -> bool:
    return isinstance(node, ast.Assign) and any(isinstance(t, ast.Name) and t.id == name for t in node.targets)


def _names(value: ast.expr) -> list[str]:
    found: list[str] = ast.literal_eval(value)
    return found
