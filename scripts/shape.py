"""The shape of the package in numbers: its lines, its longest pieces, and how many files a training step takes to read.

    python scripts/shape.py [--package TREE]

A step is traced on a golden run, from the first line of the stage's function to its first logged line. `executed` are
all files of the package in which a function ran until then. `to read` are those that say what the method is: files of
the training side (STEP), and of what it asks (DOORS) those that it calls itself, not what lies behind them. The model,
data, run directories, recipes and the processes of users' code are taken at their word. `in a step` are those that run
from the first logged line to the second: without what only prepares. `imported` are the files of the training side and
the doors that the stage's file imports.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import golden

STAGES = {"grpo": "grpo", "dpo": "dpo", "ppo": "ppo"}
"""A stage's kind, with the golden run that has it."""
STEP = ("stages", "train", "objectives", "types", "groups", "experience", "learner", "loop", "schedules")
DOORS = ("engine", "environments", "rewards", "rollout", "goals")


class Trace:
    """The files of a package that a stage runs through, up to its first logged line and from there to the second."""

    def __init__(self, package: Path, kind: str) -> None:
        self.package = f"{package}/"
        self.kind = kind
        self.begun = False
        self.logged = 0
        self.again: set[str] = set()
        self.executed: set[str] = set()
        self.read: set[str] = set()

    def __call__(self, frame: FrameType, event: str, _arg: Any) -> None:
        """Note the file of a function that is called."""
        file = self.of(frame)
        if event != "call" or file is None:
            return
        self.begun |= frame.f_code.co_name == self.kind and file.startswith("stages/")
        if not self.begun:
            return
        caller = self.caller(frame)
        told = _part(file) in STEP or (_part(file) in DOORS and _part(caller) in STEP)
        if not self.logged:
            self.executed.add(file)
        if told:
            (self.again if self.logged else self.read).add(file)

    def of(self, frame: FrameType) -> str | None:
        """The package's file that a frame is in."""
        file = frame.f_code.co_filename
        return file.removeprefix(self.package) if file.startswith(self.package) else None

    def caller(self, frame: FrameType) -> str:
        """The package's file that called, if by way of others' code."""
        above = frame.f_back
        while above is not None and self.of(above) is None:
            above = above.f_back
        return (above and self.of(above)) or ""


def _part(file: str) -> str:
    return file.split("/")[0].removesuffix(".py")


def traced(package: Path, kind: str) -> Trace:
    """A step of the kind's golden run."""
    from rlpost.run.stage import StageDirectory

    run = next(run for run in golden.listed() if run.key == STAGES[kind])
    trace, log = Trace(package, kind), StageDirectory.log

    def logged(stage: Any, step: int, metrics: Any) -> None:
        trace.logged += trace.begun
        if trace.logged == 2:
            sys.setprofile(None)
        log(stage, step, metrics)

    StageDirectory.log = logged
    kept = [os.dup(number) for number in (1, 2)]
    try:
        with tempfile.TemporaryDirectory() as folder:
            sys.setprofile(trace)
            golden.perform(run, Path(folder))
    finally:
        sys.setprofile(None)
        StageDirectory.log = log
        for number, copy in enumerate(kept, 1):
            os.dup2(copy, number)
    return trace


def imported(package: Path, kind: str) -> set[str]:
    """The files of the training side and the doors that the stage's file imports, itself among them."""
    file = next(f for f in package.glob("stages/**/*.py") if _defines(f, kind))
    found = {str(file.relative_to(package))}
    for node in ast.walk(ast.parse(file.read_text("utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "rlpost":
            here = node.module.replace(".", "/").removeprefix("rlpost").lstrip("/")
            found |= {f"{here}.py", *(f"{here}/{name.name}.py".lstrip("/") for name in node.names)}
    return {f for f in found if _part(f) in (*STEP, *DOORS) and (package / f).is_file()}


def _defines(file: Path, name: str) -> bool:
    tree = ast.parse(file.read_text("utf-8"))
    return any(isinstance(node, ast.FunctionDef) and node.name == name for node in tree.body)


def functions(tree: ast.AST, inside: str = "") -> Iterator[tuple[int, str]]:
    """Every function with its lines."""
    for node in ast.iter_child_nodes(tree):
        named = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)
        name = f"{inside}.{node.name}".lstrip(".") if named else inside
        if named and not isinstance(node, ast.ClassDef):
            yield node.end_lineno - node.lineno + 1, name
        yield from functions(node, name)


def engines(trees: dict[str, ast.Module]) -> tuple[set[str], list[str]]:
    """The classes that are engines (they generate, and are no protocol), and the places that make one."""
    classes = [node for tree in trees.values() for node in ast.walk(tree) if isinstance(node, ast.ClassDef)]
    names = {
        c.name
        for c in classes
        if not any("Protocol" in ast.unparse(base) for base in c.bases)
        and any(isinstance(f, ast.FunctionDef) and f.name == "generate" for f in c.body)
    }
    made = [
        f"{file}:{node.lineno}"
        for file, tree in trees.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] in names
    ]
    return names, made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--package", type=Path, default=golden.ROOT, help="the tree that is looked at (this one)")
    tree = parser.parse_args().package.resolve()
    package = tree / "rlpost"
    texts = {str(f.relative_to(package)): f.read_text("utf-8") for f in sorted(package.rglob("*.py"))}
    trees = {file: ast.parse(text) for file, text in texts.items()}
    lengths = {file: len(text.splitlines()) for file, text in texts.items()}
    print(f"lines               {sum(lengths.values())} in {len(lengths)} files")
    print(f"longest files       {', '.join(f'{f} {lengths[f]}' for f in sorted(lengths, key=lengths.get)[:-4:-1])}")
    longest = sorted(((n, f"{file}:{name}") for file, t in trees.items() for n, name in functions(t)), reverse=True)
    print(f"longest functions   {', '.join(f'{name} {n}' for n, name in longest[:3])}")
    names, made = engines(trees)
    files = {place.split(":")[0] for place in made}
    print(f"makes an engine     {len(made)} in {len(files)} files ({', '.join(sorted(names))}): {', '.join(made)}")
    with contextlib.redirect_stderr(None):
        golden.prepare(tree)
    for kind in STAGES:
        trace, named = traced(package, kind), imported(package, kind)
        counts = f"{len(trace.read)} to read, {len(trace.again)} in a step"
        print(f"{kind:20}{counts}, {len(trace.executed)} executed, {len(named)} imported")
        print(f"    in a step: {' '.join(sorted(trace.again))}")
        print(f"    before it: {' '.join(sorted(trace.read - trace.again))}")


if __name__ == "__main__":
    main()
