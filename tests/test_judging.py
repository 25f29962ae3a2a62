"""Best of n by a reward model: in a pipeline's evaluation, and on the command line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tiny_recipes import GRPO, LORA, PAIRS, PREFERENCES, SFT, prepared, run, write

from rlpost.engine.params import Sampling
from rlpost.errors import ModelError
from rlpost.inference.evaluate import evaluate_checkpoint
from rlpost.inference.pairs import write_pairs
from rlpost.inference.sample import sample
from rlpost.pipeline import train
from rlpost.policy.judge import RewardModelJudge
from rlpost.run.lookup import find_checkpoint

REWARD = {
    "kind": "reward_model",
    "data": {"pairs": {"path": "pairs.jsonl"}},
    "steps": 2,
    "batch_size": len(PREFERENCES),
    "learning_rate": 1e-2,
    "max_length": 16,
}
STAGES = {"sft": {**SFT, "steps": 2}, "reward": REWARD, "grpo": {**GRPO, "steps": 1}}
EVALUATION = {
    "data": {"held_out": {"task": {"fn": "addition.held_out"}, "limit": 6}},
    "rewards": [{"fn": "rewards.py:digits"}],
    "sampling": {"max_new_tokens": 4},
    "samples": 4,
    "best_of": True,
    "judge": "reward",
}
FEW = Sampling(max_new_tokens=4)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A folder with the recipe tiny.yaml and its finished run."""
    made = tmp_path_factory.mktemp("judging")
    run(made, STAGES, LORA, evaluation=EVALUATION)
    return made


def saved(folder: Path, stage: str, run: str = "run") -> dict:
    return json.loads((folder / "runs" / run / f"evaluation/{stage}.json").read_text("utf-8"))


def test_what_comes_before_the_judge_is_evaluated_without_it(folder):
    for stage in ("base", "sft"):
        assert saved(folder, stage)["sampled"]["judged"] is None
        assert saved(folder, stage)["sampled"]["best_of"] is not None
    assert not (folder / "runs/run/evaluation/reward.json").exists()


def test_the_judges_best_samples_are_those_of_its_highest_scores(folder):
    rows = [json.loads(x) for x in (folder / "runs/run/evaluation/grpo.jsonl").read_text("utf-8").splitlines()]
    sampled = [row for row in rows if row["mode"] == "sampled"]
    assert all("judged" not in row for row in rows if row["mode"] == "greedy")
    prompts = [sampled[i : i + 4] for i in range(0, 24, 4)]
    best = [max(four, key=lambda row: row["judged"])["rewards"]["digits"] for four in prompts]
    judged = saved(folder, "grpo")["sampled"]["judged"]
    assert judged["value"] == pytest.approx(sum(best) / 6)
    assert saved(folder, "grpo")["greedy"]["judged"] is None


def test_eval_knows_the_judge_of_its_run(folder):
    _, result, _ = evaluate_checkpoint(str(folder / "runs/run/grpo"), None, [])
    assert json.loads(json.dumps(result.to_json())) == saved(folder, "grpo")


def test_a_judge_by_path_judges_every_stage(folder):
    reward = folder / "runs/run/reward"
    stages = {"sft": {**SFT, "steps": 1}}
    train(prepared(folder, stages, LORA, "run=other", evaluation={**EVALUATION, "judge": str(reward)}))
    assert all(saved(folder, stage, "other")["sampled"]["judged"] for stage in ("base", "sft"))
    write(folder, STAGES, evaluation=EVALUATION)


def test_sample_takes_the_best_of_several_by_a_judge(folder, monkeypatch):
    seen = {}
    by_group = RewardModelJudge.by_group

    def record(self, groups):
        (group,) = groups
        (scores,) = found = by_group(self, groups)
        seen.update(zip([c.text for c in group.completions], scores, strict=True))
        return found

    monkeypatch.setattr(RewardModelJudge, "by_group", record)
    final = str(folder / "runs/run/grpo/final")
    every = sample(final, "12+34=", sampling=FEW, n=8)
    best = sample(final, "12+34=", sampling=FEW, best_of=8, judge=str(folder / "runs/run/reward"))
    assert set(seen) == set(every)
    assert best == [max(seen, key=seen.__getitem__)]


def test_what_is_no_reward_model_cannot_judge(folder):
    final = str(folder / "runs/run/grpo/final")
    with pytest.raises(ModelError, match=r"grpo/final: no reward model"):
        sample(final, "12+34=", sampling=FEW, best_of=2, judge=final)


def test_the_result_of_a_run_is_its_last_policy(folder, tmp_path):
    assert find_checkpoint(folder / "runs/run") == folder / "runs/run/grpo/final"
    run(tmp_path, {"sft": {**SFT, "steps": 1}, "reward": {**REWARD, "steps": 1}})
    assert find_checkpoint(tmp_path / "runs/run") == tmp_path / "runs/run/sft/final"


def test_pairs_are_chosen_by_the_reward_model_of_the_run(tmp_path):
    pairs = {**PAIRS, "rewards": [{"fn": "reward_model", "model": "reward"}]}
    run(tmp_path, {"sft": SFT, "reward": {**REWARD, "steps": 1}, "pairs": pairs})
    out = tmp_path / "own.jsonl"
    write_pairs(str(tmp_path / "runs/run/sft"), str(tmp_path / "tiny.yaml"), str(out), ["stages.pairs.prompts=8"])
    rows = [json.loads(line) for line in out.read_text("utf-8").splitlines()]
    assert all(row["chosen_reward"] > row["rejected_reward"] for row in rows)
