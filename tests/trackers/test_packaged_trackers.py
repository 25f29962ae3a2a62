"""TensorBoard, wandb, MLflow and trackio, each offline: what they wrote is read back and compared with the logs."""

from __future__ import annotations

import importlib
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from reading import READ, Found, logged
from test_pipeline import EVALUATION
from tiny_recipes import GRPO, SFT, run, sha256, write

pytestmark = pytest.mark.extras

STAGES = {
    "sft": {**SFT, "steps": 9, "checkpoint_every": 3},
    "grpo": {**GRPO, "steps": 6, "checkpoint_every": 2, "table_every": 2, "eval_every": 2},
}
FAILING = {
    "tensorboard": "tensorboard.summary.writer.record_writer:RecordWriter.write",
    "wandb": "wandb:Run.log",
    "mlflow": "mlflow:MlflowClient.log_batch",
    "trackio": "trackio:log",
}
KILLED = """\
import sys
sys.path[:0] = [{tests!r}]
from processes import Trap
for target, at in {traps!r}:
    Trap(target, at).set()
from rlpost.cli.app import main
sys.argv = ["rlpost", *sys.argv[1:]]
main()
"""


@pytest.fixture(autouse=True)
def offline(monkeypatch, tmp_path):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> Path:
    """The same run without a tracker, never interrupted."""
    folder = tmp_path_factory.mktemp("plain")
    run(folder, STAGES, evaluation=EVALUATION)
    return folder / "runs/run"


def command(folder: Path, *words: str, traps: tuple[tuple[str, int], ...] = ()) -> subprocess.CompletedProcess[str]:
    """`rlpost train` on the recipe of the folder in a process of its own, which may be killed by a trap."""
    script = KILLED.format(tests=str(Path(__file__).parents[1]), traps=traps)
    return subprocess.run(
        [sys.executable, "-c", script, "train", str(folder / "tiny.yaml"), *words],
        capture_output=True,
        text=True,
        env={**os.environ, "TRACKIO_DIR": str(folder / "trackio")},
        timeout=150,
    )


def same_files(run: Path, plain: Path) -> None:
    """Trackers change no bit of training or of its logs."""
    kept = [*plain.glob("*/metrics.jsonl"), *plain.glob("*/final/*.safetensors"), *plain.glob("evaluation/*.jsonl")]
    assert len(kept) == 2 + 2 + 3
    for file in kept:
        assert sha256(run / file.relative_to(plain)) == sha256(file), file


def whole(name: str, found: Found, run: Path) -> None:
    """One run, in which all that is logged stands once."""
    assert len(found.runs) == 1
    evaluations = {key: value for key, value in found.numbers.items() if key[0].startswith("evaluation/")}
    trained = {key: value for key, value in found.numbers.items() if key not in evaluations}
    expected = logged(run, "sft", "grpo")
    if name == "tensorboard":
        expected = {key: [float(np.float32(value))] for key, (value,) in expected.items()}
    assert trained == expected
    assert {step for _, step in evaluations} == {0, 1, 2}
    assert {name for name, _ in evaluations} >= {
        "evaluation/greedy",
        "evaluation/sampled/low",
        "evaluation/greedy/high",
    }
    assert all(len(values) == 1 for values in evaluations.values())
    assert set(found.tables) == {
        *(("grpo/samples", step) for step in (1, 2, 4, 6)),
        *((f"evaluation/{key}", step) for step in (0, 1, 2) for key in ("samples", "stages")),
    }
    assert all(len(tables) == 1 for tables in found.tables.values())
    answers = (run / "evaluation/grpo.jsonl").read_text("utf-8")
    assert '"prompt": "' in answers
    prompt = answers.partition('"prompt": "')[2].partition('"')[0]
    assert prompt in found.tables["evaluation/samples", 2][0]
    assert "learning_rate" in found.config


@pytest.mark.parametrize("name", READ)
def test_a_run_killed_twice_stands_in_the_tracker_once(tmp_path, plain, name):
    write(tmp_path, STAGES, evaluation=EVALUATION)
    here = tmp_path / "runs/run"
    words = [f"logging={name}"]
    # Within sft's fifth step, when the tracker has it and the journal does not say so yet.
    first = command(tmp_path, *words, traps=(("rlpost.trackers.mirror:encode_line", 3 + 5),))
    assert first.returncode == -signal.SIGKILL, first.stderr
    assert len(logged(here, "sft")) == 5 * len(logged(plain, "sft")) / 9
    # After grpo's second step, which comes after sft's 4th to 9th; nothing was closed.
    second = command(tmp_path, *words, traps=(("rlpost.run.stage:StageDirectory.timing", 6 + 2),))
    assert second.returncode == -signal.SIGKILL, second.stderr
    third = command(tmp_path, *words)
    assert third.returncode == 0, third.stderr
    assert third.stdout == f"{here}/grpo/final\n"
    assert "warning" not in third.stderr
    same_files(here, plain)
    found = READ[name](tmp_path / "runs")
    whole(name, found, here)
    again = command(tmp_path, *words)
    assert again.returncode == 0, again.stderr
    assert READ[name](tmp_path / "runs").numbers == found.numbers


@pytest.mark.parametrize("name", FAILING)
def test_a_tracker_that_fails_is_said_once_and_catches_up(tmp_path, plain, name, monkeypatch, capsys):
    module, _, path = FAILING[name].partition(":")
    owner = importlib.import_module(module)
    *owners, method = path.split(".")
    for part in owners:
        owner = getattr(owner, part)
    call, calls = getattr(owner, method), []

    def fails(*args, **kwargs):
        calls.append(args)
        if len(calls) > 8:
            raise OSError(28, "No space left on device")
        return call(*args, **kwargs)

    with monkeypatch.context() as patched:
        patched.setattr(owner, method, fails)
        run(tmp_path, STAGES, f"logging={name}", evaluation=EVALUATION)
    said = capsys.readouterr().err
    assert said.count("warning") == 1
    assert f"{name} failed (OSError: [Errno 28] No space left on device); the run goes on" in " ".join(said.split())
    same_files(tmp_path / "runs/run", plain)
    assert len(READ[name](tmp_path / "runs").numbers) < len(logged(tmp_path / "runs/run", "sft", "grpo"))
    run(tmp_path, STAGES, f"logging={name}", evaluation=EVALUATION)
    assert "warning" not in capsys.readouterr().err
    whole(name, READ[name](tmp_path / "runs"), tmp_path / "runs/run")


def test_trackers_are_imported_only_when_they_are_asked_for(tmp_path):
    write(tmp_path, {"sft": {**SFT, "steps": 1}})
    script = (
        "import sys\nfrom pathlib import Path\nimport rlpost\n"
        "rlpost.train(sys.argv[1])\n"
        "print([n for n in ('wandb', 'mlflow', 'trackio', 'rlpost.trackers.wandb') if n in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", script, tmp_path / "tiny.yaml"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("[]\n")


def test_wandb_without_a_login_is_refused_at_once(tmp_path, monkeypatch):
    write(tmp_path, {"sft": SFT})
    monkeypatch.setenv("WANDB_MODE", "online")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    refused = command(tmp_path, "logging=wandb")
    assert refused.returncode == 2
    assert "logging.to: wandb: No API key configured" in refused.stderr
    assert "WANDB_MODE=offline" in refused.stderr
    assert not (tmp_path / "runs/run/sft").exists()
