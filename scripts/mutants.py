"""Whether tests notice a wrong line: single lines of the package are changed, one at a time, and tests run on it.

    python scripts/mutants.py [--only objectives/kl ...] [--jobs 2] [--list]

scripts/mutants.yaml lists the changes by area and file, with the tests that are to notice. Those of the objectives are
shown to `rlpost verify` as well. The package is changed in a copy. Exits 1 if less is caught than SHARES says or a
survivor is not explained, and 2 if a line to change is no longer there exactly once or tests fail without any change.
"""

from __future__ import annotations

import argparse
import compileall
import json
import os
import py_compile
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[1]
LIST = Path(__file__).with_suffix(".yaml")
NEEDED = (
    *("rlpost", "tests", "scripts", "recipes", "docs", "pyproject.toml"),
    *("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "AGENTS.md"),
)
SHARES = {"tests": 0.97, "verify": 0.60}
"""Of all changes, and of those in VERIFIED."""
VERIFIED = "objectives"
LONGEST = 150.0
"""Seconds; a change that makes tests run on for ever has been noticed."""
HEAVY = (
    "torch",
    "transformers",
    "peft",
    "accelerate",
    "datasets",
    "scipy.stats",
    "hypothesis",
    "typer",
    "hydra",
    "pytest",
)
"""Imported once, before each change gets a process of its own: everything slow but the package itself."""
MODELS = ("AutoModelForCausalLM", "LlamaForCausalLM", "GPT2LMHeadModel", "PreTrainedTokenizerFast")


STOPPED: list[int] = []
"""The signal that asked this process to end: not raised, since it may come in the midst of a fork."""


@dataclass(frozen=True)
class Mutant:
    """One line, changed."""

    area: str
    file: str
    find: str
    put: str
    tests: tuple[str, ...]
    equivalent: str = ""
    """Why nothing can notice it."""

    @property
    def name(self) -> str:
        """One line for people."""
        return f"{self.file.removeprefix('rlpost/')}: {self.find}  →  {self.put or '(nothing)'}"


@dataclass(frozen=True)
class Outcome:
    """What noticed a change."""

    mutant: Mutant
    by_tests: bool
    by_verify: bool | None
    """None where it is not asked."""
    seconds: float


def read(path: Path = LIST) -> list[Mutant]:
    """The list."""
    found = []
    for area, files in yaml.safe_load(path.read_text("utf-8")).items():
        for file, told in files.items():
            for entry in told["mutants"]:
                find, put, *why = entry
                found.append(Mutant(area, file, find, put, tuple(told["tests"]), *why))
    return found


def misplaced(mutants: Sequence[Mutant], root: Path = ROOT) -> list[str]:
    """What is wrong with the list: lines that are not there exactly once, tests that are not there."""
    wrong = []
    for m in mutants:
        source = (root / m.file).read_text("utf-8") if (root / m.file).is_file() else ""
        if source.count(m.find) != 1:
            wrong.append(f"{m.file}: {m.find!r} is there {source.count(m.find)} times, not once; choose another line")
        elif "\n" in m.find + m.put or m.find == m.put:
            wrong.append(f"{m.file}: {m.find!r} is to be one line, and changed")
        wrong += [f"{m.file}: no tests {t}" for t in m.tests if not (root / t.partition("::")[0]).is_file()]
    names = [m.name for m in mutants]
    return wrong + sorted({f"twice in the list: {n}" for n in names if names.count(n) > 1})


@contextmanager
def copied() -> Iterator[Path]:
    """A copy of the project, compiled so that a changed file is seen whatever its time and size."""
    with tempfile.TemporaryDirectory(prefix="mutants-") as folder:
        root = Path(folder)
        for name in NEEDED:
            source = ROOT / name
            if source.is_dir():
                shutil.copytree(source, root / name, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copy(source, root / name)
        compileall.compile_dir(root / "rlpost", quiet=1, invalidation_mode=py_compile.PycInvalidationMode.CHECKED_HASH)
        yield root


@contextmanager
def mutated(root: Path, mutant: Mutant) -> Iterator[None]:
    """The copy with one line changed."""
    file = root / mutant.file
    source = file.read_text("utf-8")
    file.write_text(source.replace(mutant.find, mutant.put), "utf-8")
    try:
        yield
    finally:
        file.write_text(source, "utf-8")


def run_tests(root: Path, tests: Sequence[str]) -> int:
    """pytest's exit code."""
    import pytest

    quiet = ["-x", "-q", "--no-header", "--tb=line", "--disable-warnings", "-p", "no:cacheprovider", "-p", "no:xdist"]
    return int(pytest.main([*quiet, f"--rootdir={root}", *tests]))


def run_verify() -> int:
    """0 where every claim holds."""
    from rlpost.oracle.verify import verify

    return 0 if verify(models=False).ok and verify().ok else 1


def in_child(root: Path, work: Callable[[], int]) -> int | None:
    """The exit code of `work` in a process of its own that imports the package from `root`; None after LONGEST."""
    output = root / "output.txt"
    child = os.fork()
    if child == 0:
        os.setsid()
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        sys.dont_write_bytecode = True
        # Compiled functions of changed sources stay in the copy, too.
        os.environ.update(PYTHONPATH=str(root), PYTHONDONTWRITEBYTECODE="1", XDG_CACHE_HOME=str(root / "cache"))
        os.chdir(root)
        sys.path.insert(0, str(root))
        with output.open("w") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        code = 1
        try:
            code = work()
        except BaseException as error:
            print(f"{type(error).__name__}: {error}")
        finally:
            with suppress(Exception):
                sys.stdout.flush()
            os._exit(code)
    began = time.monotonic()
    try:
        while time.monotonic() - began < LONGEST:
            done, status = os.waitpid(child, os.WNOHANG)
            if done:
                return os.waitstatus_to_exitcode(status)
            if STOPPED:
                sys.exit(128 + STOPPED[0])
            time.sleep(0.02)
        return None
    finally:
        # What a test started and left behind ends with it, and so it does where this program is stopped.
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(child, signal.SIGKILL)
        with suppress(ChildProcessError):
            os.waitpid(child, 0)


def try_one(root: Path, mutant: Mutant) -> Outcome:
    """Change, test, change back."""
    began = time.monotonic()
    with mutated(root, mutant):
        code = in_child(root, lambda: run_tests(root, mutant.tests))
        if code in (4, 5):
            raise SystemExit(f"{mutant.name}: pytest found nothing to run: {(root / 'output.txt').read_text()}")
        seen = in_child(root, run_verify) != 0 if mutant.area == VERIFIED else None
    return Outcome(mutant, code != 0, seen, time.monotonic() - began)


def try_some(mutants: Sequence[Mutant]) -> list[Outcome]:
    """The outcomes of one worker's share, in a copy of its own; what fails unchanged is an error."""
    with copied() as root:
        for tests in dict.fromkeys(m.tests for m in mutants):
            if in_child(root, lambda tests=tests: run_tests(root, tests)) != 0:  # type: ignore[misc]
                raise SystemExit(f"{' '.join(tests)} fail without any change:\n{(root / 'output.txt').read_text()}")
        if any(m.area == VERIFIED for m in mutants) and in_child(root, run_verify) != 0:
            raise SystemExit("rlpost verify fails without any change")
        found = []
        for mutant in mutants:
            found.append(try_one(root, mutant))
            o = found[-1]
            seen = [name for name, by in (("tests", o.by_tests), ("verify", o.by_verify)) if by]
            print(f"{o.seconds:5.1f} s  {' and '.join(seen) or 'SURVIVED':18} {mutant.name}", flush=True)
        return found


def shared_out(mutants: Sequence[Mutant], jobs: int) -> list[list[Mutant]]:
    """Whole test files to each worker, so that each runs few of them unchanged."""
    by_tests: dict[tuple[str, ...], list[Mutant]] = {}
    for m in mutants:
        by_tests.setdefault(m.tests, []).append(m)
    shares: list[list[Mutant]] = [[] for _ in range(jobs)]
    for some in sorted(by_tests.values(), key=len, reverse=True):
        min(shares, key=len).extend(some)
    return [share for share in shares if share]


def in_workers(shares: Sequence[Sequence[Mutant]]) -> list[Outcome]:
    """The outcomes of all shares, each in a process of its own.

    Raises:
        RuntimeError: a worker ended without its outcomes, having said why.
    """
    import multiprocessing

    fork = multiprocessing.get_context("fork")
    with tempfile.TemporaryDirectory(prefix="mutants-") as folder:
        files = [Path(folder) / f"{k}.json" for k in range(len(shares))]
        workers = [fork.Process(target=_work, args=both) for both in zip(shares, files, strict=True)]
        try:
            for worker in workers:
                worker.start()
            while any(worker.is_alive() for worker in workers) and not STOPPED:
                time.sleep(0.2)
        finally:
            for worker in workers:
                worker.terminate()
                worker.join()
        if any(worker.exitcode for worker in workers):
            raise RuntimeError("not all changes were tried")
        found = [json.loads(file.read_text("utf-8")) for file in files]
    return [
        Outcome(m, *said) for share, own in zip(shares, found, strict=True) for m, said in zip(share, own, strict=True)
    ]


def _work(share: Sequence[Mutant], file: Path) -> None:
    found = [(o.by_tests, o.by_verify, o.seconds) for o in try_some(share)]
    file.write_text(json.dumps(found), "utf-8")


def percent(part: int, whole: int) -> str:
    return f"{part}/{whole} = {100 * part / whole:.0f} %" if whole else "–"


def report(outcomes: Sequence[Outcome]) -> bool:
    """Print the table and the survivors; whether the targets are met."""
    areas = dict.fromkeys(o.mutant.area for o in outcomes)
    print(f"\n{'area':14} {'changes':>8} {'caught by tests':>20} {'caught by verify':>20}")
    for area in [*areas, "all"]:
        own = [o for o in outcomes if area in (o.mutant.area, "all")]
        asked = [o for o in own if o.by_verify is not None]
        tests, seen = sum(o.by_tests for o in own), sum(bool(o.by_verify) for o in asked)
        print(f"{area:14} {len(own):8} {percent(tests, len(own)):>20} {percent(seen, len(asked)):>20}")
    left = [o.mutant for o in outcomes if not o.by_tests]
    for m in left:
        print(f"survived the tests: {m.name}\n    {m.equivalent or 'NOT EXPLAINED'}")
    for m in (o.mutant for o in outcomes if o.by_tests and o.mutant.equivalent):
        print(f"caught, though it was said that nothing could: {m.name}\n    {m.equivalent}")
    asked = [o for o in outcomes if o.by_verify is not None]
    met = {
        "tests": sum(o.by_tests for o in outcomes) >= SHARES["tests"] * len(outcomes),
        "verify": sum(bool(o.by_verify) for o in asked) >= SHARES["verify"] * len(asked),
        "explained": all(m.equivalent for m in left),
    }
    for name in (name for name, true in met.items() if not true):
        print(f"below target: {name}")
    return all(met.values())


def preload() -> None:
    """Import what is slow, with one thread a process."""
    import importlib

    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("ACCELERATE_USE_CPU", "true")
    found: dict[str, Any] = {name: importlib.import_module(name) for name in HEAVY}
    for name in MODELS:
        getattr(found["transformers"], name)
    assert "rlpost" not in sys.modules


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--only", nargs="+", default=[], metavar="TEXT", help="areas, or parts of lines as --list prints them"
    )
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--list", action="store_true", help="print the changes and run nothing")
    args = parser.parse_args()
    everything = read()
    if wrong := misplaced(everything):
        print("\n".join(wrong), file=sys.stderr)
        return 2
    mutants = [m for m in everything if not args.only or any(t == m.area or t in m.name for t in args.only)]
    if args.list or not mutants:
        print("\n".join(f"{m.area:12} {m.name}" for m in mutants) or "no such changes", file=sys.stdout)
        return 0 if mutants else 2
    preload()
    signal.signal(signal.SIGTERM, lambda number, _: STOPPED.append(number))
    try:
        outcomes = in_workers(shared_out(mutants, args.jobs))
    except RuntimeError as error:
        print(error, file=sys.stderr)
        return 2
    return 0 if report(outcomes) else 1


if __name__ == "__main__":
    sys.exit(main())
