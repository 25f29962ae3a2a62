"""A smoke run: every stage cut to N steps, in a run of its own, and nothing else changed."""

from __future__ import annotations

import re
import signal
from pathlib import Path
from typing import Any

import pytest
import yaml
from processes import Trap, finish
from tiny_recipes import DPO, GRPO, PAIRS, PPO, SFT, jsonl, metrics, sha256, write

from rlpost.errors import RecipeError
from rlpost.pipeline import dry_run, train
from rlpost.recipe.files import packaged
from rlpost.recipe.resolve import Resolved, resolve
from rlpost.run.changes import differences
from rlpost.smoke import resolve_smoke

GIVEN = {name: ["vars.data=rows.jsonl"] for name in ("dpo_pairs", "sft_chat", "gsm8k_tiny")}
SPREAD = [
    *("calculator", "demo", "dpo_pairs", "grpo_math", "maze", "maze_value_annotations", "safety"),
    *("methods/off_policy", "methods/online_dpo", "methods/ppo", "methods/start", "methods/tr_dpo"),
]
"""Recipes of every kind of stage, of steps and of epochs."""
CUT = re.compile(
    r"stages\.\w+\.(steps|epochs|prompts|log_every|table_every|min_gap|reached_only|refresh\.every|critic\.warmup_steps"
    r"|data\.\w+\.limit|rewards\[\d+\]\..*)|evaluation\.(samples|data\.\w+\.limit)"
)


def tree(resolved: Resolved) -> dict[str, Any]:
    found = yaml.safe_load(resolved.to_yaml())
    assert isinstance(found, dict)
    return found


def is_cut(name: str, steps: int) -> None:
    given = GIVEN.get(name, [])
    whole, cut = resolve(name, given), resolve_smoke(name, given, steps)
    assert cut.config.run == f"{whole.config.run}-{steps}-steps"
    for stage in tree(cut)["stages"].values():
        if stage["enabled"] and "steps" in stage:
            assert 1 <= stage["steps"] <= steps
            assert stage["epochs"] is None
            assert not stage.get("critic") or stage["critic"]["warmup_steps"] < stage["steps"]
        elif stage["enabled"] and "prompts" in stage:
            assert stage["prompts"] <= 8 * steps
    for source in ((tree(cut).get("evaluation") or {}).get("data") or {}).values():
        assert source["limit"] <= 2 * steps
    changed = [change.key for change in differences(tree(whole), tree(cut))]
    assert [key for key in changed if not CUT.fullmatch(key)] == []


@pytest.mark.parametrize("name", SPREAD)
def test_recipes_are_cut_and_not_changed_otherwise(name: str) -> None:
    is_cut(name, 2)


@pytest.mark.slow
@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("name", packaged())
def test_every_packaged_recipe_is_cut(name: str, steps: int) -> None:
    is_cut(name, steps)


def test_what_is_shorter_already_stays(tmp_path: Path) -> None:
    few = {**SFT["data"]["problems"], "limit": 3}
    stages = {
        "sft": {**SFT, "steps": 1, "data": {"few": few}},
        "pairs": {**PAIRS, "prompts": 5},
        "dpo": {**DPO, "steps": None, "epochs": 2, "data": {"own": {"stage": "pairs"}}},
        "off": {**SFT, "enabled": False},
        "ppo": {**PPO, "critic": {"warmup_steps": 9}, "table_every": 0},
    }
    cut = resolve_smoke(str(write(tmp_path, stages)), [], 2).config
    assert [cut.stages[name].steps for name in ("sft", "dpo", "ppo", "off")] == [1, 2, 2, 4]
    assert cut.stages["dpo"].epochs is None
    assert (cut.stages["sft"].data["few"].limit, cut.stages["dpo"].data["own"].limit) == (3, None)
    assert cut.stages["pairs"].prompts == 5
    assert (cut.stages["ppo"].critic.warmup_steps, cut.stages["ppo"].table_every) == (1, 0)


def test_overrides_come_first_and_a_name_that_is_given_stays(tmp_path: Path) -> None:
    file = str(write(tmp_path, {"sft": SFT}, run="mine"))
    cut = resolve_smoke(file, ["stages.sft.steps=50", "stages.sft.batch_size=3"], 2)
    assert (cut.config.stages["sft"].steps, cut.config.stages["sft"].batch_size) == (2, 3)
    assert cut.config.run == "mine-2-steps"
    assert cut.overrides[:2] == ("stages.sft.steps=50", "stages.sft.batch_size=3")
    assert "stages.sft.steps=2" in cut.overrides
    assert resolve_smoke(file, ["run=other"], 2).config.run == "other"


def test_a_smoke_run_is_replayed_by_its_resolved_recipe(tmp_path: Path) -> None:
    cut = resolve_smoke(str(write(tmp_path, {"sft": SFT, "grpo": GRPO})), [], 2)
    saved = tmp_path / "config.resolved.yaml"
    saved.write_text(cut.to_yaml())
    assert resolve(str(saved)).to_yaml() == cut.to_yaml()
    assert resolve_smoke(str(saved), [], 2).to_yaml() == cut.to_yaml()


def test_data_by_reference_is_cut_for_each_stage_alone(tmp_path: Path) -> None:
    shared = {"problems": {"task": {"fn": "addition.train"}}}
    stages = {"sft": {**SFT, "data": "${vars.shared}"}, "pairs": {**PAIRS, "data": "${vars.shared}", "prompts": None}}
    evaluation = {"data": "${vars.shared}", "rewards": [{"fn": "rewards.py:digits"}], "samples": 9, "pass_at": [1, 3]}
    file = write(tmp_path, stages, vars={"shared": shared}, evaluation=evaluation)
    cut = resolve_smoke(str(file), [], 2).config
    assert cut.stages["sft"].data["problems"].limit == 512
    assert cut.stages["pairs"].prompts == 16
    assert (cut.evaluation.data["problems"].limit, cut.evaluation.samples) == (4, 3)


def test_a_source_that_no_override_can_name_stays_whole(tmp_path: Path) -> None:
    source = {"task": {"fn": "addition.train"}, "columns": {"prompt": "it's {prompt}\n\\'", "completion": "answer"}}
    file = write(tmp_path, {"sft": {**SFT, "data": {"a: b": source}}, "again": {**SFT, "data": {"a b": source}}})
    cut = resolve_smoke(str(file), [], 2).config
    assert cut.stages["sft"].data["a: b"].limit is None
    assert cut.stages["again"].data["a b"].limit == 512
    assert cut.stages["again"].data["a b"].columns == source["columns"]


OWN = """\
from pathlib import Path
from rlpost.recipe.specs.common import Stage


class Own(Stage):
    steps: int = 9
    prompts: str = "all"
    critic: str = "harsh"
    table_every: str = "hour"
    min_gap: float = 0.5


def own(context, cfg: Own) -> Path: ...
"""


def test_a_stage_of_ones_own_kind_is_cut_where_its_keys_are_those_of_others(tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text(OWN)
    file = write(tmp_path, {"own": {"kind": "own.py:own", "data": SFT["data"]}, "short": {**SFT, "steps": 1}})
    cut = resolve_smoke(str(file), [], 2).config.stages["own"]
    assert (cut.steps, cut.prompts, cut.critic, cut.table_every, cut.min_gap) == (2, "all", "harsh", "hour", 0.5)


def test_a_recipe_that_is_wrong_without_the_cut_is_refused(tmp_path: Path) -> None:
    file = str(write(tmp_path, {"sft": {**SFT, "epochs": 1}}))
    with pytest.raises(RecipeError, match=r"give exactly one of stages\.sft\.steps and stages\.sft\.epochs"):
        resolve_smoke(file, [], 2)


def test_the_plan_says_it(tmp_path: Path) -> None:
    jsonl(tmp_path / "rows.jsonl", [{"prompt": "1+1=", "completion": "2"}])
    stages = {"sft": {**SFT, "steps": None, "epochs": 3}, "pairs": PAIRS}
    lines = dry_run(resolve_smoke(str(write(tmp_path, stages)), [], 2))
    assert any(line.startswith(f"{tmp_path}/runs/run-2-steps: ") for line in lines)
    assert "  sft: sft 2 steps on problems" in lines
    assert "  pairs: pairs 16 prompts on problems" in lines


def left(run: Path) -> dict[str, str]:
    kept = [*run.glob("*/final/*.safetensors"), *run.glob("*/metrics.jsonl"), *run.glob("*/final/rows.jsonl")]
    return {str(f.relative_to(run)): sha256(f) for f in kept}


NEVER = [{"fn": "pattern", "args": {"regex": "=" * 20}}]
STAGES = {
    "sft": SFT,
    "pairs": {**PAIRS, "rewards": NEVER, "min_gap": 0.5},
    "dpo": {**DPO, "steps": None, "epochs": 1, "data": {"own": {"stage": "pairs"}}},
}


def test_a_model_that_earns_no_reward_gives_pairs_all_the_same(tmp_path: Path) -> None:
    final = train(resolve_smoke(str(write(tmp_path, STAGES)), [], 1))
    assert final == tmp_path / "runs/run-1-steps/dpo/final"
    assert [line["step"] for line in metrics(tmp_path, "dpo", "run-1-steps")] == [1]
    assert not (tmp_path / "runs/run").exists()


@pytest.mark.slow
def test_a_killed_smoke_run_goes_on_bit_for_bit(tmp_path: Path) -> None:
    file = str(write(tmp_path, STAGES))
    train(resolve_smoke(file, ["run=whole"], 2))
    words = ["train", file, "--steps", "2", "stages.dpo.checkpoint_every=1"]
    kill = Trap("rlpost.train.learner:Learner.update", 2 + 2)  # dpo, in its second step
    assert finish(words, tmp_path / "killed", kill) == -signal.SIGKILL
    assert finish(words, tmp_path / "resumed") == 0
    assert "dpo: resumes after step 1 of 2" in (tmp_path / "resumed.err").read_text()
    assert (tmp_path / "resumed.out").read_text() == f"{tmp_path}/runs/run-2-steps/dpo/final\n"
    assert len(left(tmp_path / "runs/whole")) == 2 + 2 + 1
    assert left(tmp_path / "runs/run-2-steps") == left(tmp_path / "runs/whole")


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    "name",
    ["calculator", "demo", "demo_ppo", "maze", "maze_shaped", "methods/start", "programs", "running_sum", "safety"],
)
def test_recipes_really_run(tmp_path: Path, name: str) -> None:
    resolved = resolve_smoke(name, [f"runs={tmp_path}", "threads=1"], 2)
    assert train(resolved).parents[1] == tmp_path / resolved.config.run
    for stage, settings in tree(resolved)["stages"].items():
        if settings["enabled"]:
            assert (tmp_path / resolved.config.run / stage / "DONE").is_file()
            log = tmp_path / resolved.config.run / stage / "metrics.jsonl"
            assert "steps" not in settings or log.read_bytes().count(b"\n") == 2


KINDS = (
    "dapo distillation kto off_policy on_policy_distillation online_dpo ppo process_reward_model ranking_dpo "
    "reward_model tr_dpo trpo vineppo"
)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_methods_really_run_from_a_smoke_run_of_their_start(tmp_path: Path) -> None:
    words = [f"runs={tmp_path}", "threads=1"]
    train(resolve_smoke("methods/start", words, 2))
    words.append(f"vars.start={tmp_path}/start-2-steps")
    train(resolve_smoke("methods/rloo", [*words, "stages.rl.table_every=1"], 2))
    given = {
        "distillation": f"vars.teacher={tmp_path}/rloo-2-steps",
        "on_policy_distillation": f"vars.teacher={tmp_path}/rloo-2-steps",
        "off_policy": f"vars.recorded={tmp_path}/rloo-2-steps/rl/rollouts",
    }
    for name in KINDS.split():
        own = [given[name]] if name in given else []
        final = train(resolve_smoke(f"methods/{name}", [*words, *own], 2))
        assert final.parents[1] == tmp_path / f"{name}-2-steps"
