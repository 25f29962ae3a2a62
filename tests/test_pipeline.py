"""Stages in order: what each starts from, what is skipped, and what a run leaves for others to read."""

from __future__ import annotations

import gc
import json
import sys
import weakref
from pathlib import Path

import pytest
import yaml
from tiny_recipes import (
    DPO,
    GRPO,
    LORA,
    PAIRS,
    SFT,
    base,
    metrics,
    policy,
    prepared,
    run,
    sha256,
    weights,
    write,
)

from rlpost.cli.app import main
from rlpost.errors import DataError, RecipeError
from rlpost.pipeline import dry_run, train
from rlpost.recipe.resolve import resolve
from rlpost.stages.context import Context

CHAIN = {"sft": SFT, "pairs": PAIRS, "dpo": {**DPO, "data": {"own": {"stage": "pairs"}}}, "grpo": GRPO}
EVALUATION = {
    "data": {"held_out": {"task": {"fn": "addition.held_out"}, "limit": 12}},
    "rewards": [{"fn": "rewards.py:digits"}],
    "sampling": {"max_new_tokens": 4},
    "samples": 2,
}


def about(final: Path) -> dict:
    return json.loads((final / "checkpoint.json").read_text("utf-8"))


def files(folder: Path) -> dict[str, tuple[int, str]]:
    """Every file below the folder: when it was written, and what it holds."""
    return {
        str(f.relative_to(folder)): (f.stat().st_mtime_ns, sha256(f)) for f in sorted(folder.rglob("*")) if f.is_file()
    }


def command(monkeypatch, *words: str) -> int:
    monkeypatch.setattr(sys, "argv", ["rlpost", *words])
    try:
        main()
    except SystemExit as stop:
        return int(stop.code or 0)
    return 0


def test_each_stage_starts_from_the_one_before(tmp_path):
    final = run(tmp_path, CHAIN)
    runs = tmp_path / "runs/run"
    assert final == runs / "grpo/final"
    parents = {name: about(runs / name / "final")["parent"] for name in CHAIN}
    assert parents == {
        "sft": str(base(tmp_path)),
        "pairs": str(runs / "sft/final"),
        "dpo": str(runs / "sft/final"),
        "grpo": str(runs / "dpo/final"),
    }
    kinds = {name: (about(runs / name / "final")["kind"], about(runs / name / "final").get("step")) for name in CHAIN}
    assert kinds == {"sft": ("sft", 4), "pairs": ("pairs", None), "dpo": ("dpo", 4), "grpo": ("grpo", 4)}
    assert {about(runs / name / "final")["recipe_sha256"] for name in CHAIN} == {
        about(final)["recipe_sha256"],
    }


def test_a_finished_run_does_nothing_again_and_says_so(tmp_path, capsys):
    final = run(tmp_path, CHAIN, evaluation=EVALUATION)
    before = files(tmp_path / "runs")
    capsys.readouterr()
    assert run(tmp_path, CHAIN, evaluation=EVALUATION) == final
    assert files(tmp_path / "runs") == before
    said = capsys.readouterr().err
    assert [f"{name}: done already" in said for name in CHAIN] == 4 * [True]
    assert "steps" not in said
    assert "[95 % interval], " in said  # the table is printed again from what is on disk


def test_a_stage_that_is_disabled_is_left_out(tmp_path):
    final = run(tmp_path, CHAIN, "stages.dpo.enabled=false", "stages.pairs.enabled=false")
    assert about(final)["parent"] == str(tmp_path / "runs/run/sft/final")
    assert not (tmp_path / "runs/run/dpo").exists()


def test_a_stage_that_was_added_later_runs_after_those_that_are_done(tmp_path):
    run(tmp_path, {"sft": SFT})
    before = files(tmp_path / "runs/run/sft")
    final = run(tmp_path, {"sft": SFT, "grpo": GRPO})
    assert about(final)["parent"] == str(tmp_path / "runs/run/sft/final")
    assert files(tmp_path / "runs/run/sft") == before


def test_a_stage_can_start_from_an_earlier_one_or_the_base(tmp_path):
    stages = {"sft": SFT, "dpo": DPO, "again": {**GRPO, "start": "sft"}, "anew": {**SFT, "start": "base"}}
    run(tmp_path, stages)
    runs = tmp_path / "runs/run"
    assert about(runs / "again/final")["parent"] == str(runs / "sft/final")
    assert about(runs / "anew/final")["parent"] == str(base(tmp_path))
    assert metrics(tmp_path, "anew")[0]["nll"] == pytest.approx(metrics(tmp_path, "sft")[0]["nll"], abs=0.3)


@pytest.mark.parametrize("overrides", [(), (LORA,)], ids=["full", "lora"])
def test_the_resolved_recipe_replays_the_run(tmp_path, overrides, monkeypatch):
    final = run(tmp_path, CHAIN, *overrides, "seed=5")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    config = tmp_path / "runs/run/config.resolved.yaml"
    again = train(resolve(str(config), ["run=again"]))
    assert again == tmp_path / "runs/again/grpo/final"
    (file,) = [f.name for f in final.glob("*.safetensors")]
    for stage in ("sft", "dpo", "grpo"):
        ends = [sha256(tmp_path / "runs" / name / stage / "final" / file) for name in ("run", "again")]
        assert ends[0] == ends[1]
        logs = [(tmp_path / "runs" / name / stage / "metrics.jsonl").read_bytes() for name in ("run", "again")]
        assert logs[0] == logs[1]


def test_a_finished_run_is_a_model_for_another_recipe(tmp_path):
    first = run(tmp_path, {"sft": SFT}, LORA)
    # Named by its run: the folder of the run means its last checkpoint.
    other = {"path": str(tmp_path / "runs/run"), "precision": "float32", "lora": {"r": 4, "alpha": 8}}
    final = run(tmp_path, {"dpo": DPO}, "run=other", model=other)
    assert about(final)["parent"] == str(first)
    assert about(final)["base"] == str(base(tmp_path))
    assert metrics(tmp_path, "dpo", "other")[0]["margin"] == pytest.approx(0, abs=1e-5)
    merged = run(tmp_path, {"sft": SFT}, "run=merged", model={"path": str(first), "precision": "float32"})
    assert weights(merged).keys() == weights(base(tmp_path)).keys()


def test_stdout_carries_the_final_path_alone(tmp_path, monkeypatch, capsys):
    file = str(write(tmp_path, {"sft": SFT, "grpo": GRPO}, evaluation=EVALUATION))
    assert command(monkeypatch, "train", file) == 0
    out, err = capsys.readouterr()
    assert out == f"{tmp_path}/runs/run/grpo/final\n"
    assert "[95 % interval], " in err
    assert command(monkeypatch, "train", file, "--json") == 0
    assert json.loads(capsys.readouterr().out) == {
        "checkpoint": f"{tmp_path}/runs/run/grpo/final",
        "run": f"{tmp_path}/runs/run",
    }


def test_what_is_wrong_with_the_last_stage_is_said_before_the_first_begins(tmp_path):
    for stage, error in (
        ({**DPO, "data": {"none": {"path": "nowhere.jsonl"}}}, DataError),
        ({**GRPO, "rewards": [{"fn": "rewards.py:digits", "args": {"figure": "7"}}]}, RecipeError),
    ):
        with pytest.raises(error):
            run(tmp_path, {"sft": SFT, "last": stage})
        assert not (tmp_path / "runs").exists()


def test_a_dry_run_says_the_plan_and_writes_nothing(tmp_path):
    lines = dry_run(prepared(tmp_path, {**CHAIN, "off": {**SFT, "enabled": False}}, LORA, evaluation=EVALUATION))
    plan = "\n".join(lines)
    for expected in (
        "from a new llama model, training LoRA r=4",
        "sft: sft 4 steps on problems",
        "pairs: pairs 24 prompts on problems",
        "grpo: grpo 4 steps on problems",
        "off: left out",
        "evaluation: held_out",
    ):
        assert expected in plan
    assert not (tmp_path / "runs").exists()


def test_functions_of_the_users_own_are_announced_and_recorded(tmp_path, capsys):
    run(tmp_path, {"grpo": {**GRPO, "steps": 1}})
    code = tmp_path / "rewards.py"
    assert f"digits from {code} (sha256 {sha256(code)[:12]})" in capsys.readouterr().err
    environment = json.loads((tmp_path / "runs/run/environment.json").read_text("utf-8"))
    assert environment["functions"] == {f"{code}:digits": sha256(code)}


def test_every_stage_and_the_base_are_evaluated_once(tmp_path, capsys):
    run(tmp_path, {"sft": SFT, "pairs": PAIRS, "grpo": GRPO}, evaluation=EVALUATION)
    folder = tmp_path / "runs/run/evaluation"
    assert sorted(f.name for f in folder.glob("*.json")) == ["base.json", "grpo.json", "sft.json"]
    for name in ("base", "sft", "grpo"):
        summary = json.loads((folder / f"{name}.json").read_text("utf-8"))
        rows = [json.loads(line) for line in (folder / f"{name}.jsonl").read_text("utf-8").splitlines()]
        greedy = [row for row in rows if row["mode"] == "greedy"]
        assert (len(greedy), len(rows)) == (12, 36)
        right = sum(row["completion"].count("1") for row in greedy) / 12
        assert summary["greedy"]["accuracy"]["all"]["value"] == pytest.approx(right)
        assert summary["sampled"]["samples"] == 2
    table = capsys.readouterr().err
    for text in ("base", "sft", "grpo", "greedy", "sampled", "12 prompts", "greedy answers"):
        assert text in table
    # A result once measured stands.
    before = files(folder)
    run(tmp_path, {"sft": SFT, "pairs": PAIRS, "grpo": GRPO}, evaluation=EVALUATION)
    assert files(folder) == before


def test_results_of_another_evaluation_are_not_mixed_in(tmp_path):
    run(tmp_path, {"sft": SFT}, evaluation=EVALUATION)
    file = tmp_path / "runs/run/evaluation/sft.json"
    assert json.loads(file.read_text("utf-8"))["sampled"]["samples"] == 2
    train(prepared(tmp_path, {"sft": SFT}, evaluation={**EVALUATION, "samples": 3}), allow_change=True)
    assert json.loads(file.read_text("utf-8"))["sampled"]["samples"] == 3
    assert json.loads(file.with_name("base.json").read_text("utf-8"))["sampled"]["samples"] == 3


def test_a_stage_that_is_trained_anew_is_evaluated_anew(tmp_path):
    run(tmp_path, {"sft": SFT}, evaluation=EVALUATION)
    file = tmp_path / "runs/run/evaluation/sft.json"
    before = file.read_text("utf-8")
    file.write_text((file.with_name("base.json")).read_text("utf-8"), "utf-8")
    (tmp_path / "runs/run/sft/DONE").unlink()
    run(tmp_path, {"sft": SFT}, evaluation=EVALUATION)
    assert file.read_text("utf-8") == before


def test_no_model_is_held_after_its_stage(tmp_path, monkeypatch):
    made = []
    policy = Context.policy

    def recorded(self):
        made.append(weakref.ref(found := policy(self)))
        return found

    monkeypatch.setattr(Context, "policy", recorded)
    run(tmp_path, {"sft": {**SFT, "steps": 1}})
    gc.collect()
    assert [model() for model in made] == [None]


def test_a_recipe_of_an_evaluation_alone_evaluates_its_model(tmp_path):
    trained = run(tmp_path, {"sft": SFT})
    model = {"path": str(trained), "precision": "float32"}
    assert run(tmp_path, {}, "run=measured", evaluation=EVALUATION, model=model) == trained
    assert (tmp_path / "runs/measured/evaluation/base.json").is_file()


def test_a_tokenizer_is_trained_on_the_rows_that_the_recipe_names(tmp_path):
    model = {
        "config": {**yaml.safe_load((write(tmp_path, {"sft": SFT})).read_text("utf-8"))["model"]["config"]},
        "tokenizer": {"kind": "bpe", "vocab_size": 300, "data": SFT["data"]},
        "precision": "float32",
    }
    final = run(tmp_path, {"sft": {**SFT, "max_length": 32}}, model=model)
    tokenizer = policy(final).tokenizer
    assert len(tokenizer) == 300
    assert tokenizer.decode(tokenizer.encode("12+34=640")) == "12+34=640"


def test_seed_and_lora_are_different_runs_under_one_name(tmp_path):
    run(tmp_path, {"sft": SFT})
    with pytest.raises(RecipeError, match=r"seed: 0 -> 1.*another run=NAME"):
        run(tmp_path, {"sft": SFT}, "seed=1")
    with pytest.raises(RecipeError, match=r"model\.lora"):
        run(tmp_path, {"sft": SFT}, LORA)
