"""Servers that the run starts: what they are started with, and that nothing of them outlives the run."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from processes import wait_until

from rlpost.engine import vllm_started
from rlpost.engine.params import EngineChoice
from rlpost.engine.vllm_command import as_flags, gpus, must_have_program
from rlpost.engine.vllm_started import Started, give_back, taken
from rlpost.errors import EngineError, RecipeError

PROGRAM = Path(__file__).parents[1] / "fake_vllm_program.py"


@pytest.fixture
def program(tmp_path, monkeypatch) -> str:
    monkeypatch.setenv("ABOUT", str(tmp_path / "about"))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    file = tmp_path / "vllm"
    file.write_text(f"#!{sys.executable}\n{PROGRAM.read_text('utf-8')}", "utf-8")
    file.chmod(0o755)
    return str(file)


def pids(tmp_path: Path) -> list[int]:
    return list(json.loads((tmp_path / "about").read_text("utf-8"))["pids"])


def is_gone(pid: int) -> bool:
    """Ended, and at most not yet noticed by its parent."""
    try:
        return Path(f"/proc/{pid}/stat").read_text("utf-8").rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


def server(program: str, *flags: str) -> Started:
    return Started(program, flags, {"ADDED": "1"}, "a model", "rollouts")


def test_it_is_started_as_it_is_told_and_ends_with_all_its_processes(program, tmp_path):
    started = server(program, "--dtype", "float32")
    started.start("/models/llama", Path("/weights"))
    about = json.loads((tmp_path / "about").read_text("utf-8"))
    port = started.url.rpartition(":")[2]
    here = ["--tokenizer", "/weights", "--host", "127.0.0.1", "--port", port]
    assert about["argv"] == ["serve", "/models/llama", "--dtype", "float32", *here]
    assert about["added"] == "1"
    assert started.lives
    started.end()
    assert not started.lives
    wait_until(lambda: all(map(is_gone, about["pids"])), 30)
    assert not list(tmp_path.glob("*.log"))


def test_a_server_that_is_killed_leaves_no_process_and_is_seen_to_have_ended(program, tmp_path):
    started = server(program)
    started.start("m", tmp_path)
    first, child = pids(tmp_path)
    os.kill(first, signal.SIGKILL)
    wait_until(lambda: not started.lives, 30)
    wait_until(lambda: is_gone(child), 30)
    assert started.cause().startswith("exit code 137 after it said nothing (all of it: /")
    (log,) = tmp_path.glob("*.log")
    started.start("m", tmp_path)  # again
    assert log.is_file()
    assert started.lives
    assert first not in pids(tmp_path)
    started.end()


RUN = """
import sys, time
from pathlib import Path
from rlpost.engine.vllm_started import Started
Started(sys.argv[1], (), {}, "m", "rollouts").start("m", Path("t"))
print("up", flush=True)
time.sleep(600)
"""


def test_nothing_is_left_of_a_server_whose_run_is_killed(program, tmp_path):
    with subprocess.Popen([sys.executable, "-c", RUN, program], stdout=subprocess.PIPE, text=True) as run:
        assert run.stdout is not None
        assert run.stdout.readline() == "up\n"
        server_and_child = pids(tmp_path)
        assert not any(map(is_gone, server_and_child))
        run.kill()
    wait_until(lambda: all(map(is_gone, server_and_child)), 30)


def test_a_server_that_ends_while_it_starts_is_told_with_its_first_error(program, tmp_path):
    started = server(program, "--error", "Model architectures ['BartModel'] are not supported for now.")
    with pytest.raises(EngineError) as told:
        started.start("m", tmp_path)
    (log,) = tmp_path.glob("*.log")
    assert str(told.value) == (
        f"rollouts: {program} serve ended while it started: ValueError: Model architectures ['BartModel'] are not "
        f"supported for now. (all of it: {log})"
    )
    assert "INFO 11-30 loading" in log.read_text("utf-8")


def test_one_that_never_answers_is_given_up(program, tmp_path, monkeypatch):
    monkeypatch.setattr(vllm_started, "STARTING", 0.0)
    monkeypatch.setattr(vllm_started, "_healthy", lambda url: False)
    with pytest.raises(EngineError, match="does not answer after 0 s: it said nothing"):
        server(program).start("m", tmp_path)


def test_a_server_is_kept_for_an_engine_that_wants_the_same(program, tmp_path):
    first = server(program)
    first.start("m", tmp_path)
    give_back(first, usable=True)
    assert taken(server(program)) is first
    assert taken(server(program)) is None  # it is in use
    give_back(first, usable=True)
    assert taken(server(program, "--max-model-len", "9")) is None
    assert not first.lives  # its memory is another's now


def test_arguments_are_flags():
    args = {"max_model_len": 9, "enforce_eager": True, "async_scheduling": False, "revision": None}
    more = {"hf_overrides": {"a": [1]}, "lora_target_modules": ["q_proj", "v_proj"]}
    assert as_flags(args | more) == (
        *("--max-model-len", "9", "--enforce-eager", "--no-async-scheduling"),
        *("--hf-overrides", '{"a": [1]}', "--lora-target-modules", "q_proj", "v_proj"),
    )


@pytest.mark.parametrize(
    ("chosen", "visible", "count", "own", "expected"),
    [
        ([], None, 4, 1, ["1", "2", "3"]),
        ([], None, 2, 2, ["0", "1"]),
        ([0], None, 2, 1, ["0"]),
        ([], "4,6,7", 3, 1, ["6", "7"]),
        ([2], "4,6,7", 3, 1, ["7"]),
    ],
)
def test_a_server_has_the_gpus_that_have_no_process_of_the_run(chosen, visible, count, own, expected):
    assert gpus(chosen, visible, count, own) == expected


def test_a_gpu_that_is_not_there_is_refused():
    with pytest.raises(RecipeError, match=r"rollouts\.devices: 3, but the run sees 2 GPUs"):
        gpus([3], None, 2, 1)


def test_an_address_without_a_scheme_is_refused():
    chosen = EngineChoice(engine="vllm_server", urls=["http://there:8000", "localhost:8000"])
    (problem,) = chosen.problems("rollouts")
    assert problem == "rollouts.urls[1]: 'localhost:8000' is no address - write it like http://localhost:8000"


def test_a_command_that_is_not_there_is_refused_before_anything_loads():
    chosen = EngineChoice(engine="vllm_server", program="/nowhere/vllm")
    with pytest.raises(RecipeError, match=r"^stages\.grpo\.rollouts\.program: there is no command /nowhere/vllm"):
        must_have_program(chosen, "stages.grpo.rollouts")
    must_have_program(EngineChoice(engine="vllm_server", urls=["http://there:8000"], program="vllm"), "rollouts")
