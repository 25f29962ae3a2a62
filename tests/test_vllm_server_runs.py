"""Whole runs that sample from vLLM's server, by one that speaks its routes: one process, two, and in shards."""

from __future__ import annotations

import pytest
from fake_vllm import FakeVllm
from processes import finish_on_ranks
from tiny_recipes import GRPO, LORA, SFT, base, metrics, policy, run, weights, write

from rlpost.cli.app import main


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    run(folder, {"sft": SFT | {"steps": 1}})
    return base(folder)


@pytest.mark.slow  # half a minute: three processes each
@pytest.mark.parametrize("overrides", [(), (LORA,), ("parallel.strategy=fsdp2",)], ids=["full", "adapter", "shards"])
def test_two_processes_learn_what_one_does(tmp_path, model, overrides):
    found = []
    for count in (1, 2):
        folder = tmp_path / str(count)
        folder.mkdir()
        with FakeVllm(policy(model)) as server:
            chosen = {"engine": "vllm_server", "urls": [server.url]}
            file = write(folder, {"grpo": GRPO}, model={"path": str(model)}, rollouts=chosen)
            codes = finish_on_ranks(count, ["train", str(file), *overrides], folder / "said")
            assert codes == [0] * count, (folder / "said0.err").read_text("utf-8")
            assert len(server.requests) == 4 * 4 * 4
            assert server.models.keys() == {"policy"}
        rows = metrics(folder, "grpo")
        assert [row["step"] for row in rows] == [1, 2, 3, 4]
        gaps = [row["sampler_gap"] for row in rows if "sampler_gap" in row]  # none where all rewards are equal
        assert gaps
        assert max(gaps) < 1e-4
        found.append(weights(folder / "runs/run/grpo/final"))
    for name, x in found[0].items():
        assert (x - found[1][name]).abs().max() < 1e-4


def test_a_command_that_is_not_there_ends_before_anything_loads(tmp_path, capsys, monkeypatch):
    chosen = {"engine": "vllm_server", "program": str(tmp_path / "vllm")}
    monkeypatch.setattr("sys.argv", ["rlpost", "train", str(write(tmp_path, {"grpo": GRPO | {"rollouts": chosen}}))])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    assert f"stages.grpo.rollouts.program: there is no command {tmp_path}/vllm" in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()
