"""Which level is taken: the strongest that holds, and the weakest for nobody who has not named it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from attempts import NAKED

from rlpost.errors import RecipeError, RewardError
from rlpost.sandbox import levels, process
from rlpost.sandbox import run as running
from rlpost.sandbox.levels import choose, why_not
from rlpost.sandbox.outcome import Level, Limits, Outcome, Reason
from rlpost.sandbox.process import Broken, execute
from rlpost.sandbox.run import run
from rlpost.sandbox.seccomp import ALLOWED, ARCHITECTURES, ARGUMENTS, program

HEADERS = {
    "x86_64": Path("/usr/include/x86_64-linux-gnu/asm/unistd_64.h"),
    "aarch64": Path("/usr/include/aarch64-linux-gnu/asm/unistd.h"),
}


@pytest.fixture(autouse=True)
def _looked_at_again() -> Iterator[None]:
    why_not.cache_clear()
    yield
    why_not.cache_clear()


def lacking(monkeypatch: pytest.MonkeyPatch, *lacks: Level) -> None:
    """Let some levels not be had."""

    def refused(text: str, stdin: str, limits: Limits, level: Level) -> Outcome:
        if level in lacks:
            raise Broken("unshare: Operation not permitted (EPERM)")
        return execute(text, stdin, limits, level)

    monkeypatch.setattr(levels, "execute", refused)


def test_the_strongest_that_holds_is_taken(monkeypatch: pytest.MonkeyPatch):
    assert choose() is Level.namespaces
    why_not.cache_clear()
    lacking(monkeypatch, Level.namespaces)
    assert choose() is Level.landlock
    assert choose("landlock") is Level.landlock
    with pytest.raises(RecipeError) as raised:
        choose("namespaces")
    assert str(raised.value) == (
        "sandbox: level namespaces is not to be had here: unshare: Operation not permitted (EPERM); "
        "`rlpost doctor` says which are"
    )


def test_resource_limits_alone_are_never_chosen(monkeypatch: pytest.MonkeyPatch):
    lacking(monkeypatch, Level.namespaces, Level.landlock)
    with pytest.raises(
        RecipeError, match=r"none holds on this machine .* or set level: rlimits, with which they may do"
    ):
        choose()
    assert choose("rlimits") is Level.rlimits


def test_a_level_that_lets_something_through_does_not_hold(monkeypatch: pytest.MonkeyPatch):
    """As if a kernel had said yes to everything, and done nothing."""
    monkeypatch.setattr(levels, "execute", lambda text, stdin, limits, _: execute(text, stdin, limits, Level.rlimits))
    reason = why_not(Level.landlock)
    assert reason.startswith("it does not hold: a program read a file, wrote a file, emptied a file, ")
    assert "opened a socket, opened a local socket, started a process" in reason


def test_a_level_without_python_does_not_hold(monkeypatch: pytest.MonkeyPatch):
    python, _ = process._python()
    monkeypatch.setattr(process, "_python", lambda: (python, [python]))  # without its libraries
    assert why_not(Level.landlock).endswith("(EACCES)")
    monkeypatch.setattr(running, "choose", Level)
    with pytest.raises(
        RewardError, match=r"sandbox: level landlock could not be made: .*; `rlpost doctor` looks at it"
    ):
        run("print(1)", level="landlock")


def test_an_unknown_machine_has_none(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("platform.machine", lambda: "riscv64")
    assert why_not(Level.namespaces) == "there is none for linux on riscv64"


@pytest.mark.parametrize("machine", ARCHITECTURES)
def test_the_numbers_of_calls_are_those_of_the_kernel(machine: str):
    """Against the C library's headers, where they are installed; each number once in any case."""
    which = ARCHITECTURES[machine][0]
    entries = [entry.split() for entry in ALLOWED.replace("\n", " ").split(",")]
    numbers = {name: int(both[which]) for name, *both in entries if both[which] != "-"}
    numbers |= {name: both[which] for name, both in ARGUMENTS.items() if both[which] is not None}
    assert len(set(numbers.values())) == len(numbers)
    if HEADERS[machine].is_file():
        words = [line.split() for line in HEADERS[machine].read_text("ascii").splitlines()]
        known = {word[1].removeprefix("__NR_"): int(word[2]) for word in words if len(word) == 3 and word[2].isdigit()}
        assert {name: known[name] for name in numbers if name in known} == {
            name: number for name, number in numbers.items() if name in known
        }
        assert len(numbers.keys() & known.keys()) > 100
    rules = program(machine)
    assert rules is not None
    assert len(rules) % 8 == 0


@pytest.mark.parametrize("limits", [{"seconds": 0}, {"memory": 63}, {"output": -1}, {"files": float("nan")}])
def test_limits_that_are_none_are_refused(limits: dict[str, float]):
    with pytest.raises(RecipeError, match=next(iter(limits))):
        Limits(**limits)  # type: ignore[arg-type]


def test_programs_are_read_and_answered_as_they_are():
    found = run(
        "print(input() + 'ä')\nimport sys\nprint(len(sys.stdin.read()), file=sys.stderr)", stdin="ö\n" + "x" * 300_000
    )
    assert (found.stdout, found.stderr, found.reason, found.code) == ("öä\n", "300000\n", Reason.ended, 0)
    assert run("print('unread')", stdin="x" * 3_000_000).stdout == "unread\n"
    for text in ("print(1", "x = 1\0", "x = '\ud800'", "# coding: none"):
        found = run(text)
        assert (found.reason, found.succeeded) == (Reason.ended, False), text
    first, second = run("print({'a', 'b', 'c', 'd'})"), run("print({'a', 'b', 'c', 'd'})")
    assert first.stdout == second.stdout


AS_USER = """
import json, os, subprocess, sys, tempfile
from pathlib import Path
from attempts import BODIES, NAKED, together
from rlpost.sandbox.levels import why_not
from rlpost.sandbox.outcome import Level, Limits
from rlpost.sandbox.run import run

victim = subprocess.Popen(["/bin/sleep", "60"])
found = {}
for level in Level:
    with tempfile.TemporaryDirectory() as there:
        for name in ("secret", "to_empty", "to_void", "to_cut", "to_delete", "to_rename", "to_take"):
            Path(there, name).write_text("not for programs")
        given = json.dumps({"there": there, "victim": victim.pid, "port": 9})
        names = frozenset(BODIES) if level is not Level.rlimits else NAKED
        outcome = run(together(names), stdin=given, limits=Limits(seconds=60, cpu_seconds=20, disk=8), level=level)
        found[level] = json.loads(outcome.stdout)
        Path(f"/dev/shm/{Path(there).name}").unlink(missing_ok=True)
victim.kill()
victim.wait()
print(json.dumps(found))
"""


@pytest.mark.slow
def test_it_holds_for_an_ordinary_user_too(tmp_path: Path):
    """Two seconds. Root runs it as one, by an interpreter that everybody may run."""
    python, somebody = sys.executable, {}
    if os.geteuid() == 0:
        python = shutil.which("python3", path="/usr/bin:/usr/local/bin") or ""
        asked = "import sys; print(sys.version_info >= (3, 11))"
        if not python or subprocess.run([python, "-c", asked], capture_output=True, text=True).stdout != "True\n":
            pytest.skip("there is no Python that everybody may run, of version 3.11 or later, in /usr/bin")
        somebody = {"user": 65533, "group": 65533, "extra_groups": []}
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [python, "-B", "-c", AS_USER],
        env={"PYTHONPATH": f"{root}:{Path(__file__).parent}"},
        cwd="/",
        capture_output=True,
        text=True,
        **somebody,  # type: ignore[call-overload]
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert (found["namespaces"], found["landlock"]) == ([], [])
    assert NAKED - set(found["rlimits"]) == {
        *("connect by TCP", "connect to a socket in a folder", "connect to an abstract socket"),  # nobody listens
        *("send from one of a pair", "signal a group", "write to Python"),  # nor leads a group, and Python is root's
    }
