"""Task files of lm-eval, read and checked before anything of them is run.

To lm-eval a task file is a program: `!function` imports Python, a template may reach into the interpreter, some data
formats unpickle. Unless a file is trusted, what could run code is refused here.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import yaml

from rlpost.errors import DataError, RecipeError
from rlpost.run.files import disk_errors

DATA = ("json", "csv", "text", "parquet", "arrow")
"""What `dataset_path` may be without trust: rows in files."""
TRUST = "give --trust-tasks if you trust the file as you would trust a program"
_GLOB = set("*?[")


@dataclass(frozen=True)
class TaskFile:
    """One task."""

    name: str
    path: Path
    settings: Mapping[str, Any]
    """The file's keys, those of its `include`s too."""

    @property
    def generates(self) -> bool:
        """Whether answers are generated; else log-probabilities are compared or summed."""
        return str(self.settings.get("output_type", "generate_until")) == "generate_until"


def read_task_files(names: Sequence[str], trusted: bool = False) -> list[TaskFile]:
    """The tasks of files, and of all task files in folders.

    Args:
        names: YAML files with `task: NAME`, or folders, in which files without `task` are passed over.
        trusted: they may run code, and load data from anywhere.

    Raises:
        RecipeError: lm-eval is not installed; a file is missing, no task, or may run code; or two tasks have one name.
        DataError: a data file is missing.
    """
    if find_spec("lm_eval") is None:
        raise RecipeError("--harness lm_eval: needs the package lm-eval: pip install 'rlpost[harness]'")
    tasks: dict[str, TaskFile] = {}
    for name in names:
        for task in _in_folder(Path(name), trusted) if Path(name).is_dir() else [_task(Path(name), trusted)]:
            other = tasks.setdefault(task.name, task)
            if other.path.resolve() != task.path.resolve():
                raise RecipeError(f"{task.path}: task {task.name!r} is also in {other.path}; rename one")
    return list(tasks.values())


def _in_folder(folder: Path, trusted: bool) -> list[TaskFile]:
    files = [path for path in sorted(folder.rglob("*.yaml")) if isinstance(_read(path).settings.get("task"), str)]
    if not files:
        raise RecipeError(f"--tasks: {folder}: no .yaml file with `task: NAME` in it; name a task file of lm-eval")
    return [_task(path, trusted) for path in files]


def _task(path: Path, trusted: bool) -> TaskFile:
    found = _read(path)
    settings = found.settings
    if "group" in settings or isinstance(settings.get("task"), list):
        raise RecipeError(f"{path}: a group of tasks; name the files of its tasks, or their folder")
    name = settings.get("task")
    if not isinstance(name, str) or not name:
        raise RecipeError(f"{path}: no `task: NAME`, so it is no task file of lm-eval; add it, or name another file")
    if settings.get("unsafe_code"):
        raise RecipeError(
            f"{path}: unsafe_code: it runs what the model writes, which rlpost does not; "
            "run lm-eval itself on the folder that `rlpost merge` writes"
        )
    if not trusted:
        problem = next(_runs_code(path, found), None)
        if problem is not None:
            raise RecipeError(f"{problem}; {TRUST}")
    for file in _data_files(settings):
        if "://" not in file and not _GLOB & set(file) and not Path(file).exists():
            raise DataError(
                f"{path}: dataset_kwargs.data_files: {file}: no such file; lm-eval reads paths from the current folder"
            )
    return TaskFile(name, path, settings)


@dataclass
class _File:
    """What stands in a file and its includes."""

    settings: dict[str, Any] = field(default_factory=dict)
    functions: list[str] = field(default_factory=list)
    """Each `!function` with its place, also where an including file replaces it: lm-eval imports all."""


def _read(path: Path, above: tuple[Path, ...] = ()) -> _File:
    """A file merged with its includes, as lm-eval merges them: the including file's keys win."""
    if not path.is_file():
        where = f"{above[-1]}: include" if above else "--tasks"
        raise RecipeError(f"{where}: {path}: no such file; name a task file of lm-eval, or a folder of them")
    if path.resolve() in [other.resolve() for other in above]:
        raise RecipeError(f"{path}: it includes itself; take the include out")
    found = _File()

    class Loader(yaml.SafeLoader):
        """Safe YAML that notes functions."""

    def function(loader: yaml.SafeLoader, node: yaml.Node) -> str:  # noqa: ARG001 - pyyaml's signature
        found.functions.append(f"{path}:{node.start_mark.line + 1}: !function {node.value} runs Python code")
        return str(node.value)

    Loader.add_constructor("!function", function)
    with disk_errors(path):
        raw = path.read_bytes()
    try:
        given = yaml.load(raw, Loader)
    except yaml.YAMLError as error:
        raise RecipeError(f"{path}: not YAML: {' '.join(str(error).split())}; correct it") from error
    if not isinstance(given, dict):
        raise RecipeError(f"{path}: not a mapping of keys, so no task file of lm-eval; name another file")
    included = given.pop("include", None) or []
    for other in included if isinstance(included, list) else [included]:
        inner = _read(path.parent / str(other), (*above, path))
        found.settings.update(inner.settings)
        found.functions += inner.functions
    found.settings.update({str(key): value for key, value in given.items()})
    return found


def _runs_code(path: Path, found: _File) -> Iterator[str]:
    """What in the file can run code or load what is not a file of rows."""
    settings = found.settings
    yield from found.functions
    for key in ("class", "use_prompt"):
        if key in settings:
            yield f"{path}: {key}: takes code or templates from elsewhere"
    if settings.get("dataset_path") not in DATA:
        yield (
            f"{path}: dataset_path: {settings.get('dataset_path')}: not a file here - write one of {', '.join(DATA)}, "
            "with its files at dataset_kwargs.data_files"
        )
    for file in _data_files(settings):
        if "://" in file:
            yield f"{path}: dataset_kwargs.data_files: {file}: not a file here"
    metrics = settings.get("metric_list") or []
    for metric in metrics if isinstance(metrics, list) else []:
        if isinstance(metric, dict) and metric.get("hf_evaluate"):
            yield f"{path}: metric_list: {metric.get('metric')}: hf_evaluate loads a metric's code"


def _data_files(settings: Mapping[str, Any]) -> Iterator[str]:
    options = settings.get("dataset_kwargs")
    yield from _leaves(options.get("data_files") if isinstance(options, dict) else None)


def _leaves(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    for item in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from _leaves(item)
