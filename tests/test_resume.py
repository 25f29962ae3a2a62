"""A run that was killed, or asked to stop, ends as one that went through: the same weights and logs, bit for bit."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from processes import Trap, finish, start, wait_until
from safetensors.torch import load_file
from tiny_recipes import DPO, GRPO, PAIRS, PREFERENCES, SFT, jsonl, run, sha256, write

from rlpost.cli.app import main
from rlpost.recipe.resolve import resolve
from rlpost.run.layout import open_run
from rlpost.run.stage import StageDirectory
from rlpost.train.learner import Learner

pytestmark = pytest.mark.case

EVERY = {"steps": 9, "checkpoint_every": 3, "keep_checkpoints": 1}
STAGES = {
    "sft": {
        **SFT,
        **EVERY,
        "data": {
            # Answers drawn anew each time, from two sources, more than an epoch of one of them.
            "careless": {**SFT["data"]["problems"], "augment": {"fn": "addition.careless_teacher"}},
            "few": {"task": {"fn": "addition.held_out"}, "limit": 10, "weight": 0.5},
        },
    },
    "pairs": PAIRS,
    "dpo": {**DPO, **EVERY, "data": {"own": {"stage": "pairs"}}, "nll_coef": 0.1},
    "grpo": {**GRPO, **EVERY, "num_minibatches": 2, "kl": {"beta": 0.05}, "reference": "sft"},
}
WAYS = {
    "full": (),
    # With dropout, for which the random generator's state counts.
    "lora": ("model.lora={r: 4, alpha: 8, dropout: 0.1}",),
}
KILLS = [
    Trap("rlpost.run.stage:StageDirectory.log", 5),  # sft, in the middle of step 5
    Trap("rlpost.run.files:write_manifest", 1),  # sft, while the checkpoint of step 6 is written
    Trap("rlpost.stages.pairs:collect", 1),  # pairs, before anything is there
    Trap("rlpost.run.stage:write_atomic", 1),  # pairs, between its result and DONE
    Trap("rlpost.run.stage:StageDirectory.timing", 4),  # dpo, step 4 logged by half
    Trap("rlpost.train.learner:Learner.update", 4),  # dpo, in step 7, after the checkpoint of step 6
    Trap("rlpost.train.learner:Learner.update", 3 + 12),  # dpo's last 3, then grpo, between the two updates of step 6
    Trap("rlpost.run.stage:remove_folder", 1),  # grpo, between a new checkpoint and the removal of the old
    Trap("rlpost.stages.context:save_policy", 1),  # grpo, while its result is written from the state of step 9
]


def left(run: Path) -> dict[str, str]:
    """sha256 of all that must not depend on where the run was interrupted."""
    kept = [*run.glob("*/final/*.safetensors"), *run.glob("*/metrics.jsonl"), *run.glob("*/rollouts/*")]
    return {str(f.relative_to(run)): sha256(f) for f in [*kept, run / "pairs/final/rows.jsonl"] if f.is_file()}


def steps_logged(run: Path, stage: str) -> int:
    log = run / stage / "metrics.jsonl"
    return log.read_bytes().count(b"\n") if log.exists() else 0


def command(monkeypatch, *words: str) -> int:
    monkeypatch.setattr(sys, "argv", ["rlpost", *words])
    try:
        main()
    except SystemExit as stop:
        return int(stop.code or 0)
    return 0


@pytest.mark.parametrize("way", [pytest.param(way, marks=[pytest.mark.slow] * (way == "lora")) for way in WAYS])
def test_killed_twice_in_every_stage_it_ends_as_if_it_had_gone_through(tmp_path, way, tally):
    run(tmp_path, STAGES, *WAYS[way], "run=whole")
    words = ["train", str(tmp_path / "tiny.yaml"), *WAYS[way]]
    reached = []
    for kill in KILLS:
        assert finish(words, tmp_path / "killed", kill) == -signal.SIGKILL, kill
        assert (tmp_path / "killed.out").read_text() == ""
        reached.append([steps_logged(tmp_path / "runs/run", stage) for stage in ("sft", "dpo", "grpo")])
    assert reached == [
        *([4, 0, 0], [6, 0, 0], [9, 0, 0], [9, 0, 0], [9, 4, 0], [9, 6, 0]),
        *([9, 9, 5], [9, 9, 6], [9, 9, 9]),
    ]
    assert finish(words, tmp_path / "resumed") == 0
    assert (tmp_path / "resumed.out").read_text() == f"{tmp_path}/runs/run/grpo/final\n"
    assert "grpo: resumes after step 9 of 9" in (tmp_path / "resumed.err").read_text()
    expected = left(tmp_path / "runs/whole")
    assert len(expected) == 3 + 3 + 9 + 1
    assert left(tmp_path / "runs/run") == expected
    assert not list((tmp_path / "runs/run").rglob("*.tmp-*"))
    for stage in ("sft", "dpo", "grpo"):
        timings = (tmp_path / "runs/run" / stage / "timings.jsonl").read_text("utf-8").splitlines()
        assert [json.loads(line)["step"] for line in timings] == list(range(1, 10))
    tally("kills", right=len(KILLS))


def test_the_command_line_killed_from_outside_and_then_asked_to_stop(tmp_path, tally):
    stages = {"sft": {**STAGES["sft"], "steps": 150}}
    run(tmp_path, stages, "run=whole")
    words = ["train", str(tmp_path / "tiny.yaml")]
    here = tmp_path / "runs/run"

    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    process = subprocess.Popen(
        [sys.executable, "-m", "rlpost", *words], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=environment
    )
    wait_until(lambda: steps_logged(here, "sft") >= 7 or process.poll() is not None)
    process.kill()
    assert process.communicate()[0] == b""
    assert process.returncode == -signal.SIGKILL
    assert not (here / "sft/DONE").exists()

    before = steps_logged(here, "sft")
    stopped = start(words, tmp_path / "stopped")
    wait_until(lambda: steps_logged(here, "sft") >= before + 4 or not stopped.is_alive())
    os.kill(stopped.pid, signal.SIGTERM)
    stopped.join(150)
    assert stopped.exitcode == 143
    last = steps_logged(here, "sft")
    assert (here / f"sft/checkpoints/step-{last:06d}").is_dir()  # not a step is lost
    assert (tmp_path / "stopped.out").read_text() == ""
    said = (tmp_path / "stopped.err").read_text()
    assert f"sft stopped after step {last} with a checkpoint; run the same command to go on" in said

    run(tmp_path, stages)
    assert left(here) == left(tmp_path / "runs/whole")
    tally("kills", right=2)


@pytest.fixture(params=[signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def number(request):
    """A signal that is not ignored, as it may be where the tests run in the background."""
    before = signal.signal(request.param, signal.default_int_handler)
    yield request.param
    signal.signal(request.param, before)


def test_a_signal_is_answered_after_the_step_with_a_checkpoint(tmp_path, number, monkeypatch):
    stages = {"sft": STAGES["sft"]}
    words = ["train", str(write(tmp_path, stages))]
    update = Learner.update

    def trapped(self, *args, **kwargs):
        if self.updates == 4:
            os.kill(os.getpid(), number)
        return update(self, *args, **kwargs)

    with monkeypatch.context() as patched:
        patched.setattr(Learner, "update", trapped)
        assert command(monkeypatch, *words) == 128 + number
    assert steps_logged(tmp_path / "runs/run", "sft") == 5
    assert (tmp_path / "runs/run/sft/checkpoints/step-000005").is_dir()
    run(tmp_path, stages)
    run(tmp_path, stages, "run=whole")
    assert left(tmp_path / "runs/run") == left(tmp_path / "runs/whole")


@pytest.mark.parametrize("name", ["sft", "pairs"])
def test_a_signal_at_the_end_of_a_stage_begins_no_other(tmp_path, name, monkeypatch, capsys):
    stages = {key: STAGES[key] for key in ("sft", "pairs", "dpo")}
    words = ["train", str(write(tmp_path, stages))]
    finish_stage = StageDirectory.finish

    def trapped(self, *args, **kwargs):
        if self.path.name == name:
            os.kill(os.getpid(), signal.SIGTERM)
        return finish_stage(self, *args, **kwargs)

    with monkeypatch.context() as patched:
        patched.setattr(StageDirectory, "finish", trapped)
        assert command(monkeypatch, *words) == 143
    following = {"sft": "pairs", "pairs": "dpo"}[name]
    assert f"stopped before {following}; run the same command to go on" in capsys.readouterr().err
    assert (tmp_path / "runs/run" / name / "DONE").exists()
    assert not (tmp_path / "runs/run" / following).exists()
    assert command(monkeypatch, *words) == 0


def stopped_in_dpo(folder: Path, monkeypatch, optimizer: str = "adamw", *overrides: str) -> list[str]:
    """A run on pairs.jsonl that stopped in step 5, and the words of its command."""
    file = write(folder, {"dpo": {**DPO, **EVERY, "optimizer": optimizer}})
    update = Learner.update

    def failing(self, *args, **kwargs):
        if self.updates == 4:
            raise KeyboardInterrupt
        return update(self, *args, **kwargs)

    with monkeypatch.context() as patched:
        patched.setattr(Learner, "update", failing)
        assert command(monkeypatch, "train", str(file), *overrides) == 130
    return ["train", str(file), *overrides]


def test_another_learning_rate_is_refused_with_the_difference(tmp_path, monkeypatch, capsys):
    words = stopped_in_dpo(tmp_path, monkeypatch)
    capsys.readouterr()
    assert command(monkeypatch, *words, "stages.dpo.learning_rate=2e-3") == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert "stages.dpo.learning_rate: 0.001 -> 0.002" in err
    assert "--allow-change" in err
    assert command(monkeypatch, *words, "stages.dpo.learning_rate=2e-3", "--allow-change") == 0
    assert "resumes after step 3 of 9" in capsys.readouterr().err
    assert json.loads((tmp_path / "runs/run/dpo/metrics.jsonl").read_text().splitlines()[3])["learning_rate"] > 1e-3


@pytest.mark.parametrize("optimizer", ["muon", pytest.param("adamw_8bit", marks=pytest.mark.extras)])
@pytest.mark.parametrize("way", [[], ["model.lora={r: 128, alpha: 128}"]], ids=["full", "lora"])
def test_every_optimizer_goes_on_as_if_it_had_not_stopped(tmp_path, monkeypatch, optimizer, way):
    wide = "model.config.hidden_size=64"  # moments of 8 bits are those of matrices of 4096 numbers
    words = stopped_in_dpo(tmp_path, monkeypatch, optimizer, wide, *way)
    assert command(monkeypatch, *words) == 0
    assert command(monkeypatch, *words, "run=whole") == 0
    assert left(tmp_path / "runs/run") == left(tmp_path / "runs/whole")
    steps = load_file(tmp_path / "runs/run/dpo/checkpoints/step-000009/optimizer.safetensors")
    assert any(key.endswith({"muon": "/momentum_buffer", "adamw_8bit": "/absmax1"}[optimizer]) for key in steps)


def test_a_stage_does_not_go_on_with_another_optimizer(tmp_path, monkeypatch, capsys):
    words = stopped_in_dpo(tmp_path, monkeypatch, "muon")
    capsys.readouterr()
    assert command(monkeypatch, *words, "stages.dpo.optimizer=adamw", "--allow-change") == 2
    said = capsys.readouterr().err
    assert 'stages.dpo.optimizer: "muon" -> "adamw"' in said
    assert "the checkpoints of dpo stand on it" in said


def test_settings_that_change_no_weight_may_change(tmp_path, monkeypatch, capsys):
    words = stopped_in_dpo(tmp_path, monkeypatch)
    assert command(monkeypatch, *words, "stages.dpo.checkpoint_every=1", "description=more of them") == 0
    assert "resumes after step 3 of 9" in capsys.readouterr().err


def test_changed_data_is_refused_unless_it_is_allowed(tmp_path, monkeypatch, capsys):
    words = stopped_in_dpo(tmp_path, monkeypatch)
    jsonl(tmp_path / "pairs.jsonl", [{**PREFERENCES[0], "chosen": "99"}, *PREFERENCES[1:]])
    capsys.readouterr()
    assert command(monkeypatch, *words) == 3
    assert "the data has changed since this run began" in capsys.readouterr().err
    assert command(monkeypatch, *words, "--allow-change") == 0
    jsonl(tmp_path / "pairs.jsonl", PREFERENCES)


def test_data_with_other_rows_than_before_is_refused_even_then(tmp_path, monkeypatch, capsys):
    words = stopped_in_dpo(tmp_path, monkeypatch)
    jsonl(tmp_path / "pairs.jsonl", PREFERENCES[:5])
    capsys.readouterr()
    assert command(monkeypatch, *words, "--allow-change") == 3
    assert "[9] rows when this run began and has [5] now" in capsys.readouterr().err


def test_two_runs_in_one_directory(tmp_path, monkeypatch, capsys):
    file = write(tmp_path, {"sft": SFT})
    resolved = resolve(str(file))
    with open_run(resolved.tree, resolved.file, resolved.overrides):
        assert command(monkeypatch, "train", str(file)) == 7
    assert f"in use by process {os.getpid()}" in capsys.readouterr().err
    assert command(monkeypatch, "train", str(file)) == 0
