from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import pytest
from pydantic import Field

from rlpost.data.params import Source
from rlpost.errors import RecipeError
from rlpost.policy.params import Model
from rlpost.recipe.build import range_of
from rlpost.recipe.resolve import resolve
from rlpost.recipe.schema import Recipe
from rlpost.recipe.specs.grpo import Grpo
from rlpost.recipe.validate import validate
from rlpost.section import Section

DATA = "vars.data=rows.jsonl"
Change = Callable[[Any], None]


def refusal(adding: str, *overrides: str) -> str:
    with pytest.raises(RecipeError) as caught:
        resolve(adding, [DATA, *overrides])
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("stages.sft.steps=0", "stages.sft.steps: expected at least 1, got 0"),
        ("stages.sft.betas=[0.9,1.0]", "stages.sft.betas[1]: expected from 0 to 1 (exclusive), got 1.0"),
        ("stages.sft.learning_rate=inf", "stages.sft.learning_rate: expected more than 0, got inf"),
        ("stages.sft.learning_rate=nan", "stages.sft.learning_rate: expected more than 0, got nan"),
        ("stages.sft.batch_size=0", "stages.sft.batch_size"),
        ("stages.sft.warmup=1.5", "stages.sft.warmup: 1.5 - a share below 1, or a whole number"),
        ("stages.grpo.sampling.temperature=0", "stages.grpo.sampling.temperature: expected more than 0"),
        ("stages.grpo.group_size=0", "stages.grpo.group_size: expected at least 1, got 0"),
        ("stages.grpo.rewards.1.weight=nan", "stages.grpo.rewards[1].weight: expected a finite number"),
        ("stages.pairs.group_size=1", "stages.pairs.group_size: expected at least 2"),
        (
            "stages.sft.data.train.kfold.hold_out=5",
            "fold.hold_out: 5 of 5 parts - counted from 0, it is at most 4",
        ),
        ("model.lora.dropout=1", "model.lora.dropout: expected from 0 to 1 (exclusive), got 1"),
        ("model.path=gpt2", "model: give exactly one of model.path and model.config (not both)"),
        ("model.config={model_type: null}", None),
        ("model.tokenizer=null", "model.tokenizer: missing"),
        ("model.tokenizer.alphabet=''", "model.tokenizer.alphabet: missing"),
        ("model.tokenizer.kind=bpe", "model.tokenizer.data: missing"),
        (
            "stages.sft.data.train.path=null",
            "stages.sft.data.train: give exactly one of path, stage, task (none",
        ),
        (
            "stages.sft.data.train.task.fn=addition.train",
            "exactly one of path, stage, task (path and task given)",
        ),
        (
            "stages.dpo.data.made.stage=pears",
            "stages.dpo.data.made.stage: no stage 'pears' - did you mean 'pairs'?",
        ),
        ("stages.dpo.data.made.stage=sft", "stages.dpo.data.made.stage: 'sft' is of kind sft"),
        ("stages.dpo.data.made.stage=grpo", "stage 'grpo' comes later"),
        ("stages.pairs.enabled=false", "stages.dpo.data.made.stage: stage 'pairs' is disabled"),
        ("stages.dpo.reference=dpo", "stages.dpo.reference: 'dpo' is this stage itself"),
        ("stages.grpo.reference=stat", "stages.grpo.reference: no stage 'stat' - did you mean 'start'?"),
        ("stages.sft.enabled=false", "stages.dpo.reference: stage 'sft' is disabled"),
        ("stages.grpo.start=nowhere", "stages.grpo.start: no stage 'nowhere'"),
        ("stages.grpo.start=pairs", "stages.grpo.start: 'pairs' is of kind pairs, which leaves rows and no model"),
        ("stages.grpo.reference=pairs", "stages.grpo.reference: 'pairs' is of kind pairs"),
        ("stages.grpo.rewards=[]", "stages.grpo.rewards: missing"),
        (
            "stages.grpo.rewards.1.fn=math_answer",
            "stages.grpo.rewards[1].name: 'math_answer' is logged already",
        ),
        ("stages.grpo.steps=null", "stages.grpo.steps: missing"),
        ("stages.grpo.epochs=1", "stages.grpo.epochs: grpo counts steps"),
        ("stages.sft.epochs=1", "exactly one of stages.sft.steps and stages.sft.epochs (not both)"),
        ("stages.sft.steps=null", "exactly one of stages.sft.steps and stages.sft.epochs (neither is given)"),
        (
            "stages.grpo={focus: {fn: top_entropy}, loss: {fn: squared_log_ratio, args: {tau: 0.1}}}",
            "stages.grpo.focus: squared_log_ratio learns from an action whose advantage is 0",
        ),
        ("stages.grpo.reply_coef=0.1", "stages.grpo.reply_coef: nothing replies to the model"),
        ("stages.grpo.reply_coef=-0.1", "stages.grpo.reply_coef"),
        ("stages.grpo.expert={}", "stages.grpo.expert.data: missing"),
        (
            "stages.grpo.expert={data: {rows: {path: rows.jsonl, direction: reverse}}}",
            "stages.grpo.expert.data.rows.direction: reverse is for sft",
        ),
        ("stages.grpo.expert={data: {rows: {stage: sft}}}", "stages.grpo.expert.data.rows.stage: 'sft' is of kind sft"),
        (
            "stages.grpo.expert={data: {rows: {path: rows.jsonl}}, loss: {fn: forward_kl}}",
            "stages.grpo.expert.loss.fn: forward_kl imitates a teacher",
        ),
        ("stages.grpo.expert={data: {rows: {path: rows.jsonl}}, loss: {fn: null}}", "stages.grpo.expert.loss.fn"),
        ("stages.grpo.expert.mu.peak=1.5", "stages.grpo.expert.mu.peak"),
        ("stages.grpo.expert.mu={peak: 0.1, valley: 0.2}", "stages.grpo.expert.mu.valley: 0.2 is above peak=0.1"),
        ("stages.grpo.expert.mu={peak: 0.9, decay_steps: 9}", "stages.grpo.expert.mu.valley: missing"),
        ("stages.grpo.expert.mu={peak: 0.9, valley: 0.1}", "stages.grpo.expert.mu.decay_steps: missing"),
        ("stages.grpo.kl={placement: loss, beta: 0.1}", "k1 in the loss has an expected gradient of zero"),
        (
            "stages.grpo.kl={estimator: k3_weighted, beta: 0.1}",
            "stages.grpo.kl.estimator: k3_weighted is a term of the",
        ),
        (
            "stages.grpo.sampling.top_k=50",
            "stages.grpo.sampling.top_k: grpo samples from the whole distribution",
        ),
        ("stages.grpo.sampling.top_p=0.9", "stages.grpo.sampling.top_p"),
        ("stages.grpo.sampling.min_p=0.1", "stages.grpo.sampling.min_p"),
        ("stages.grpo.sampling.stop=['']", "stages.grpo.sampling.stop: an empty string"),
        ("stages.grpo.num_minibatches=33", "stages.grpo.num_minibatches: 33 for 32 prompts"),
        ("stages.grpo.max_length=8", "stages.grpo.max_length: 8 leaves no room for a prompt"),
        ("evaluation.pass_at=[1,4]", "evaluation.pass_at[1]: pass@4 needs 4 samples a prompt, not 1"),
        ("evaluation.best_of=true", "evaluation.best_of: needs at least 2 samples"),
        ("evaluation.judge=runs/reward", "evaluation.judge: chooses among at least 2 samples"),
        ("evaluation={judge: sft, samples: 4}", "evaluation.judge: 'sft' is of kind sft - name a reward_model stage"),
        (
            "evaluation.rewards=[{fn: reward_model, model: sft}]",
            "evaluation.rewards[0].model: the base model is evaluated before stage 'sft' has run",
        ),
        ("evaluation.rewards=[]", "evaluation.rewards: missing"),
        ("evaluation.data.test={path: null, stage: pairs}", "evaluation.data.test.stage: only stages read"),
        ("seed=-1", "seed: expected from 0 to"),
    ],
)
def test_rules(adding: str, override: str, message: str | None) -> None:
    if message is None:
        assert resolve(adding, [DATA, override]).config.model.config["model_type"] is None
    else:
        assert message in refusal(adding, override)


@pytest.mark.parametrize(
    "override",
    [
        "stages.pairs.sampling.top_p=0.9",
        "stages.grpo.kl={placement: loss, estimator: k3, beta: 0.1}",
        "stages.grpo.kl.beta=0.1",
        "stages.grpo.weight=constant_length",
        "stages.grpo.reference=base",
        "stages.grpo.start=base",
        "stages.sft.warmup=10",
        "stages.grpo.num_minibatches=32",
        "stages.sft.data.train.kfold.hold_out=4",
    ],
)
def test_what_is_fine(adding: str, override: str) -> None:
    assert resolve(adding, [DATA, override]).warnings == ()


def test_the_rules_of_a_disabled_stage_are_not_looked_at(adding: str) -> None:
    resolve(adding, [DATA, "stages.grpo.enabled=false", "stages.grpo.epochs=3"])
    with pytest.raises(RecipeError, match=r"stages\.grpo\.steps: expected at least 1, got -3"):
        resolve(adding, [DATA, "stages.grpo.enabled=false", "stages.grpo.steps=-3"])


@pytest.mark.parametrize("name", ["base", "start", "a/b", "", "sft.v2", "x" * 81])
def test_names_that_a_stage_cannot_have(adding: str, name: str, write) -> None:
    text = Path(adding).read_text().replace("  grpo:\n", f"  '{name}':\n").replace("${stages.grpo.sampling}", "{}")
    with pytest.raises(RecipeError, match=r"^stages\."):
        resolve(str(write("named.yaml", text)), [DATA])


def test_warnings_name_the_key(adding: str) -> None:
    (one,) = resolve(adding, [DATA, "stages.grpo.group_size=1"]).warnings
    assert one.startswith("stages.grpo.group_size: a group of one has no baseline: group_normalised is 0")
    (two,) = resolve(adding, [DATA, "model.lora={dropout: 0.1}"]).warnings
    assert two.startswith("model.lora.dropout: with dropout above 0")
    (three,) = resolve(adding, [DATA, "stages.grpo.kl={beta: 0.1, estimator: k3}"]).warnings
    assert "biased" in three


def test_nothing_to_do_is_said() -> None:
    with pytest.raises(RecipeError, match="stages: nothing to do"):
        validate(Recipe(run="x", model=Model(path="gpt2")))


def test_a_grpo_stage_by_itself_passes() -> None:
    recipe = resolve_free()
    assert validate(recipe) == []
    recipe.stages["g"].data = {}
    with pytest.raises(RecipeError, match=r"stages\.g\.data: missing"):
        validate(recipe)


def resolve_free() -> Recipe:
    from rlpost.rewards.params import Reward

    stage = Grpo(data={"a": Source(path="x")}, steps=1, learning_rate=1.0, rewards=[Reward(fn="math_answer")])
    return Recipe(run="x", model=Model(path="gpt2"), stages={"g": stage})


def test_ranges_are_said_with_both_ends() -> None:
    class Ends(Section):
        share: float = Field(0.5, ge=0, lt=1)
        part: float | None = Field(None, gt=0, le=1)
        some: list[Annotated[int, Field(ge=1)]] = Field(default_factory=list)
        any: float = 0.0

    said = {name: range_of(info) for name, info in Ends.model_fields.items()}
    assert said == {
        "share": "from 0 to 1 (exclusive)",
        "part": "from 0 (exclusive) to 1",
        "some": "at least 1",
        "any": "",
    }
