"""What an editor says of recipes: shipped ones are right, typos are flagged, keys are offered with what they mean."""

from __future__ import annotations

import editor
import pytest

from rlpost.cli.copy import schema_file

PROGRAM = editor.installed()
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(PROGRAM is None, reason="no YAML language server: `make editor` installs it, and needs npm"),
]


@pytest.fixture(scope="module")
def server():
    with editor.LanguageServer(PROGRAM, schema_file()) as running:
        yield running


def flagged(server, text):
    """Lines with what is said of them."""
    return [(found.line, found.message) for found in server.diagnostics([text])[0]]


def test_every_recipe_that_ships_is_accepted(server):
    files = editor.shipped()
    found = server.diagnostics([editor.opened(file, schema_file()) for file in files])
    assert {str(file): said for file, said in zip(files, found, strict=True) if said} == {}
    assert len(files) > 50


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("sed: 1\n", "Property sed is not allowed"),
        ("stages:\n  a: {kind: sft, stepz: 1}\n", "Property stepz is not allowed"),
        ("stages:\n  a: {stepz: 1}\n", "Property stepz is not allowed"),
        ("stages:\n  a: {kind: sft, gamma: 1}\n", "Property gamma is not allowed"),
        ("stages:\n  a: {kind: sftt}\n", 'Valid values: "dpo"'),
        ("stages:\n  a: {too_long: cuts}\n", 'Valid values: "refuse", "drop", "cut"'),
        ("model: {precision: half}\n", 'Valid values: "auto"'),
        ("stages:\n  a: {steps: many}\n", 'Expected "integer'),
        ("stages:\n  a: {group_size: 0}\n", "below the minimum of 1"),
        ("stages:\n  a: {whiten: yes}\n", 'Expected "boolean"'),
        ("stages:\n  a: {kind: grpo, loss: {fn: clipped_surogate}}\n", '"clipped_surrogate"'),
        ("stages:\n  a: {kind: dpo, loss: {fn: dpo, args: {betta: 1}}}\n", "Property betta is not allowed"),
        ("evaluation: {rewards: [{fn: math_anwser}]}\n", '"math_answer"'),
    ],
)
def test_what_is_wrong_is_flagged(server, text, said):
    assert [(line, said in message) for line, message in flagged(server, text)] == [(text.count("\n"), True)]


@pytest.mark.parametrize(
    "text",
    [
        "stages:\n  a: {group_size: 4, modifiers: [], gamma: 1}\n",  # which of them there is, says a parent
        'stages:\n  a: {steps: "${vars.steps}", kl: "${vars.kl}"}\nvars: {steps: 1, kl: {beta: 1}}\n',
        "seed: ???\nstages:\n  a:\n    kind: sft\n    data: ???\n    loss:\n      fn: ???\n",
        "defaults: [demo, _self_, {model: small}]\n",
        "stages:\n  a: {kind: stages.py:mine, whatever: 1}\n",
        "stages:\n  a: {kind: grpo, rewards: [{fn: rewards.py:mine, args: {x: 1}}]}\n",
        "stages:\n  a: {loss: {args: {beta: 0.2}}}\n",
        "rollouts: {engine: engines.py:mine}\n",
        "model: {lora: null}\nevaluation: null\n",
    ],
)
def test_what_a_recipe_may_say_is_not_flagged(server, text):
    assert flagged(server, text) == []


def test_keys_are_offered_with_what_they_mean(server):
    offered = server.completions("stages:\n  a:\n    kind: sft\n    ")
    assert offered["batch_size"] == "Rows an update. Default: `32`."
    assert "gamma" not in offered
    assert all(offered.values())


def test_below_a_stage_without_a_kind_the_keys_of_every_kind_are_offered(server):
    offered = server.completions("stages:\n  a:\n    ")
    assert {"kind", "teacher", "gamma", "modifiers", "group_size"} <= offered.keys()
    assert "`sft`: Rows an update" not in offered["gamma"]
    assert "Pairs an update" in offered["batch_size"]
    assert "Rows an update" in offered["batch_size"]
    assert all(offered.values())


def test_choices_are_offered_with_what_they_mean(server):
    assert server.completions("stages:\n  a:\n    too_long: ")["drop"] == "The row is left out, and counted."
    kinds = server.completions("stages:\n  a:\n    kind: ")
    assert kinds["ppo"].startswith("Proximal policy optimisation")
    losses = server.completions("stages:\n  a:\n    kind: grpo\n    loss:\n      fn: ")
    assert "PPO" in losses["clipped_surrogate"]


def test_the_line_in_a_recipe_names_the_schema(tmp_path):
    line = f"# yaml-language-server: $schema={schema_file()}\n"
    with editor.LanguageServer(PROGRAM) as plain:
        assert flagged(plain, "sed: 1\n") == []
        assert flagged(plain, f"{line}sed: 1\n") == [(2, "Property sed is not allowed.")]


def test_a_file_of_a_group_has_its_sections_schema():
    line = f"# yaml-language-server: $schema={schema_file()}#/$defs/Model\n"
    with editor.LanguageServer(PROGRAM) as plain:
        assert flagged(plain, f"{line}path: gpt2\nlora: {{r: 8}}\n") == []
        assert flagged(plain, f"{line}seed: 1\n") == [(2, "Property seed is not allowed.")]
