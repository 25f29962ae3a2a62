"""How the program ends when something nobody foresaw goes wrong: one line, an exit code, never a traceback."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny_world import rlpost, save_model, save_recipe, save_rows

from rlpost import unexpected

KINDS = [
    (ZeroDivisionError("division by zero"), 1, "unexpected ZeroDivisionError at rlpost/pipeline.py:"),
    (RecursionError("maximum recursion depth exceeded"), 1, "unexpected RecursionError at"),
    (KeyError("answer\nsecond line"), 1, "KeyError"),
    (AssertionError(), 1, "no message"),
    (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."), 1, "max_tokens_per_microbatch"),
    (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate"), 1, "max_tokens_per_microbatch"),
    (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"), 1, "gradient_checkpointing"),
    (MemoryError(), 1, "out of memory at rlpost/pipeline.py:"),
    (OSError(errno.ENAMETOOLONG, "File name too long", "x" * 5000), 5, "File name too long"),
    (PermissionError(errno.EACCES, "Permission denied", "/root/x"), 5, "/root/x: Permission denied"),
]


@pytest.fixture
def recipe(here: Path) -> Path:
    save_model(here / "m")
    save_rows(here / "d.jsonl", [{"prompt": "a", "completion": "b"}] * 2)
    sft = {"kind": "sft", "data": {"c": {"path": "d.jsonl"}}, "steps": 1, "batch_size": 2, "learning_rate": 1e-3}
    return save_recipe(here / "r.yaml", {"model": {"path": "m", "precision": "float32"}, "stages": {"s": sft}})


@pytest.mark.parametrize(
    ("error", "code", "words"), KINDS, ids=[type(e).__name__ + str(i) for i, (e, _, _) in enumerate(KINDS)]
)
def test_an_unforeseen_error_in_a_run_is_one_line_and_a_log_in_the_run(
    error: Exception, code: int, words: str, recipe: Path, monkeypatch, tally
) -> None:
    def fails(*_: object) -> None:
        raise error

    monkeypatch.setattr("rlpost.stages.sft.sft", fails)
    ran = rlpost("train", recipe)
    assert ran.refused(code, words), ran.err
    assert len(ran.line) < 1000
    log = Path("runs/r/error.log")
    assert log.exists() == (code == 1)
    if code == 1:
        assert "runs/r/error.log" in ran.line
        assert "Traceback" in log.read_text()
        assert type(error).__name__ in log.read_text()
    tally("ends: unforeseen errors in a run", refused=1)


def test_outside_a_run_the_log_is_a_temporary_file(here: Path, monkeypatch, tally) -> None:
    def fails(*_: object) -> None:
        raise ValueError("no \x1b[31mgood")

    monkeypatch.setenv("TMPDIR", str(here))
    monkeypatch.setattr("tempfile.tempdir", None)
    monkeypatch.setattr("rlpost.recipe.files.packaged", fails)
    ran = rlpost("show", "demo")
    assert ran.refused(1, "unexpected ValueError at rlpost/recipe/files.py:", "no good")
    (log,) = here.glob("rlpost-*.log")
    assert str(log) in ran.line
    assert "Traceback" in log.read_text()
    assert unexpected.explained(ValueError("x"), here / "no" / "folder").args[0].count("could not be written") == 1
    tally("ends: unforeseen errors elsewhere", refused=2)


@pytest.mark.parametrize("interrupted", [KeyboardInterrupt(), ImportError("half-loaded")])
def test_ctrl_c_is_130_whatever_it_comes_out_as(interrupted: BaseException, recipe: Path, monkeypatch, tally) -> None:
    def fails(*_: object) -> None:
        try:
            raise KeyboardInterrupt
        except KeyboardInterrupt:
            if isinstance(interrupted, ImportError):
                raise interrupted from None
            raise

    monkeypatch.setattr("rlpost.recipe.files.packaged", fails)
    ran = rlpost("show", "demo")
    assert (ran.code, ran.out, ran.err) == (130, "", "")
    tally("ends: Ctrl-C", right=1)


INTERRUPTED = """
import os, signal, sys
# A shell starts what runs in the background with SIGINT ignored.
signal.signal(signal.SIGINT, signal.default_int_handler)
class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == {name!r}:
            os.kill(os.getpid(), signal.SIGINT)
sys.meta_path.insert(0, Finder())
sys.argv = ["rlpost", *{words}]
from rlpost.__main__ import main
main()
"""


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("rlpost.cli", ["list"]),
        ("typer", ["list"]),
        ("pydantic", ["show", "demo"]),
        ("hydra", ["show", "demo", "stages.sft.learning_rate='1e-3'"]),
        ("torch._C", ["train", "demo", "--dry-run"]),
    ],
)
def test_ctrl_c_while_modules_are_imported(name: str, words: list[str], here: Path, tally) -> None:
    code = INTERRUPTED.format(name=name, words=words)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "")
    tally("ends: Ctrl-C", right=1)


def shell(line: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """A line of shell with `rlpost` for this one."""
    env = {**os.environ, "RLPOST": f"{sys.executable} -m rlpost", **environment}
    return subprocess.run(
        ["bash", "-c", line.replace("rlpost", "$RLPOST")], capture_output=True, text=True, env=env, timeout=120
    )


@pytest.mark.parametrize(
    ("line", "code", "said"),
    [
        ("rlpost list | head -1; exit ${PIPESTATUS[0]}", (0, 141), ""),  # 0 if it was faster than head
        ("rlpost list >/dev/full", (5,), "rlpost: stdout: No space left on device"),
        ("rlpost list >&-", (0,), ""),
        ("rlpost list <&- >&- 2>&-", (0,), ""),
        ("PYTHONIOENCODING=ascii rlpost list", (0,), ""),
        ("LC_ALL=C PYTHONUTF8=0 PYTHONCOERCECLOCALE=0 rlpost show no_sùch", (2,), "rlpost: no_s"),
        (r"rlpost show $'\xff'", (2,), "rlpost: ?: an argument that is not UTF-8"),
        (r"printf '\xff' | PYTHONUTF8=1 LC_ALL=C rlpost sample no_model", (2,), "rlpost: PROMPT: stdin is not UTF-8"),
    ],
)
def test_streams_that_are_closed_or_full_or_know_few_letters(
    line: str, code: tuple[int, ...], said: str, here: Path, tally
) -> None:
    done = shell(line)
    assert done.returncode in code, done.stderr
    assert done.stderr.startswith(said)
    assert done.stderr.count("\n") == bool(said)
    assert "Error" not in done.stderr
    tally("ends: closed, full and narrow streams", right=not said, refused=bool(said))


def test_a_missing_argument_is_one_line(here: Path, tally) -> None:
    for words, said in [
        (["trian"], "No such command 'trian'. Did you mean 'train'?"),
        (["train"], "Missing argument 'RECIPE' - see `rlpost train --help`"),
        (["sample", "m", "x", "--temperature", "hot"], "'--temperature'"),
        (["sample", "m", "x", "--temperature", "0"], "--temperature: expected more than 0"),
        (["verify", "everything"], "'everything' is not one of 'objectives', 'goals'"),
    ]:
        ran = rlpost(*words)
        assert ran.refused(2, said), ran.err
        assert ran.err.count("\n") == 1
        tally("ends: wrong command lines", refused=1)


def test_a_very_long_word_does_not_hide_the_message(here: Path) -> None:
    ran = rlpost("show", "a" * 6000)
    assert ran.refused(2, "aaa...aaa", "no packaged recipe")
    assert len(ran.line) < 600
