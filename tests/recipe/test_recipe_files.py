from __future__ import annotations

from pathlib import Path

import pytest

from rlpost.errors import RecipeError
from rlpost.recipe import files
from rlpost.recipe.compose import compose
from rlpost.recipe.files import describe, listing, packaged, packaged_folder, read, runnable
from rlpost.recipe.resolve import resolve

DATA = "vars.data=rows.jsonl"


def refusal(recipe: str, *overrides: str) -> str:
    with pytest.raises(RecipeError) as caught:
        resolve(recipe, overrides)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_what_is_only_inherited_from_is_not_suggested() -> None:
    shared = {name for name in packaged() if "Not to be run by itself" in files.find(name).read_text("utf-8")}
    assert shared == {"methods/common", "methods/on_pairs", "methods/on_policy"}
    assert {recipe.name for recipe in runnable()} == set(packaged()) - shared
    for name in shared:
        assert f"did you mean {name!r}" not in refusal(name.removeprefix("methods/"))
    assert refusal("rloo").endswith("did you mean 'methods/rloo'?")


def test_a_recipe_that_inherits_nothing_is_what_hydra_makes_of_it() -> None:
    chains = {name: files.chain(files.find(name)) for name in packaged()}
    single = {name: parts[0] for name, parts in chains.items() if len(parts) == 1}
    assert "demo" in single
    for part in single.values():
        alone = compose([part])
        assert alone == compose([files.Part(part.file, {}), part])
        assert list(alone) == list(part.keys)
        alone.clear()
        assert part.keys


def test_a_child_changes_what_it_says_and_inherits_the_rest(adding: str, write) -> None:
    child = write(
        "child.yaml",
        "defaults: [adding, _self_]\nseed: 5\nstages:\n  grpo: {group_size: 4, rewards: [{fn: repetition}]}\n"
        "  more: {kind: sft, data: {a: {path: x}}, steps: 1, learning_rate: 1}\n",
    )
    config = resolve(str(child), [DATA]).config
    assert (config.seed, config.run) == (5, "child")
    assert list(config.stages) == ["sft", "pairs", "dpo", "grpo", "more"]
    grpo = config.stages["grpo"]
    assert (grpo.group_size, grpo.steps, [r.fn for r in grpo.rewards]) == (4, 10, ["repetition"])


def test_self_first_lets_the_parent_win(adding: str, write) -> None:
    child = write("child.yaml", "defaults: [_self_, adding]\ndescription: mine\nseed: 5\n")
    config = resolve(str(child), [DATA]).config
    assert (config.description, config.seed) == ("Addition through four stages", 5)


def test_packaged_recipes_can_be_named_inherited_and_extended_under_their_own_name(
    adding: str, write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = Path(adding).read_text()
    write("packaged/adding.yaml", text)
    write("packaged/methods/quick.yaml", "# Adds quickly\ndefaults: [adding]\nstages: {sft: {steps: 3}}\n")
    monkeypatch.setattr(files, "packaged_folder", lambda: tmp_path / "packaged")
    assert packaged() == ["adding", "methods/quick"]
    assert [(r.name, r.description) for r in listing()] == [
        ("adding", "Addition through four stages"),
        ("methods/quick", "Adds quickly"),
    ]
    assert resolve("methods/quick", [DATA]).config.stages["sft"].steps == 3
    own = write("own/adding.yaml", "defaults: [adding]\nseed: 9\n")
    assert resolve(str(own), [DATA]).config.seed == 9
    other = write("own/other.yaml", "defaults: [methods/quick]\n")
    assert resolve(str(other), [DATA]).config.run == "other"
    assert refusal("methods/quik").endswith("did you mean 'methods/quick'?")
    assert refusal("quick").endswith("did you mean 'methods/quick'?")
    assert refusal("quikc").endswith("did you mean 'methods/quick'?")
    assert "did you mean 'adding.yaml'?" in refusal("ading.yaml")
    assert "did you mean 'methods/quick'?" in refusal("quick.yml")
    assert "did you mean 'adding'?" in refusal(str(write("own/c.yaml", "defaults: [ading]\n")))
    assert refusal(str(tmp_path / "own" / "c")).endswith("own/c.yaml'?")
    assert refusal(str(tmp_path / "own" / "d.yml")).endswith("own/c.yaml'?")


def test_every_packaged_recipe_can_be_read_and_says_what_it_does() -> None:
    for name in packaged():
        assert isinstance(read(packaged_folder() / f"{name}.yaml"), dict)
        assert describe(packaged_folder() / f"{name}.yaml")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("defaults: [../other]\n", "'../other' is refused"),
        ("defaults: [/etc/passwd]\n", "is refused"),
        ("defaults: [{model: small}]\n", "no model 'small'"),
        ("defaults: other\n", "expected a list"),
        ("defaults: [child]\n", "inherits from itself"),
        ("a: &x 1\nb: *x\n", "child.yaml:1: anchors and aliases are refused"),
        ("seed: 1\nrun: x\nseed: 2\n", "child.yaml:3: key 'seed' stands here twice"),
        ("a: [1\n", "child.yaml:2:"),
        ("seed: 1\n\tx: 2\n", "child.yaml:2:"),
        ("- 1\n", "expected keys and values, like `model: {path: gpt2}`, got a list"),
        ("vars: {data: ???}\n", "inside braces write '???' in quotes"),
        ("x: !!python/object/apply:os.system [ls]\n", "child.yaml:1: could not determine a constructor"),
        ("hydra: {searchpath: [file:///]}\n", "hydra's own settings are refused"),
        ("stages: [a]\n", "stages: expected stages by name"),
        ("stages: {a: {steps: 1}}\n", "stages.a.kind: missing - give one of distill, dpo, grpo,"),
        ("stages: {a: null}\n", "stages.a: empty"),
        ("stages: {base: {kind: sft}}\nmodel: {path: x}\n", "stages.base.learning_rate: missing"),
        ("x: " + "[" * 3000, "nested too deeply"),
        ("x: '" + "a" * 256_000 + "'\n", "larger than 256 kB"),
    ],
)
def test_malformed_files_are_refused_in_one_line(write, text: str, message: str) -> None:
    assert message in refusal(str(write("child.yaml", text)))


def test_dots_are_refused_in_inherited_files_too(write) -> None:
    write("parent.yaml", "defaults: [../../secret]\n")
    assert "parent.yaml: defaults: '../../secret' is refused" in refusal(
        str(write("child.yaml", "defaults: [parent]\n"))
    )


def test_inheriting_twice_at_each_level_stops(write) -> None:
    for i in range(12):
        write(f"r{i}.yaml", f"defaults: [r{i + 1}, r{i + 1}]\n")
    write("r12.yaml", "seed: 1\n")
    assert "more than 50 files" in refusal("r0.yaml")


def test_bytes_that_are_no_text_are_refused(tmp_path: Path) -> None:
    (tmp_path / "latin.yaml").write_bytes(b"description: caf\xe9\n")
    assert "not UTF-8 at byte 16" in refusal(str(tmp_path / "latin.yaml"))


def test_yaml_reads_numbers_as_people_do(write) -> None:
    path = write("n.yaml", "a: 1e-3\nb: 0123\nc: 2024-01-02\nd: 12:30\ne: -4\nf: .5\ng: true\n")
    assert read(path) == {
        "a": 1e-3,
        "b": "0123",
        "c": "2024-01-02",
        "d": "12:30",
        "e": -4,
        "f": 0.5,
        "g": True,
    }
