"""Nothing that a program tries gets it out of the sandbox, at either level; without one, the same attempts do."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from attempts import BODIES, KINDS, NAKED, SYSTEM_CALLS, outside, raw, together

from rlpost.sandbox.levels import why_not
from rlpost.sandbox.outcome import Level, Limits, Outcome, Reason
from rlpost.sandbox.run import run

HELD = (Level.namespaces, Level.landlock)
SMALL = Limits(seconds=60, cpu_seconds=20, disk=8)


@pytest.fixture(name="outside")
def _outside(tmp_path: Path) -> Iterator[dict[str, Any]]:
    """A folder, a process and sockets that a program should not reach."""
    with outside(tmp_path) as given:
        yield given


def printed(outcome: Outcome) -> list[str]:
    assert outcome.succeeded, outcome
    found: list[str] = json.loads(outcome.stdout)
    return found


@pytest.mark.parametrize("level", HELD)
def test_this_machine_has_both_levels(level: Level):
    """Otherwise the tests below would show nothing."""
    assert why_not(level) == ""


@pytest.mark.parametrize("level", HELD)
def test_no_attempt_gets_out(outside: dict[str, Any], level: Level):
    before = {path.name: path.stat() for path in Path(outside["there"]).iterdir()}
    assert printed(run(together(frozenset(BODIES)), stdin=json.dumps(outside), limits=SMALL, level=level)) == []
    after = {path.name: path.stat() for path in Path(outside["there"]).iterdir()}
    assert after == before


def test_the_attempts_get_out_where_there_is_no_sandbox(outside: dict[str, Any]):
    got_out = printed(run(together(NAKED), stdin=json.dumps(outside), limits=SMALL, level=Level.rlimits))
    Path(f"/dev/shm/{Path(outside['there']).name}").unlink()
    assert sorted(NAKED - set(got_out)) == []


def test_the_documentation_counts_the_attempts():
    """Its table is that of scripts/sandbox_escapes.py, which makes them one by one."""
    told = (Path(__file__).parents[2] / "docs/sandbox.md").read_text("utf-8")
    for kind, bodies in KINDS.items():
        naked = len(NAKED & frozenset(bodies))
        assert f"| {kind} | {len(bodies)} | 0 | 0 | {naked} of {naked} |" in told, kind
    assert f"| system calls by number | {len(SYSTEM_CALLS)} | 0 | 0 | " in told


@pytest.mark.slow
@pytest.mark.parametrize("level", HELD)
@pytest.mark.parametrize("name", BODIES)
def test_an_attempt_by_itself_does_not_get_out(outside: dict[str, Any], name: str, level: Level):
    """Half a minute for all: what one has changed for the next, within one program, plays no part."""
    assert printed(run(together(frozenset({name})), stdin=json.dumps(outside), limits=SMALL, level=level)) == []


@pytest.mark.parametrize("level", HELD)
def test_no_other_system_call_is_let_through(level: Level):
    assert printed(run(raw(), level=level)) == []


def test_the_kernel_answers_those_system_calls_otherwise():
    answered = set(printed(run(raw(), level=Level.rlimits)))
    assert {"memfd_create", "socket", "inotify_init1", "setns", "open_tree", "unshare", "shmget", "splice"} <= answered
    assert len(answered) >= len(SYSTEM_CALLS) // 2


INT_80 = """
import ctypes, mmap
code = mmap.mmap(-1, 4096, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
code.write(bytes([0xB8, 20, 0, 0, 0, 0xCD, 0x80, 0xC3]))    # getpid, as 32-bit programs ask for it
print(ctypes.CFUNCTYPE(ctypes.c_int)(ctypes.addressof(ctypes.c_char.from_buffer(code)))() > 0)
"""
EXECS = "import os\nos.execve({path!r}, ['x'], {{}})"


def test_calls_of_another_architecture_end_it():
    if os.uname().machine == "x86_64":
        with ThreadPoolExecutor() as pool:
            held, naked = pool.map(lambda level: run(INT_80, level=level), (Level.landlock, Level.rlimits))
        assert held.reason is Reason.refused
        assert naked.reason is Reason.signal or naked.stdout == "True\n"  # a kernel may know no 32-bit programs
    else:
        assert Path("/proc/sys/abi").exists()


@pytest.mark.parametrize("level", HELD)
def test_another_program_cannot_take_its_place(level: Level, tmp_path: Path):
    script = tmp_path / "script"
    script.write_text("#!/bin/sh\necho out\n")
    script.chmod(0o755)
    outcome = run(EXECS.format(path=str(script)), level=level)
    assert ("Error" in outcome.stderr, outcome.stdout, outcome.code) == (True, "", 1)


@pytest.mark.parametrize("level", HELD)
def test_it_has_three_descriptors_and_may_have_threads(level: Level):
    program = """
import os, threading
print(sum(1 for n in range(3, 1000) if os.path.exists(n)))
threads = [threading.Thread(target=print, args=("thread",)) for _ in range(5)]
for thread in threads: thread.start()
"""
    outcome = run(program, level=level)
    assert (outcome.stdout, outcome.stderr) == ("0\n" + "thread\n" * 5, "")


ENDLESS = {
    "by the clock": ("import time\ntime.sleep(60)", Limits(seconds=0.7)),
    "stopped": (
        "import os, signal\nos.kill(os.getpid(), signal.SIGSTOP)\nimport time\ntime.sleep(60)",
        Limits(seconds=0.7),
    ),
    "computing": ("while True: pass", Limits(cpu_seconds=1)),
    "computing in C": ("print(3 ** (1 << 28))", Limits(cpu_seconds=1)),
    "deaf": (
        "import signal\nfor s in range(1, 65):\n    try: signal.signal(s, signal.SIG_IGN)\n"
        "    except (OSError, ValueError): pass\nwhile True: pass",
        Limits(cpu_seconds=1),
    ),
    "catching": (
        "while True:\n    try:\n        while True: pass\n    except BaseException: pass",
        Limits(cpu_seconds=1),
    ),
}


def test_a_program_does_not_outlast_its_time():
    check_time({name: ENDLESS[name] for name in ("by the clock",)}, Level.namespaces)


@pytest.mark.slow
@pytest.mark.parametrize("level", HELD)
def test_no_program_outlasts_its_time(level: Level):
    """Five seconds a level."""
    check_time(ENDLESS, level)


def check_time(programs: dict[str, tuple[str, Limits]], level: Level) -> None:
    with ThreadPoolExecutor(len(programs)) as pool:
        found = {name: pool.submit(run, text, limits=limits, level=level) for name, (text, limits) in programs.items()}
    assert {name: outcome.result().reason for name, outcome in found.items()} == dict.fromkeys(programs, Reason.time)


FLOODS = {
    "stdout": ("while True: print('x' * 1000)", Limits(output=5000), Reason.output),
    "stderr": ("import sys\nwhile True: sys.stderr.write('x' * 1000)", Limits(output=5000), Reason.output),
    "once": ("print('x' * 6000)", Limits(output=5000), Reason.output),
    "memory": ("held = []\nwhile True: held.append(bytearray(1 << 20))", Limits(memory=128), Reason.memory),
    "recursion": ("def f(): return f()\nf()", Limits(), Reason.ended),
    "segmentation": ("import ctypes\nctypes.string_at(0)", Limits(), Reason.signal),
    "abortion": ("import os\nos.abort()", Limits(), Reason.signal),
    "closed": ("import os\nos.closerange(0, 60)\nos._exit(7)", Limits(), Reason.ended),
    "threads": (
        "import threading, time\n"
        "for _ in range(100): threading.Thread(target=time.sleep, args=[60], daemon=True).start()",
        Limits(),
        Reason.ended,
    ),
}


def test_floods_are_cut_and_crashes_are_told():
    with ThreadPoolExecutor(2) as pool:
        found = {name: pool.submit(run, text, limits=limits) for name, (text, limits, _) in FLOODS.items()}
    outcomes = {name: future.result() for name, future in found.items()}
    assert {name: o.reason for name, o in outcomes.items()} == {name: reason for name, (_, _, reason) in FLOODS.items()}
    assert len(outcomes["stdout"].stdout) == len(outcomes["stderr"].stderr) == len(outcomes["once"].stdout) == 5000
    assert outcomes["closed"].code == 7
    assert "can't start new thread" in outcomes["threads"].stderr


FILLS = """
import os
os.makedirs("shut/within", mode=0o700)
os.mkdir("shut/none", mode=0)
for _ in range(1200):
    os.mkdir("deep")
    os.chdir("deep")
written = 0
try:
    for n in range(12):
        with open(f"{n}", "wb") as file:
            written += file.write(bytes(1 << 20))
except OSError:
    pass
print(written >> 20)
"""


@pytest.mark.parametrize("level", HELD)
def test_what_it_wrote_is_gone(level: Level, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    outcome = run(FILLS, limits=SMALL, level=level)
    # Only a file system of its own is as large as it may be; elsewhere each file is.
    assert outcome.succeeded
    assert int(outcome.stdout) <= 8 if level is Level.namespaces else int(outcome.stdout) == 12
    assert list(tmp_path.iterdir()) == []


DAEMON = """
import os
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        os.close(1)
        os.close(2)
        import time
        time.sleep(3600)
    os._exit(0)
print("left")
"""


def test_even_resource_limits_come_without_rights():
    program = "for line in open('/proc/self/status'):\n    if line[:3] in ('Cap', 'NoN'): print(line.split())"
    held = dict(ast.literal_eval(line) for line in run(program, level=Level.rlimits).stdout.splitlines())
    assert held.pop("NoNewPrivs:") == "1"
    own = dict(line.split() for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("Cap"))
    assert set(held) == set(own)
    assert {name for name, rights in held.items() if int(rights, 16)} <= {"CapBnd:"}
    assert os.geteuid() != 0 or held["CapBnd:"] == "0" * 16


def test_without_a_sandbox_no_daemon_is_left_behind_either(tmp_path: Path):
    before = set(running())
    assert run(DAEMON, level=Level.rlimits).stdout == "left\n"
    assert [pid for pid, line in running().items() if pid not in before and "program.py" in line] == []


def running() -> dict[int, str]:
    """The processes of this machine with their command lines."""
    found = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                found[int(entry.name)] = (
                    (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode("utf-8", "replace")
                )
            except OSError:
                continue  # it has ended meanwhile
    return found


OUTLIVED = "from rlpost.sandbox.run import run\nrun('import time\\ntime.sleep(3600)', level={level!r})"


@pytest.mark.slow
@pytest.mark.parametrize("level", HELD)
def test_it_ends_with_whoever_started_it(level: Level):
    """Two seconds each."""
    trainer = subprocess.Popen(
        [sys.executable, "-c", OUTLIVED.format(level=level.value)], cwd=Path(__file__).parents[2]
    )
    waiting = program = 0
    while not program:
        assert trainer.poll() is None
        for pid in children(trainer.pid):
            waiting, program = pid, next(iter(p for p in children(pid) if "program.py" in running().get(p, "")), 0)
            # The looks for a level come first, and end by themselves.
            time.sleep(0.05)
            program = program if program in children(waiting) else 0
    trainer.kill()
    trainer.wait()
    while {waiting, program} & set(running()):
        time.sleep(0.01)


def children(pid: int) -> list[int]:
    try:
        return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []
