"""Rules of the stages that learn from preferences: a setting that would have no effect is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from rlpost.errors import RecipeError
from rlpost.recipe.resolve import resolve

DATA = "vars.data=rows.jsonl"
F_DIVERGENCE = "{fn: f_divergence}"
LENGTH = "{fn: length_desensitised}"
CONFIDENCE = "{fn: confidence}"
MORE = """\
  online:
    kind: online_dpo
    data: {train: {path: rows.jsonl}}
    steps: 1
    learning_rate: 1e-3
    sampling: {max_new_tokens: 8}
    rewards: [{fn: math_answer}]
  kto:
    kind: kto
    data: {train: {path: rows.jsonl}}
    steps: 1
    learning_rate: 1e-3
"""


def refusal(adding: str, *overrides: str) -> str:
    with pytest.raises(RecipeError) as caught:
        resolve(adding, [DATA, *overrides])
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("loss", ["simpo", "cpo", "orpo"])
def test_losses_without_a_reference_refuse_what_acts_on_it_alone(adding: str, loss: str) -> None:
    fn = f"stages.dpo.loss.fn={loss}"
    message = refusal(adding, fn, f"stages.dpo.modifiers=[{CONFIDENCE}, {F_DIVERGENCE}]")
    assert message == (
        f"stages.dpo.modifiers[1]: f_divergence changes log-ratios to the reference, and {loss} has none - "
        "remove it, or use another loss"
    )
    assert "modifiers[0]: length_desensitised changes" in refusal(adding, fn, f"stages.dpo.modifiers=[{LENGTH}]")
    message = refusal(adding, fn, "stages.dpo.refresh={every: 10}")
    assert message.startswith(f"stages.dpo.refresh: {loss} has no reference that could follow - remove it")
    resolve(adding, [DATA, fn, f"stages.dpo.modifiers=[{CONFIDENCE}]", "stages.dpo.nll_coef=0.5"])


def test_other_losses_take_any_modifier_and_refresh(adding: str) -> None:
    modifiers = f"stages.dpo.modifiers=[{LENGTH}, {F_DIVERGENCE}, {CONFIDENCE}]"
    for loss in ("dpo", "ipo", "aot", "sppo"):
        dpo = resolve(adding, [DATA, f"stages.dpo.loss.fn={loss}", modifiers, "stages.dpo.refresh={}"]).config.stages
        assert (dpo["dpo"].refresh.every, dpo["dpo"].refresh.share) == (100, 0.6)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            f"stages.dpo.modifiers=[{CONFIDENCE}]",
            "stages.dpo.modifiers[0]: confidence is for pairs, and dpo_plackett_luce",
        ),
        (
            "stages.dpo.nll_coef=0.5",
            "stages.dpo.nll_coef: dpo_plackett_luce compares whole groups, of which none is the chosen one - use",
        ),
    ],
)
def test_rankings_refuse_what_is_for_pairs(adding: str, override: str, message: str) -> None:
    assert refusal(adding, "stages.dpo.loss.fn=dpo_plackett_luce", override).startswith(message)
    resolve(adding, [DATA, "stages.dpo.loss.fn=dpo_plackett_luce", "stages.dpo.refresh={every: 10}"])


@pytest.mark.parametrize("before", [F_DIVERGENCE, f"{CONFIDENCE}, {LENGTH}"])
def test_lengths_are_weighed_first_and_once(adding: str, before: str) -> None:
    message = refusal(adding, f"stages.dpo.modifiers=[{before}, {LENGTH}]")
    assert ": length_desensitised weighs actions - put it before what changes log-ratios, as f_divergence" in message


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "stages.dpo.modifiers=[{fn: mix}]",
            "stages.dpo.modifiers[0].fn: 'mix' takes (policy, reference, alpha) from the program, which gives (pairs)",
        ),
        ("stages.dpo.modifiers=[{fn: confidense}]", "'confidense' in rlpost.objectives.preference_modifiers - did you"),
        ("stages.dpo.modifiers=[{fn: confidence, args: {alpha: 1}}]", "modifiers[0].args.alpha: 'confidence' has no"),
        ("stages.dpo.loss.fn=pairs_of", "stages.dpo.loss"),
    ],
)
def test_modifiers_and_losses_are_looked_up_before_anything_loads(adding: str, override: str, message: str) -> None:
    assert message in refusal(adding, override)


@pytest.mark.parametrize(
    ("refresh", "message"),
    [
        ("{share: 0}", "stages.dpo.refresh.share: expected"),
        ("{share: 1.5}", "stages.dpo.refresh.share: expected"),
        ("{every: 0}", "stages.dpo.refresh.every: expected at least 1, got 0"),
    ],
)
def test_a_refresh_has_a_share_and_a_pace(adding: str, refresh: str, message: str) -> None:
    assert refusal(adding, f"stages.dpo.refresh={refresh}").startswith(message)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("stages.online.group_size=1", "stages.online.group_size: a pair needs two completions - give at least 2"),
        ("stages.online.kl.beta=0.1", "stages.online.kl.beta: the loss of online_dpo holds to the reference by itself"),
        ("stages.online.sampling.top_p=0.9", "stages.online.sampling.top_p: online_dpo samples from the"),
        ("stages.online.steps=null", "stages.online.steps: missing - how many rollout steps"),
        ("stages.kto.batch_size=1", "stages.kto.batch_size: expected at least 2, got 1"),
        ("stages.kto.reference=pairs", "stages.kto.reference: 'pairs' is of kind pairs"),
    ],
)
def test_kto_and_online_dpo(adding: str, override: str, message: str) -> None:
    recipe = Path(adding)
    recipe.write_text(recipe.read_text().replace("evaluation:\n", MORE + "evaluation:\n"))
    resolve(adding, [DATA])
    assert refusal(adding, override).startswith(message)


def test_a_loss_that_imitates_needs_a_teacher(adding: str) -> None:
    for loss in ("forward_kl", "reverse_kl", "jensen_shannon"):
        message = refusal(adding, f"stages.sft.loss.fn={loss}")
        assert message.startswith(f"stages.sft.teacher: missing - {loss} imitates a teacher")
        resolve(adding, [DATA, f"stages.sft.loss.fn={loss}", "stages.sft.teacher=runs/other"])
    assert "stages.sft.teacher: stage 'grpo' comes later" in refusal(adding, "stages.sft.teacher=grpo")
