"""What counts as another recipe."""

from rlpost.run.changes import differences, one_line

OLD = {
    "run": "a",
    "runs": "runs",
    "seed": 0,
    "threads": 1,
    "vars": {"lr": 0.001},
    "model": {"path": "gpt2", "lora": None},
    "stages": {
        "sft": {
            "kind": "sft",
            "learning_rate": 0.001,
            "log_every": 1,
            "data": {"x": {"path": "x"}, "y": {"path": "y"}},
        },
        "grpo": {"kind": "grpo", "rewards": [{"fn": "math", "weight": 1.0}], "stop": []},
    },
}


def changed(change) -> list[str]:
    """The differences after `change` was done to a deep copy."""
    import copy

    new = copy.deepcopy(OLD)
    change(new)
    return [str(c) for c in differences(OLD, new)]


def test_the_same_recipe_has_no_differences():
    assert changed(lambda _: None) == []


def test_a_change_is_told_by_its_key_path():
    assert changed(lambda r: r["stages"]["sft"].update(learning_rate=0.002)) == [
        "stages.sft.learning_rate: 0.001 -> 0.002"
    ]
    assert changed(lambda r: r["stages"]["grpo"]["rewards"][0].update(weight=2.0)) == [
        "stages.grpo.rewards[0].weight: 1.0 -> 2.0"
    ]
    assert changed(lambda r: r["stages"]["grpo"]["stop"].append("\n")) == ['stages.grpo.stop[0]: (absent) -> "\\n"']
    assert changed(lambda r: r["model"].update(lora={"r": 8})) == [
        "model.lora.r: (absent) -> 8",
        "model.lora: null -> (absent)",
    ]


def test_what_changes_no_weight_is_free():
    def change(recipe):
        recipe.update(run="b", runs="elsewhere", threads=4, description="new")
        recipe["vars"]["lr"] = 1
        recipe["stages"]["sft"]["log_every"] = 10
        recipe["stages"]["sft"]["keep_checkpoints"] = 3

    assert changed(change) == []


def test_a_key_that_only_looks_free_is_not():
    assert changed(lambda r: r["model"].update(log_every=3)) == ["model.log_every: (absent) -> 3"]
    assert changed(lambda r: r["stages"]["grpo"].update(run="x")) == ['stages.grpo.run: (absent) -> "x"']


def test_a_stage_that_comes_or_goes_is_one_change():
    assert changed(lambda r: r["stages"].update(dpo={"kind": "dpo", "beta": 0.1, "nll": 0})) == [
        "stages.dpo: (absent) -> a stage of kind dpo"
    ]
    assert changed(lambda r: r["stages"].pop("grpo")) == ["stages.grpo: a stage of kind grpo -> (absent)"]


def test_the_order_of_stages_and_of_sources_counts():
    def turn(mapping):
        mapping.update({name: mapping.pop(name) for name in reversed(list(mapping))})

    assert changed(lambda r: turn(r["stages"])) == ["order of stages: sft, grpo -> grpo, sft"]
    assert changed(lambda r: turn(r["stages"]["sft"]["data"])) == ["order of stages.sft.data: x, y -> y, x"]
    assert changed(lambda r: turn(r["model"])) == []


def test_at_most_five_are_shown_and_long_values_cut():
    changes = differences({f"k{i}": 0 for i in range(9)}, {f"k{i}": "x" * 99 for i in range(9)})
    text = one_line(changes)
    assert text.endswith(" (+4 more)")
    assert text.count(" -> ") == 5
    assert text.startswith('k0: 0 -> "' + "x" * 58 + "…; k1: 0")
