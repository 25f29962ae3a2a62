"""Every recipe of recipes/methods/ runs: on a smaller model, for a step or two."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from rlpost.pipeline import train
from rlpost.recipe.files import packaged, packaged_folder
from rlpost.recipe.resolve import resolve

SHARED = {"methods/common", "methods/on_pairs", "methods/on_policy", "methods/start"}
METHODS = sorted(set(packaged()) - SHARED & {n for n in packaged() if n.startswith("methods/")})
METHODS = [name for name in METHODS if name.startswith("methods/") and name not in SHARED]
SMALL = "{hidden_size: 32, intermediate_size: 48, num_hidden_layers: 1, num_attention_heads: 2, num_key_value_heads: 2}"
SLOW = {
    f"methods/{name}"
    for name in (
        *("cdpo", "discopop", "exo", "f_dpo", "label_smoothing", "ld_dpo", "length_normalised_dpo", "nca"),
        *("cispo", "dapo", "deepseek_v32", "dppo", "dr_grpo", "gmpo", "gpg", "maxrl", "opo", "pass_at_k", "reinforce"),
        *("dppo_kl", "fipo", "gigpo", "luspo", "mirror_descent", "mirror_descent_soft", "top_entropy", "turn_rloo"),
        *("adaptive_entropy", "clip_cov", "kl_cov", "m2po"),
        *("a_star_po", "chord_phi", "optimal_token", "role_baseline"),
    )
}
"""Like others that run, but for a function or an argument of the objectives, which has its own tests."""
TELLING = "vars.right=[{fn: pattern, name: correct, args: {regex: '^[0-4]'}}]"
"""A reward that a model which has learned nothing earns now more, now less of."""


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    """The start, and a run with rollouts to learn from."""
    folder = tmp_path_factory.mktemp("methods")
    words = [f"runs={folder}", "threads=1", "evaluation=null", TELLING]
    sizes = ["stages.sft.steps=2", f"model.config={SMALL}", "model.config.initializer_range=0.2"]
    sizes += [f"stages.{name}.prompts=40" for name in ("pairs", "labelled", "ranked")]
    ranked = ["stages.ranked.rewards=[{fn: length, args: {target: 3, width: 3, under: 0.5}}]"]
    train(resolve("methods/start", [*words, *sizes, *ranked]))
    small = ["stages.rl.steps=2", "stages.rl.prompts_per_step=4", "stages.rl.table_every=1"]
    train(resolve("methods/rloo", [*words, *small, f"vars.start={folder}/start", f"runs={folder}"]))
    return folder


def test_there_is_a_recipe_a_method():
    assert len(METHODS) >= 45


@pytest.mark.parametrize("name", METHODS)
def test_a_recipe_opens_with_its_command_and_its_paper(name):
    first, second, third, *_ = (packaged_folder() / f"{name}.yaml").read_text("utf-8").splitlines()
    assert first == f"# rlpost train {name}   (after rlpost train methods/start)"
    assert second.startswith("# ")
    assert third.startswith("# ")


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] * (n in SLOW)) for n in METHODS])
def test_a_method_runs(name, runs):
    words = [
        f"runs={runs}",
        "threads=1",
        "evaluation=null",
        TELLING,
        f"vars.start={runs}/start",
        f"run={Path(name).name}_",
    ]
    recipe = yaml.safe_load((packaged_folder() / f"{name}.yaml").read_text("utf-8"))
    if "recorded" in recipe.get("vars", {}):
        words += [f"vars.recorded={runs}/rloo/rl/rollouts"]
    if "teacher" in recipe.get("vars", {}):
        words += [f"vars.teacher={runs}/rloo"]
    for stage, cfg in resolve(name, words).config.stages.items():
        where = f"stages.{stage}"
        if hasattr(cfg, "steps"):
            words += [f"{where}.steps=2", *([] if cfg.epochs is None else [f"{where}.epochs=null"])]
        if hasattr(cfg, "prompts_per_step"):
            words += [f"{where}.prompts_per_step=4"]
        if hasattr(cfg, "num_minibatches"):
            words += [f"{where}.num_minibatches=1"]
        if hasattr(cfg, "critic"):
            words += [f"{where}.critic.warmup_steps=0"]
        if hasattr(cfg, "batch_size"):
            words += [f"{where}.batch_size=8"]
    final = train(resolve(name, words))
    log = final.parent / "metrics.jsonl"
    lines = [json.loads(line) for line in log.read_text("utf-8").splitlines()]
    assert len(lines) == 2
    assert all(value is not None for line in lines for value in line.values())
    assert any(line["grad_norm"] > 0 for line in lines)
