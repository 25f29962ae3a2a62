"""The directory of a stage: checkpoints, resume, logs, the result."""

import json
import os
import resource
import shutil
from pathlib import Path

import pytest
import torch

from rlpost.errors import DiskError
from rlpost.run.manifest import verify
from rlpost.run.stage import StageDirectory


def save(stage: StageDirectory, step: int, keep: int = 2):
    stage.log(step, {"loss": 1 / step})
    stage.timing(step, {"seconds": step / 2})
    stage.rollouts(step, [{"prompt": "1+1=", "completion": "2", "reward": 1.0}])
    return stage.save(step, {"model": {"w": torch.tensor([float(step)])}}, {"cursor": step}, keep)


@pytest.fixture
def stage(tmp_path: Path) -> StageDirectory:
    return StageDirectory(tmp_path / "sft")


@pytest.fixture
def heard(monkeypatch) -> list[str]:
    lines: list[str] = []
    monkeypatch.setattr("rlpost.console.warn", lines.append)
    return lines


def steps(stage: StageDirectory) -> list[str]:
    return sorted(p.name for p in (stage.path / "checkpoints").iterdir())


def everything(folder: Path) -> list[str]:
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*"))


def test_a_checkpoint_gives_back_what_was_saved(stage):
    saved = save(stage, 3)
    found = stage.latest()
    assert found == saved
    assert found.step == 3
    assert found.state["cursor"] == 3
    sizes = {name: written["size"] for name, written in found.state["logs"].items()}
    rollouts = (stage.path / "rollouts/step-000003.jsonl").stat().st_size
    assert sizes == {"metrics.jsonl": 40, "timings.jsonl": 28, "rollouts/step-000003.jsonl": rollouts}
    assert (stage.path / "metrics.jsonl").read_text() == '{"step": 3, "loss": 0.3333333333333333}\n'
    assert found.tensors("model")["w"].tolist() == [3.0]
    assert everything(found.path) == ["MANIFEST.json", "model.safetensors", "state.json"]
    assert len({p.stat().st_mode for p in found.path.iterdir()}) == 1, "readable by the same people"


def as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().flatten().clone(memory_format=torch.contiguous_format).view(torch.uint8)


def test_every_kind_of_tensor_comes_back_bit_for_bit(stage):
    base = torch.arange(12, dtype=torch.float32).reshape(3, 4)
    tensors = {
        "scalar": torch.tensor(2.5, dtype=torch.float64),
        "int64": torch.tensor([2**62, -1]),
        "uint8": torch.arange(5, dtype=torch.uint8),
        "bool": torch.tensor([True, False]),
        "bf16": torch.tensor([1.0, 3.14159, float("nan"), float("inf")], dtype=torch.bfloat16),
        "f16": torch.tensor([65504.0, 1e-7], dtype=torch.float16),
        "empty": torch.empty(0, 3),
        "empty too": torch.empty(0),
        "transposed": base.T,
        "whole": base,
        "row": base[1],
        "step": base[::2, ::2],
        "expanded": torch.tensor(7.0).expand(2, 2),
        "trained": torch.nn.Parameter(torch.ones(2)),
    }
    saved = stage.save(1, {"all": tensors, "none": {}}, {}, keep=1)
    found = saved.tensors("all")
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype, name
        assert found[name].shape == tensor.shape, name
        assert torch.equal(as_bytes(found[name]), as_bytes(tensor)), name
    assert saved.tensors("none") == {}


def test_loaded_tensors_do_not_depend_on_the_file(stage):
    checkpoint = stage.save(1, {"model": {"w": torch.ones(4096)}}, {}, keep=1)
    loaded = checkpoint.tensors("model")["w"]
    with (checkpoint.path / "model.safetensors").open("r+b") as file:
        file.write(bytes(checkpoint.path.joinpath("model.safetensors").stat().st_size))
    assert loaded.sum() == 4096


def test_the_newest_are_kept(stage):
    for step in (1, 2, 3, 4):
        save(stage, step)
    assert steps(stage) == ["step-000003", "step-000004"]
    save(stage, 1_000_000, keep=1)
    assert steps(stage) == ["step-1000000"]
    assert stage.latest().step == 1_000_000


def damages(path: Path):
    """(what is done, does it) for one file, as in a verify trial."""
    data = path.read_bytes()

    def cut(length):
        return lambda: path.write_bytes(data[:length])

    def flip(bit):
        return lambda: path.write_bytes(
            data[: bit // 8] + bytes([data[bit // 8] ^ (1 << bit % 8)]) + data[bit // 8 + 1 :]
        )

    yield "removed", path.unlink
    for length in {0, 1, len(data) // 2, len(data) - 1}:
        yield f"cut to {length}", cut(length)
    for bit in range(0, len(data) * 8, max(1, len(data) // 4)):
        yield f"bit {bit}", flip(bit)


def test_every_damage_to_the_newest_checkpoint_is_found_and_the_one_before_is_used(stage, heard):
    save(stage, 1)
    save(stage, 2)
    trials = 0
    for name in ("MANIFEST.json", "state.json", "model.safetensors"):
        path = stage.path / "checkpoints" / "step-000002" / name
        whole = path.read_bytes()
        for what, damage in damages(path):
            damage()
            found = stage.latest()
            assert found.step == 1, (name, what)
            assert len(heard) == 1, (name, what)
            assert "step-000002: " in heard[0]
            assert name in heard[0]
            assert heard[0].endswith("; going on from step-000001")
            heard.clear()
            path.write_bytes(whole)
            trials += 1
    assert trials > 90
    assert stage.latest().step == 2
    assert heard == []


def test_resume_takes_back_what_came_after_the_checkpoint(stage):
    save(stage, 1)
    save(stage, 2)
    logs = {name: (stage.path / name).read_bytes() for name in ("metrics.jsonl", "timings.jsonl")}
    stage.log(3, {"loss": 0.5})
    with (stage.path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "lo')
    stage.timing(3, {"seconds": 1.0})
    stage.rollouts(3, [])
    (stage.path / "checkpoints" / "step-000003.tmp-99").mkdir()
    (stage.path / "rollouts" / "step-000004.jsonl.tmp-99").write_text("{")
    (stage.path / "final.tmp-99").mkdir()
    assert stage.resume().step == 2
    assert {name: (stage.path / name).read_bytes() for name in logs} == logs
    assert sorted(p.name for p in stage.path.iterdir()) == [
        "checkpoints",
        "metrics.jsonl",
        "rollouts",
        "timings.jsonl",
    ]
    assert sorted(p.name for p in (stage.path / "rollouts").iterdir()) == [
        "step-000001.jsonl",
        "step-000002.jsonl",
    ]
    assert steps(stage) == ["step-000001", "step-000002"]


def test_resume_without_a_checkpoint_empties_the_logs(stage):
    assert stage.resume() is None
    stage.log(1, {"loss": 1.0})
    stage.timing(1, {"seconds": 1.0})
    stage.rollouts(1, [])
    assert stage.resume() is None
    assert (stage.path / "metrics.jsonl").read_bytes() == b""
    assert (stage.path / "timings.jsonl").read_bytes() == b""
    assert list((stage.path / "rollouts").iterdir()) == []


def test_a_damaged_checkpoint_is_set_aside_until_training_has_passed_it(stage, heard):
    for step in (1, 2):
        save(stage, step)
    (stage.path / "checkpoints" / "step-000002" / "state.json").unlink()
    assert stage.resume().step == 1
    assert heard == [
        f"{stage.path}/checkpoints/step-000002: state.json is missing; going on from step-000001",
    ]
    assert steps(stage) == ["step-000001", "step-000002.broken"]
    assert stage.resume().step == 1
    assert len(heard) == 1, "what was set aside is not passed over again"
    save(stage, 2)
    assert steps(stage) == ["step-000001", "step-000002"]
    assert [json.loads(line)["step"] for line in (stage.path / "metrics.jsonl").open()] == [1, 2]


def test_with_no_checkpoint_left_the_stage_begins_anew(stage, heard):
    save(stage, 1)
    (stage.path / "checkpoints" / "step-000001" / "model.safetensors").write_bytes(b"")
    assert stage.resume() is None
    assert heard == [
        f"{stage.path}/checkpoints/step-000001: model.safetensors has 0 bytes instead of 68; "
        "there is no other valid one: starting over"
    ]
    assert (stage.path / "metrics.jsonl").read_bytes() == b""


def test_a_log_that_lost_lines_is_told(stage, heard):
    save(stage, 1)
    (stage.path / "metrics.jsonl").write_bytes(b"")
    assert stage.resume().step == 1
    assert heard == [f"{stage.path}/metrics.jsonl: 0 bytes are left of the 25 logged before; it is kept as it is"]


def test_saving_a_step_again_replaces_it_only_when_it_differs(stage):
    first = save(stage, 1)
    inode = (first.path / "state.json").stat().st_ino
    stage.save(1, {"model": {"w": torch.tensor([1.0])}}, {"cursor": 1}, keep=2)
    assert (first.path / "state.json").stat().st_ino == inode
    stage.save(1, {"model": {"w": torch.tensor([9.0])}}, {"cursor": 1}, keep=2)
    assert stage.latest().tensors("model")["w"].tolist() == [9.0]
    assert steps(stage) == ["step-000001"]


@pytest.mark.parametrize("call", ["fsync", "rename", "replace", "mkdir", "unlink", "rmdir", "stat"])
def test_a_refusal_at_any_call_leaves_whole_checkpoints_only(stage, monkeypatch, call):
    save(stage, 1)
    save(stage, 2)
    real, told = getattr(os, call), set()
    for at in range(1, 600, 9 if call == "stat" else 1):
        count = 0

        def failing(*args, at=at, **kwargs):
            nonlocal count
            count += 1
            if count == at:
                raise OSError(28, "No space left on device")
            return real(*args, **kwargs)

        with monkeypatch.context() as patch:
            patch.setattr(os, call, failing)
            try:
                stage.save(3, {"model": {"w": torch.tensor([3.0])}}, {"cursor": 3}, keep=2)
            except DiskError as error:
                told.add(str(error))
        left = [name for name in steps(stage) if ".tmp-" not in name]
        assert all(verify(stage.path / "checkpoints" / name) is None for name in left), (call, at, left)
        assert {"step-000002"} <= set(left)
        # Removing the oldest comes last; only a refusal there leaves something, which resume clears.
        if steps(stage) != left:
            assert "step-000003" in left
        assert stage.resume().step >= 2
        assert steps(stage) == [name for name in left if name != "step-000001.broken"]
        if count < at:
            break
        for path in (stage.path / "checkpoints").iterdir():
            shutil.rmtree(path)
        for step in (1, 2):
            stage.save(step, {"model": {"w": torch.tensor([float(step)])}}, {"cursor": step}, keep=2)
    assert count < at, "every call was made to fail once"
    assert told or call in ("unlink", "rmdir")
    assert all(": No space left on device; " in line and "\n" not in line for line in told)


@pytest.mark.parametrize("limit", [0, 100, 5000])
def test_a_full_disk_while_tensors_are_written(stage, limit):
    save(stage, 1)
    before = everything(stage.path)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        with pytest.raises(DiskError, match=r"step-000002.*: File too large; raise the limit"):
            stage.save(2, {"model": {"w": torch.zeros(5000)}}, {}, keep=2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert everything(stage.path) == before
    assert stage.latest().step == 1


def save_and_be_killed(stage: StageDirectory, at: int) -> int:
    """Save step 2 in a process that kills itself at this flush; returns its exit status."""
    pid = os.fork()
    if pid == 0:
        real, calls = os.fsync, 0

        def kill(descriptor):
            nonlocal calls
            calls += 1
            if calls == at:
                os.kill(os.getpid(), 9)
            real(descriptor)

        os.fsync = kill
        stage.log(2, {"loss": 0.5})
        stage.save(2, {"model": {"w": torch.tensor([2.0])}}, {"cursor": 2}, keep=1)
        os._exit(0)
    return os.waitpid(pid, 0)[1]


def test_a_killed_writer_leaves_what_resume_can_use(stage):
    """Kill at every flush of a save, in a process of its own."""
    save(stage, 1)
    for at in range(1, 60):
        status = save_and_be_killed(stage, at)
        found = stage.resume()
        assert found.step == (2 if (stage.path / "checkpoints" / "step-000002").exists() else 1)
        assert (stage.path / "metrics.jsonl").stat().st_size == found.state["logs"]["metrics.jsonl"]["size"]
        assert [name for name in steps(stage) if "tmp" in name] == []
        if status == 0:
            assert steps(stage) == ["step-000002"]
            return
        if found.step == 2:
            shutil.rmtree(stage.path)
            save(stage, 1)
    raise AssertionError("more than 60 flushes")


def test_the_metrics_log_has_nothing_of_the_clock(stage, tmp_path):
    other = StageDirectory(tmp_path / "again")
    for directory in (stage, other):
        directory.log(1, {"z": 0.1, "a": torch.tensor(0.1), "tokens": 7, "kl": float("nan"), "top": float("inf")})
    line = (stage.path / "metrics.jsonl").read_text()
    assert line == '{"step": 1, "z": 0.1, "a": 0.10000000149011612, "tokens": 7, "kl": null, "top": null}\n'
    assert (other.path / "metrics.jsonl").read_text() == line


@pytest.mark.parametrize("log", ["metrics.jsonl", "timings.jsonl", "rollouts/step-000001.jsonl"])
def test_a_log_that_changed_is_told(stage, heard, log):
    save(stage, 1)
    save(stage, 2)
    path = stage.path / log
    path.write_bytes(path.read_bytes().replace(b"1", b"7", 1))
    assert stage.resume().step == 2
    assert heard == [f"{path}: has changed since it was written; it is kept as it is"]


def test_a_checkpoint_that_is_not_finite_is_passed_over(stage, heard):
    save(stage, 1)
    weights = {"weights": {"a": torch.ones(2), "b": torch.tensor([1.0, float("inf")])}}
    stage.save(2, weights, {}, keep=2)
    assert stage.resume().step == 1
    assert heard == [
        f"{stage.path}/checkpoints/step-000002: b in weights.safetensors is not finite; going on from step-000001"
    ]


@pytest.mark.parametrize("how", ["copied", "swapped"])
def test_a_checkpoint_of_another_step_is_passed_over(stage, heard, how):
    for step in (1, 2, 3):
        save(stage, step, keep=3)
    folder = stage.path / "checkpoints"
    if how == "copied":
        shutil.rmtree(folder / "step-000003")
        shutil.copytree(folder / "step-000002", folder / "step-000003")
    else:
        (folder / "step-000002").rename(folder / "aside")
        (folder / "step-000003").rename(folder / "step-000002")
        (folder / "aside").rename(folder / "step-000003")
    assert stage.resume().step == (2 if how == "copied" else 1)
    assert f"{folder}/step-000003: it is of step 2, not 3; going on from" in heard[0]


def test_a_checkpoint_of_another_stage_is_passed_over(stage, heard, tmp_path):
    save(stage, 1)
    other = StageDirectory(tmp_path / "dpo")
    save(other, 2)
    shutil.copytree(other.path / "checkpoints/step-000002", stage.path / "checkpoints/step-000002")
    assert stage.resume().step == 1
    assert "step-000002: it is of stage dpo, not sft; going on from step-000001" in heard[0]


def test_finish_writes_the_result_and_then_done(stage):
    assert stage.done is None

    def write(folder: Path) -> None:
        (folder / "adapter").mkdir()
        (folder / "adapter" / "weights").write_bytes(b"12")

    assert stage.finish(write, {"stage": "sft", "step": 5}) == stage.final == stage.done
    assert everything(stage.path) == [
        "DONE",
        "final",
        "final/MANIFEST.json",
        "final/adapter",
        "final/adapter/weights",
        "final/checkpoint.json",
    ]
    assert json.loads((stage.final / "checkpoint.json").read_text()) == {"stage": "sft", "step": 5}


def test_a_damaged_result_is_not_done_and_can_be_finished_again(stage, heard):
    stage.finish(lambda f: (f / "rows.jsonl").write_text("{}\n") and None, {})
    assert stage.rows.read_text() == "{}\n"
    stage.rows.write_text("")
    assert stage.done is None
    assert heard == [
        f"{stage.final}: rows.jsonl has 0 bytes instead of 3; the stage is finished again from its last checkpoint"
    ]
    stage.finish(lambda f: (f / "rows.jsonl").write_text("{}\n") and None, {})
    assert stage.done == stage.final


def test_a_failure_while_finishing_leaves_the_stage_undone(stage):
    def write(folder: Path) -> None:
        (folder / "half").write_text("x")
        raise OSError(28, "No space left on device")

    with pytest.raises(DiskError, match=r"final: No space left on device; free some space"):
        stage.finish(write, {})
    assert stage.done is None
    assert everything(stage.path) == []


def test_a_stage_in_a_place_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    stage = StageDirectory(tmp_path / "file" / "sft")
    for act in (
        lambda: stage.log(1, {}),
        lambda: stage.rollouts(1, []),
        lambda: stage.save(1, {}, {}, keep=1),
        lambda: stage.finish(lambda _: None, {}),
    ):
        with pytest.raises(DiskError, match=r"Not a directory; remove the file that stands in the way"):
            act()
