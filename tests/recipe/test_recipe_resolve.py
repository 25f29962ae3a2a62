from __future__ import annotations

import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra

from rlpost.engine.params import Sampling
from rlpost.errors import RecipeError
from rlpost.recipe.resolve import resolve
from rlpost.recipe.specs.dpo import Dpo
from rlpost.recipe.specs.grpo import Grpo
from rlpost.recipe.specs.pairs import Pairs
from rlpost.recipe.specs.sft import Sft
from rlpost.train.params import Schedule

DATA = "vars.data=rows.jsonl"


def refusal(recipe: str, *overrides: str) -> str:
    with pytest.raises(RecipeError) as caught:
        resolve(recipe, overrides)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_stages_become_their_classes_in_the_recipes_order(adding: str, tmp_path: Path) -> None:
    config = resolve(adding, [DATA]).config
    assert [type(stage) for stage in config.stages.values()] == [Sft, Pairs, Dpo, Grpo]
    assert list(config.stages) == ["sft", "pairs", "dpo", "grpo"]
    sft = config.stages["sft"]
    assert (sft.kind, sft.steps, sft.learning_rate, sft.betas) == ("sft", 100, 1e-3, (0.9, 0.999))
    assert sft.data["train"].path == str(tmp_path / "rows.jsonl")
    assert (sft.data["train"].kfold.of, sft.loss.fn) == (5, "nll")
    assert config.stages["grpo"].rewards[1].weight == 0.1
    assert (config.run, config.model.config["hidden_size"]) == ("adding", 64)
    assert config.evaluation is not None
    assert config.evaluation.sampling == Sampling(max_new_tokens=8)


def test_overrides_reach_keys_of_the_stages_own_class(adding: str) -> None:
    config = resolve(
        adding,
        [
            DATA,
            "stages.grpo.group_size=16",
            "stages.grpo.advantage.args.eps=0.5",
            "stages.grpo.rewards.1.weight=0.5",
            "stages.grpo.rewards[0].name=right",
            "stages.sft.schedule=cosine",
            "stages.dpo.enabled=false",
            "model.lora.r=4",
            "model.config.num_hidden_layers=3",
            "stages.sft.data.train.limit=7",
            "stages.grpo.sampling={temperature: 0.5}",
            "run=1.50",
        ],
    ).config
    grpo = config.stages["grpo"]
    assert grpo.group_size == 16
    assert (grpo.advantage.fn, grpo.advantage.args) == ("group_normalised", {"eps": 0.5})
    assert [(r.name, r.weight) for r in grpo.rewards] == [("right", 1.0), (None, 0.5)]
    assert (grpo.sampling.temperature, grpo.sampling.max_new_tokens) == (0.5, 8)
    assert config.stages["sft"].schedule is Schedule.cosine
    assert config.stages["sft"].data["train"].limit == 7
    assert config.stages["dpo"].enabled is False
    assert config.model.lora is not None
    assert (config.model.lora.r, config.model.lora.alpha) == (4, 32.0)
    assert config.model.config["num_hidden_layers"] == 3
    assert config.run == "1.50"  # as it was typed


def test_the_resolved_recipe_resolves_to_itself_from_anywhere(
    adding: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mine.py").write_text("def good(completion, example):\n    return 1.0\n")
    first = resolve(adding, [DATA, "stages.grpo.rewards=[{fn: 'mine.py:good'}]", "stages.sft.betas=[0.8,0.9]"])
    assert first.config.stages["grpo"].rewards[0].fn == f"{tmp_path}/mine.py:good"
    elsewhere = tmp_path / "runs" / "adding"
    elsewhere.mkdir(parents=True)
    (elsewhere / "config.resolved.yaml").write_text(first.to_yaml())
    monkeypatch.chdir(elsewhere)
    again = resolve("config.resolved.yaml")
    assert again.config == first.config
    assert again.to_yaml() == first.to_yaml()
    assert again.folder == tmp_path


def test_what_a_reference_brings_in_gets_its_defaults_and_is_checked(write) -> None:
    recipe = str(
        write(
            "r.yaml",
            """
vars: {rewards: [{fn: math_answer}], data: {a: {task: {fn: addition.train}}}, loss: {args: {beta: 1}}}
model: {path: gpt2}
stages:
  pairs: {kind: pairs, data: "${vars.data}", rewards: "${vars.rewards}"}
  dpo: {kind: dpo, data: {p: {stage: pairs}}, steps: 1, learning_rate: 1, loss: "${vars.loss}"}
""",
        )
    )
    config = resolve(recipe).config
    assert config.stages["pairs"].rewards[0].weight == 1.0
    assert config.stages["pairs"].data["a"].split == "train"
    assert (config.stages["dpo"].loss.fn, config.stages["dpo"].loss.args) == ("dpo", {"beta": 1})
    assert resolve(recipe, ["vars.data.a.limit=3"]).config.stages["pairs"].data["a"].limit == 3
    assert "stages.pairs.data.a.limt: unknown key" in refusal(recipe, "vars.data.a={limt: 3}")
    assert "stages.pairs.data is" in refusal(recipe, "stages.pairs.data.a.limit=3").replace(":", "")


def test_missing_values_are_asked_for_by_key(adding: str) -> None:
    assert refusal(adding) == "vars.data: give it as `vars.data=PATH`"
    assert refusal(adding, DATA, "vars.width=???") == "vars.width: give it as `vars.width=VALUE`"
    assert "stages.sft.learning_rate: missing" in refusal(adding, DATA, "stages.sft.learning_rate=???")
    assert "stages.grpo.rewards[0].fn: missing" in refusal(adding, DATA, "stages.grpo.rewards=[{weight: 1}]")


def test_a_disabled_stage_may_stay_unfinished(write) -> None:
    text = """
vars: {answers: '???'}
model: {path: gpt2}
stages:
  sft: {kind: sft, data: {a: {path: x}}, steps: 1, learning_rate: 1}
  dpo: {kind: dpo, data: {a: {path: "${vars.answers}"}}, steps: 1, learning_rate: 1}
"""
    recipe = str(write("r.yaml", text))
    assert refusal(recipe) == "vars.answers: give it as `vars.answers=PATH`"
    assert list(resolve(recipe, ["stages.dpo.enabled=false"]).config.stages) == ["sft", "dpo"]
    off = resolve(recipe, ["stages.dpo.enabled=false"])
    assert (off.missing, list(off.config.enabled()), off.tree["stages"]["dpo"]["data"]["a"]["path"]) == (
        (),
        ["sft"],
        "???",
    )
    shown = resolve(recipe, lenient=True)
    assert (shown.missing, shown.config.stages["dpo"].data["a"].path) == (("stages.dpo.data.a.path",), "???")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("stages.sft.steps=many", "stages.sft.steps: expected a whole number, got 'many'"),
        ("stages.sft.steps=1.5", "stages.sft.steps: expected a whole number, got 1.5"),
        ("stages.sft.steps=true", "stages.sft.steps: expected a whole number, got True"),
        ("stages.sft.learning_rate=null", "stages.sft.learning_rate: needs a value - it is empty"),
        ("stages.sft.enabled=maybe", "stages.sft.enabled: expected true or false, got 'maybe'"),
        ("stages.sft.betas=[0.9]", "stages.sft.betas: expected 2 values, got [0.9]"),
        ("stages.sft.betas=[a,0.9]", "stages.sft.betas[0]: expected a number, got 'a'"),
        ("stages.sft.enabled=yes", "stages.sft.enabled: expected true or false, got 'yes' - write true"),
        ("stages.sft.reference={x: 1}", "stages.sft.reference: unknown key"),
        (
            "stages.sft.schedule=cosin",
            "schedule: expected one of constant, linear, cosine, got 'cosin' - did you mean 'cosine'?",
        ),
        (
            "stages.grpo.advantage=leave_one_out",
            "stages.grpo.advantage: expected keys, like {fn: leave_one_out}, got 'leave_one_out'",
        ),
        (
            "stages.grpo.rewards={fn: x}",
            "stages.grpo.rewards: expected a list, like [{fn: x}], got {fn: x}",
        ),
        ("stages.sft.kind=dpoo", "stages.sft.kind: expected one of distill, dpo, grpo,"),
        ("stages.grpo.rewards=[{fn: x, wieght: 2}]", "did you mean 'stages.grpo.rewards[0].weight'?"),
        ("stages.sft.steps=${vars.data}", "stages.sft.steps: expected a whole number, got 'rows.jsonl'"),
        ("stages.sft.steps=${vars.wdth}", "stages.sft.steps: nothing is called 'vars.wdth'"),
        ("stages.sft.steps=${vars.wdth}", "did you mean 'vars.width'?"),
        ("vars.width=${vars.width}", "vars.width: refers to itself (vars.width -> vars.width)"),
        ("stages.sft.steps=${oc.env:HOME}", "only names of environment variables go into recipes"),
        ("stages.sft.steps='${oc.${vars.data}:HOME}'", "is refused"),
        ("description=${now:%Y}", "is refused"),
    ],
)
def test_wrong_values_are_refused_by_key(adding: str, override: str, message: str) -> None:
    assert message in refusal(adding, DATA, override)


def test_the_run_is_called_after_the_file_unless_it_says_otherwise(adding: str) -> None:
    assert resolve(adding, [DATA]).config.run == resolve(adding, [DATA]).name == "adding"
    assert "run: 'a/b' is no name for a directory" in refusal(adding, DATA, "run=a/b")


def test_a_path_that_means_two_files_is_refused(adding: str, tmp_path: Path, monkeypatch) -> None:
    other = tmp_path / "other"
    other.mkdir()
    (other / "rows.jsonl").write_text("")
    monkeypatch.chdir(other)
    message = refusal(adding, DATA)
    assert "stages.sft.data.train.path" in message
    assert "give the absolute path" in message


def test_nothing_global_is_left_behind_even_by_threads(adding: str, write) -> None:
    child = str(write("child.yaml", "defaults: [adding]\nseed: 3\n"))
    before = set(ConfigStore.instance().repo)
    with ThreadPoolExecutor(4) as pool:
        runs = list(pool.map(lambda i: resolve(child, [DATA, f"stages.sft.steps={i + 1}"]), range(4)))
    assert [run.config.stages["sft"].steps for run in runs] == [1, 2, 3, 4]
    assert all(run.config.seed == 3 for run in runs)
    refusal(child, DATA, "oops=1")
    left = set(ConfigStore.instance().repo) - before
    assert not [name for name in left if name.startswith("_rlpost")]
    assert not GlobalHydra.instance().is_initialized()


def test_resolving_is_quick_and_free_of_torch(adding: str) -> None:
    """Counted in calls, which are the same on a busy machine: half a second's worth."""
    code = (
        "import sys, json; from rlpost.recipe.resolve import resolve; resolve('demo'); calls = []; "
        "sys.setprofile(lambda frame, event, arg: calls.append(1) if event == 'call' else None); "
        f"resolve({adding!r}, [{DATA!r}]); sys.setprofile(None); "
        "heavy = [m for m in ('torch', 'transformers', 'datasets', 'rich') if m in sys.modules]; "
        "print(json.dumps([len(calls), len(sys.modules), heavy]))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    calls, modules, heavy = json.loads(done.stdout)
    assert heavy == []
    assert calls < 300_000
    assert modules < 460


def test_what_is_resolved_resolves_to_itself_whatever_its_arguments(adding: str, write) -> None:
    changes = ["stages.dpo.loss={fn: dpo, args: {beta: inf}}", "description='\\${vars.width} costs $5'"]
    first = resolve(adding, [DATA, *changes])
    assert first.config.stages["dpo"].loss.args == {"beta": float("inf")}
    assert first.config.description == "${vars.width} costs $5"
    again = resolve(str(write("again.yaml", first.to_yaml())))
    assert (again.config, again.to_yaml()) == (first.config, first.to_yaml())
