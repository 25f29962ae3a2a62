"""Recipes of random trees, changed recipes, random bytes and random overrides: resolved, or refused in a message.

    python scripts/fuzz_recipes.py                        # 10,000 cases, counted by kind
    python scripts/fuzz_recipes.py --first 4211 --cases 1 # one again

A case fails when anything but a RecipeError is raised, when its message is longer than three lines, when a resolved
recipe does not resolve to itself, or when it takes a second of CPU time or 300 MB. Batches run in processes of their
own, whose peak is no less than that of any case in them.
"""

from __future__ import annotations

import argparse
import collections
import copy
import json
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from rlpost.errors import RecipeError
from rlpost.recipe.files import packaged, packaged_folder
from rlpost.recipe.resolve import resolve

BATCH = 50
SECONDS = 1.0
MEGABYTES = 300
LONGEST = 3000
"""Characters of a message; the command line cuts its words besides."""
HANGS = 20
"""Seconds after which a case is ended."""
SCALARS: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 2, 3.5, -0.0, 1e-3, 1e308, 10**30, 10**200, float("nan"), float("inf")),
    *(
        "",
        " ",
        "a",
        "x y",
        "é",
        "日本",
        "\U0001f600",
        "\t",
        "a\nb",
        "\x7f",
        "\u2028",
        "null",
        "yes",
        "no",
        "1",
        "1e3",
        "~",
    ),
    *("???", "${", "${}", "${vars.a}", "${vars.data}", "${.a}", "${..x}", "${a.b[0]}", "\\${x}", "${oc.env:HOME}"),
    *(
        "${vars.${vars.a}}",
        "${stages}",
        "${model.path}",
        "x${seed}y",
        "$",
        "{",
        "[1",
        "'",
        '"',
        "a: b",
        "#",
        "&a",
        "*a",
    ),
    *(
        "mine.py:f",
        "a.py:",
        ":f",
        ".py:f",
        "../x.py:f",
        "/etc/passwd",
        "~root",
        "~nobody_here/x",
        "/dev/zero",
        "..",
        ".",
    ),
    *("addition.train", "math_answer", "dpo", "sft", "grpo", "start", "base", "local", "2024-01-01", "12:30:00", "010"),
    *("x" * 300, "y." * 2000, "${vars.a}" * 50, "[" * 60),
)
LETTERS = "abcxyz_019 .:,-[]{}()'\"\\$=#&*!|>%@~+\n\t\0é"
VALUES = (
    *("1", "0", "-1", "1e9", "nan", "inf", "1.5", "true", "null", "''", '""', "'a, b'", "a,b", "[1,2]", "[]", "{}"),
    *(
        "{a: 1}",
        "{a: {b: [1, {c: d}]}}",
        "[[[[1]]]]",
        "range(1,3)",
        "choice(a,b)",
        "glob(*)",
        "interval(0,1)",
        "int(3)",
    ),
    *("sort(3,1)", "shuffle(1,2)", "tag(a, 1)", "str([1])", "${vars.a}", "${oc.env:HOME}", "${", "'${vars.a}'", "???"),
    *("[1", "{a", "'", '"', "\\", "a=b", "a:b", "~", "~root", "#", "é", "\x00", "a b", "\n", "9" * 4000, "x" * 25000),
    *("mine.py:f", "{fn: dpo}", "[{fn: length}]", "{fn: mine.py:f}", "{kind: sft}", "sft", "[a, b]", "{1: 2}", "{: }"),
)


@dataclass(frozen=True)
class Case:
    """A recipe and its overrides."""

    kind: str
    recipe: str | bytes
    """The name of a packaged one, or a file's contents."""
    overrides: tuple[str, ...] = ()


@cache
def raw(name: str) -> Any:
    return yaml.safe_load((packaged_folder() / f"{name}.yaml").read_text("utf-8"))


@cache
def key_paths() -> list[str]:
    """Key paths that stand in packaged recipes, as overrides name them."""
    found = {path for name in packaged() for path, _ in _places(raw(name)) if path}
    return sorted(".".join(map(str, path)) for path in found)


@cache
def keys() -> list[str]:
    return sorted({key for path in key_paths() for key in path.split(".")})


def _places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[tuple[Any, ...], Any]]:
    yield path, value
    for key, inner in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        yield from _places(inner, (*path, key))


def scalar(rng: random.Random) -> Any:
    if rng.random() < 0.2:
        return "".join(rng.choice(LETTERS) for _ in range(rng.randrange(12)))
    return rng.choice(SCALARS)


def key(rng: random.Random) -> Any:
    chance = rng.random()
    return rng.choice(keys()) if chance < 0.85 else scalar(rng) if chance < 0.97 else rng.choice((1, 2.5, None, True))


def tree(rng: random.Random, depth: int = 4) -> Any:
    """A value of any kind, most of its keys words of rlpost's own."""
    chance = rng.random()
    if depth == 0 or chance < 0.35:
        return scalar(rng)
    if chance < 0.37:
        value = scalar(rng)
        for _ in range(rng.randrange(150)):
            value = [value] if rng.random() < 0.5 else {"a": value}
        return value
    if chance < 0.38:
        return {f"k{i}": scalar(rng) for i in range(300)}
    size = rng.randrange(5)
    if chance < 0.55:
        return [tree(rng, depth - 1) for _ in range(size)]
    return {key(rng): tree(rng, depth - 1) for _ in range(size)}


def random_tree(rng: random.Random, _: Sequence[str]) -> Case:
    top = ("vars", "model", "stages", "evaluation", "defaults", "rollouts", "run", "runs", "folder", "seed", "threads")
    recipe = {rng.choice(top) if rng.random() < 0.9 else key(rng): tree(rng) for _ in range(rng.randrange(1, 7))}
    if rng.random() < 0.5:
        kind = rng.choice(("sft", "dpo", "grpo", "ppo", "pairs", "kto", "value", "guided", "reward_model", "x"))
        recipe["stages"] = {"s": {"kind": kind, **{key(rng): tree(rng, 3) for _ in range(rng.randrange(5))}}}
    return Case("random tree", dumped(recipe))


def dumped(recipe: Any) -> bytes:
    plain = copy.deepcopy(recipe)
    return yaml.dump(plain, Dumper=_Dumper, sort_keys=False, allow_unicode=True).encode("utf-8", "surrogatepass")


class _Dumper(yaml.SafeDumper):
    def ignore_aliases(self, data: Any) -> bool:  # noqa: ARG002 - the base class's signature
        return True


def changed_recipe(rng: random.Random, names: Sequence[str]) -> Case:
    recipe = copy.deepcopy(raw(rng.choice(names)))
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        inner = [(path, value) for path, value in _places(recipe) if path]
        if not inner:
            break
        path, value = rng.choice(inner)
        owner: Any = recipe
        for step in path[:-1]:
            owner = owner[step]
        how = rng.choice(("drop", "replace", "replace", "rename", "wrap", "insert", "swap", "fill"))
        if how == "drop":
            del owner[path[-1]]
        elif how == "rename" and isinstance(owner, dict):
            owner[key(rng)] = owner.pop(path[-1])
        elif how == "insert" and isinstance(owner, dict):
            owner[key(rng)] = tree(rng, 2)
        elif how == "insert":
            owner.append(copy.deepcopy(value))
        elif how == "fill":
            owner[path[-1]] = "???" if rng.random() < 0.3 else scalar(rng)
        elif how == "swap":
            owner[path[-1]] = copy.deepcopy(rng.choice(inner)[1])
        else:
            owner[path[-1]] = [value] if how == "wrap" else tree(rng, 2)
    return Case("changed recipe", dumped(recipe), some_overrides(rng, recipe) if rng.random() < 0.3 else ())


def changed_text(rng: random.Random, names: Sequence[str]) -> Case:
    text = (packaged_folder() / f"{rng.choice(names)}.yaml").read_text("utf-8")
    for _ in range(rng.randrange(1, 6)):
        i = rng.randrange(len(text) + 1)
        j = min(len(text), i + rng.randrange(30))
        lines = text.split("\n")
        at = rng.randrange(len(lines))
        how = rng.choice(("cut", "insert", "snippet", "repeat", "indent", "end", "swap"))
        if how == "cut":
            text = text[:i] + text[j:]
        elif how == "insert":
            text = text[:i] + rng.choice(LETTERS) + text[i:]
        elif how == "snippet":
            text = text[:i] + str(scalar(rng)) + text[i:]
        elif how == "end":
            text = text[: max(i, 20)]
        else:
            other = rng.randrange(len(lines))
            if how == "swap":
                lines[at], lines[other] = lines[other], lines[at]
            elif how == "repeat":
                lines.insert(other, lines[at])
            else:
                lines[at] = " " * rng.randrange(1, 5) + lines[at]
            text = "\n".join(lines)
    return Case("changed text", text.encode("utf-8", "surrogatepass"))


def random_bytes(rng: random.Random, names: Sequence[str]) -> Case:
    text = (packaged_folder() / f"{rng.choice(names)}.yaml").read_bytes()
    how = rng.randrange(6)
    if how == 0:
        return Case("bytes", rng.randbytes(rng.randrange(2000)))
    if how == 1:
        return Case("bytes", text.decode("utf-8").encode(rng.choice(("utf-16", "utf-32", "utf-8-sig", "utf-7"))))
    if how == 2:
        return Case(
            "bytes",
            rng.choice((b"!!binary ", b"!!set ", b"!!python/object/apply:os.system ", b"%YAML 9\n---\n")) + text,
        )
    if how == 3:
        return Case(
            "bytes", rng.choice((b"", b"\n", b"---\n---\n", b"null", b"[]", b"a", b"- " * 300, b"? " * 90, b"{" * 400))
        )
    data = bytearray(text)
    for _ in range(rng.randrange(1, 10)):
        data[rng.randrange(len(data))] = rng.randrange(256)
    return Case("bytes", bytes(data))


def some_overrides(rng: random.Random, recipe: Any) -> tuple[str, ...]:
    """One to three of them, most for keys that stand in the recipe, and some of these with the value that they have."""
    own = {".".join(map(str, path)): value for path, value in _places(recipe) if path}
    return tuple(_override(rng, own) for _ in range(rng.randrange(1, 4)))


def _override(rng: random.Random, own: dict[str, Any]) -> str:
    chance = rng.random()
    if chance < 0.6 and own:
        path = rng.choice(list(own))
        if rng.random() < 0.4 and isinstance(own[path], str | int | float):
            return f"{path}={own[path]}"
    else:
        path = rng.choice(key_paths()) if chance < 0.8 else ".".join(str(key(rng)) for _ in range(rng.randrange(1, 5)))
    if rng.random() < 0.2:
        changed = (f"{path}.{key(rng)}", f"{path}[{rng.randrange(3)}]", f"+{path}", f"~{path}", f"{path}@x", path[:-1])
        path = rng.choice((*changed, path.upper()))
    value = rng.choice(VALUES) if rng.random() < 0.8 else "".join(rng.choice(LETTERS) for _ in range(rng.randrange(20)))
    return f"{path}{rng.choice((*['='] * 9, '==', '', ' = ', '+='))}{value}"


def overrides(rng: random.Random, names: Sequence[str]) -> Case:
    name = rng.choice(names)
    return Case("overrides", name, some_overrides(rng, raw(name)))


MAKERS: tuple[Callable[[random.Random, Sequence[str]], Case], ...] = (
    *(random_tree, random_tree, changed_recipe, changed_recipe, changed_recipe, changed_text),
    *(random_bytes, overrides, overrides, overrides),
)


def case(number: int, names: Sequence[str] = ()) -> Case:
    """The case of that number, the same every time; made from the packaged recipes of these names or of all."""
    return MAKERS[number % len(MAKERS)](random.Random(number), names or packaged())


def outcome(one: Case, folder: Path) -> str:
    """`resolved`, `refused`, or what is wrong; the recipe is written to `folder`, a copy of the packaged ones.

    Raises:
        Exception: a defect; a recipe that is wrong is refused.
    """
    recipe = str(folder / "methods/case.yaml") if isinstance(one.recipe, bytes) else one.recipe
    if isinstance(one.recipe, bytes):
        Path(recipe).write_bytes(one.recipe)
    try:
        whole = resolve(recipe, one.overrides).to_yaml()
    except RecipeError as error:
        message = str(error)
        if not message or len(message.splitlines()) > 3 or len(message) > LONGEST:
            return f"message of {len(message)} characters, {len(message.splitlines())} lines: {message[:200]!r}"
        return "refused"
    again = folder / "again.yaml"
    again.write_text(whole, "utf-8")
    try:
        same = resolve(str(again)).to_yaml() == whole
    except RecipeError as error:
        return f"resolved, and not again: {str(error)[:200]}"
    return "resolved" if same else "resolved again to something else"


class _Hangs(BaseException):
    """A case takes too long."""


def _ring(*_: object) -> None:
    raise _Hangs


def tried(number: int, folder: Path) -> tuple[str, str, float]:
    """Kind, outcome and seconds of CPU time of a case; whatever it raises is its outcome."""
    one, start = case(number), time.process_time()
    signal.setitimer(signal.ITIMER_REAL, HANGS)
    try:
        found = outcome(one, folder)
    except BaseException as error:
        last = traceback.extract_tb(error.__traceback__)[-1]
        found = f"{type(error).__name__} at {Path(last.filename).name}:{last.lineno}: {str(error)[:200]}"
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
    return one.kind, found, time.process_time() - start


def batch(first: int, count: int, folder: Path) -> tuple[list[tuple[str, str, float]], float]:
    """What became of some cases, and the peak memory of the process they ran in, in MB."""
    reader, writer = os.pipe()
    if (child := os.fork()) == 0:
        signal.signal(signal.SIGALRM, _ring)
        resource.setrlimit(resource.RLIMIT_AS, (4 << 30, 4 << 30))
        found = [tried(number, folder) for number in range(first, first + count)]
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1000
        with os.fdopen(writer, "w") as pipe:
            json.dump((found, peak), pipe)
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as pipe:
        said = pipe.read()
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if status != 0 or not said:
        return [("batch", f"its process ended with {status}", 0.0)] * count, 0.0
    found, peak = json.loads(said)
    return [(kind, told, seconds) for kind, told, seconds in found], peak


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--cases", type=int, default=10_000)
    options = parser.parse_args()
    counts: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)
    slowest, most, faults = 0.0, 0.0, 0
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        shutil.copytree(packaged_folder(), folder, dirs_exist_ok=True)
        os.chdir(folder)
        resolve("demo")  # imports what all of them need
        key_paths()
        end = options.first + options.cases
        for first in range(options.first, end, BATCH):
            count = min(BATCH, end - first)
            found, peak = batch(first, count, folder)
            if peak > MEGABYTES:  # which of them?
                for number in range(first, first + count):
                    _, alone = batch(number, 1, folder)
                    if alone > MEGABYTES:
                        print(f"case {number}: {alone:.0f} MB", flush=True)
            most = max(most, peak)
            for number, (kind, told, seconds) in enumerate(found, first):
                slow = seconds > SECONDS
                counts[kind][told if told in ("resolved", "refused") else "failed"] += 1
                counts[kind]["slow"] += slow
                slowest = max(slowest, seconds)
                if slow or told not in ("resolved", "refused"):
                    faults += 1
                    print(f"case {number} ({kind}, {seconds:.2f} s): {told}", flush=True)
    columns = ("resolved", "refused", "failed", "slow")
    print(f"{'kind':<16} {'cases':>6}", *(f"{name:>9}" for name in columns))
    for kind, found_by in sorted(counts.items()):
        total = sum(found_by.values()) - found_by["slow"]
        print(f"{kind:<16} {total:>6}", *(f"{found_by[name]:>9}" for name in columns))
    print(f"slowest case: {slowest:.2f} s of CPU time; largest process: {most:.0f} MB; failed: {faults}")
    sys.exit(bool(faults) or most > MEGABYTES)


if __name__ == "__main__":
    main()
