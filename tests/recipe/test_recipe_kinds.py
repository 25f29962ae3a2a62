"""Kinds of stages: one class each, and everything that is known of a kind is asked of it."""

from __future__ import annotations

import inspect
import subprocess
import sys
from pathlib import Path

import pytest

from rlpost.errors import RecipeError
from rlpost.goals.maze_run import policy_of
from rlpost.inference.best_of import rewards_of
from rlpost.recipe.kinds import function_of, kinds, spec_of
from rlpost.recipe.resolve import resolve
from rlpost.recipe.rules import Leaves
from rlpost.recipe.specs.common import Stage
from rlpost.run.stage import StageDirectory

PACKAGE = Path(__file__).parents[2] / "rlpost"
STAGE = "data: {a: {path: rows.jsonl}}, steps: 1, learning_rate: 1e-3"
SAMPLES = "sampling: {max_new_tokens: 4}, rewards: [{fn: math_answer}]"


@pytest.mark.parametrize("kind", kinds())
def test_a_kind_is_its_module(kind: str) -> None:
    spec = spec_of(kind)
    assert issubclass(spec, Stage)
    assert spec.model_fields["kind"].default == kind
    function = function_of(spec.model_construct())
    assert function.__name__ == kind
    assert inspect.get_annotations(function)["cfg"] == spec.__name__


def test_what_recipes_set_is_known_without_anything_heavy() -> None:
    files = [*PACKAGE.glob("*/params.py"), *PACKAGE.glob("recipe/specs/*.py"), PACKAGE / "section.py"]
    names = [".".join(file.relative_to(PACKAGE.parent).with_suffix("").parts) for file in files]
    code = f"""
import importlib, sys
for name in {names}:
    importlib.import_module(name)
    heavy = [h for h in ("torch", "transformers", "datasets", "numpy") if h in sys.modules]
    assert not heavy, f"{{name}} imports {{heavy}}"
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr.splitlines()[-1]


def recipe(write, stages: str) -> str:
    return str(write("kinds.yaml", f"model: {{path: gpt2}}\nruns: runs\nstages:\n{stages}"))


@pytest.mark.parametrize("kind", ["grpo", "ppo", "trpo", "online_dpo", "pairs", "step_labels"])
def test_the_best_is_chosen_by_the_rewards_of_any_kind(write, kind: str) -> None:
    keys = STAGE if "learning_rate" in spec_of(kind).model_fields else "data: {a: {path: r}}"
    resolved = resolve(recipe(write, f"  x: {{kind: {kind}, {keys}, {SAMPLES}}}\n"))
    rewards, where = rewards_of(resolved)
    assert ([reward.fn for reward in rewards], where) == (["math_answer"], "stages.x")


@pytest.mark.parametrize("kind", [k for k in kinds() if spec_of(k).model_construct().leaves is Leaves.policy])
def test_a_maze_is_solved_by_the_last_policy_of_any_kind(write, tmp_path: Path, kind: str) -> None:
    samples = SAMPLES if kind in ("grpo", "ppo", "trpo", "online_dpo", "distill") else ""
    samples += ", teacher: first" if kind == "distill" else ""
    stages = f"  first: {{kind: sft, {STAGE}}}\n  last: {{kind: {kind}, {STAGE}, {samples}}}\n"
    config = resolve(recipe(write, stages)).config
    run = tmp_path / "runs/kinds"
    for name in config.stages:
        StageDirectory(run / name).finish(lambda folder: None, {"stage": name})
    assert policy_of(run, config, None) == StageDirectory(run / "last").final


def test_trpo_has_no_optimizer_to_choose(write) -> None:
    stage = f"  x: {{kind: trpo, {STAGE}, {SAMPLES}, optimizer: muon}}\n"
    with pytest.raises(RecipeError, match=r"stages\.x\.optimizer: muon - trpo takes its own steps.*remove it"):
        resolve(recipe(write, stage))


def test_shards_are_stepped_by_adamw_alone(write) -> None:
    stages = f"  x: {{kind: sft, {STAGE}, optimizer: muon}}\nparallel: {{strategy: fsdp2}}\n"
    with pytest.raises(RecipeError, match=r"stages\.x\.optimizer: muon steps whole matrices.*parallel\.strategy=ddp"):
        resolve(recipe(write, stages))
    assert resolve(recipe(write, stages), ["model.lora={r: 4}"]).config.stages["x"].optimizer == "muon"
