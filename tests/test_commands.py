"""The commands beside `train`, on a finished run."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from tiny_recipes import GRPO, PAIRS, SFT, greedy, jsonl, policy, prepared, run, sha256, write

from rlpost.cli.shown import show_rows
from rlpost.engine.params import Sampling
from rlpost.engine.sampling import greedy as greedily
from rlpost.errors import ModelError, RecipeError
from rlpost.inference.evaluate import evaluate_checkpoint, sample_rows
from rlpost.inference.pairs import write_pairs
from rlpost.inference.sample import sample

STAGES = {"sft": {**SFT, "steps": 12}, "grpo": GRPO, "pairs": PAIRS}
EVALUATION = {
    "data": {"held_out": {"task": {"fn": "addition.held_out"}, "limit": 10}},
    "rewards": [{"fn": "rewards.py:digits"}],
    "sampling": {"max_new_tokens": 4},
}
FEW = Sampling(max_new_tokens=4)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A folder with the recipe tiny.yaml and its finished run."""
    made = tmp_path_factory.mktemp("commands")
    run(made, STAGES, evaluation=EVALUATION)
    return made


@pytest.mark.parametrize("named", [True, False])
def test_eval_gives_what_the_pipeline_gave(folder, named, monkeypatch):
    monkeypatch.chdir(folder)
    prompts, result, path = evaluate_checkpoint("runs/run" if named else None, None, [])
    assert path == "runs/run/grpo/final"
    saved = json.loads((folder / "runs/run/evaluation/grpo.json").read_text("utf-8"))
    assert json.loads(json.dumps(result.to_json())) == saved
    rows = [json.loads(line) for line in (folder / "runs/run/evaluation/grpo.jsonl").read_text("utf-8").splitlines()]
    assert list(sample_rows(prompts, result)) == rows


def test_eval_of_another_stage_with_other_settings(folder):
    _, result, path = evaluate_checkpoint(str(folder / "runs/run/sft"), None, ["evaluation.samples=0"])
    assert path == str(folder / "runs/run/sft/final")
    assert set(result.summaries) == {"greedy"}


def test_eval_needs_to_know_what_to_measure(folder, tmp_path):
    shutil.copytree(folder / "runs/run/base", tmp_path / "model")
    with pytest.raises(RecipeError, match=r"not part of a run.*--recipe"):
        evaluate_checkpoint(str(tmp_path / "model"), None, [])
    without = str(write(tmp_path, {"sft": SFT}))
    with pytest.raises(RecipeError, match="no `evaluation`"):
        evaluate_checkpoint(str(folder / "runs/run"), without, [])


def test_eval_finds_no_finished_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ModelError, match="no finished run"):
        evaluate_checkpoint(None, None, [])


def test_sample_completes_a_prompt(folder):
    final = folder / "runs/run/grpo/final"
    (answer,) = sample(str(folder / "runs/run"), "12+34=", sampling=greedily(FEW))
    assert [answer] == greedy(policy(final), "12+34=")
    several = sample(str(final), "12+34=", sampling=FEW, n=5, seed=3)
    assert len(several) == 5
    assert len(set(several)) > 1
    assert several == sample(str(final), "12+34=", sampling=FEW, n=5, seed=3)
    assert several != sample(str(final), "12+34=", sampling=FEW, n=5, seed=4)


def test_sample_goes_as_far_as_the_model_can(folder):
    (answer,) = sample(str(folder / "runs/run"), "12+34=", sampling=Sampling(max_new_tokens=256))
    assert len(answer) <= 26  # 32 positions, 6 of the prompt


def test_sample_takes_the_best_of_several_by_a_recipes_rewards(folder):
    recipe = str(folder / "tiny.yaml")
    final = str(folder / "runs/run/grpo/final")
    every = sample(final, "12+34=", sampling=FEW, n=8)
    best = sample(final, "12+34=", sampling=FEW, best_of=8, recipe=recipe)
    assert best == [max(every, key=lambda text: text.count("1"))]


def test_pairs_are_written_to_a_file(folder, tmp_path):
    out = tmp_path / "own.jsonl"
    recipe = str(folder / "tiny.yaml")
    assert write_pairs(str(folder / "runs/run/sft"), recipe, str(out), ["stages.pairs.prompts=16"]) == str(out)
    rows = [json.loads(line) for line in out.read_text("utf-8").splitlines()]
    assert rows
    assert all(row["chosen_reward"] > row["rejected_reward"] for row in rows)
    before = sha256(out)
    write_pairs(str(folder / "runs/run/sft"), recipe, str(out), ["stages.pairs.prompts=16"])
    assert sha256(out) == before


def test_pairs_need_a_recipe_that_says_how(folder, tmp_path):
    recipe = str(write(tmp_path, {"sft": SFT}))
    with pytest.raises(RecipeError, match="no enabled stage of kind pairs"):
        write_pairs(str(folder / "runs/run"), recipe, str(tmp_path / "own.jsonl"), [])


def test_show_marks_what_is_trained(tmp_path):
    jsonl(tmp_path / "rows.jsonl", [{"prompt": "1+1=", "completion": "2"}, {"prompt": "11+11=", "completion": "22"}])
    stages = {"sft": {**SFT, "data": {"rows": {"path": "rows.jsonl"}}}, "grpo": GRPO}
    lines = list(show_rows(prepared(tmp_path, stages), 1))
    assert lines[0] == "stages.sft"
    assert "  prompt tokens: least 4, median 5, most 6" in lines
    assert "  completion tokens: least 2, median 2.5, most 3" in lines
    assert "  trained tokens: least 2, median 2.5, most 3" in lines
    assert "  1+1=»2<eos>«" in lines
    assert "stages.grpo" in lines
