"""Sections chosen by name: `model=NAME` puts a file of the group in the place of the whole section."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from rlpost.errors import RecipeError
from rlpost.recipe.files import choices, packaged, packaged_folder
from rlpost.recipe.resolve import resolve

OWN = "path: gpt2\nprecision: float32\n"


def model(recipe: str, *overrides: str) -> dict:
    """The keys of a resolved model that differ from the defaults."""
    return resolve(recipe, overrides).config.model.model_dump(mode="json", exclude_unset=True)


@pytest.mark.parametrize("name", choices("model", Path("nowhere")))
def test_a_packaged_model_takes_the_place_of_the_whole_section(name: str) -> None:
    file = packaged_folder() / "model" / f"{name}.yaml"
    given = yaml.safe_load(file.read_text())
    assert list(model("demo", f"model={name}")) == list(given)
    assert model("demo", f"model={name}").get("path") == given.get("path")
    assert file.read_text().startswith("# ")  # what `rlpost list` says of it
    assert f"model/{name}" not in packaged()


def test_a_recipe_chooses_and_its_own_keys_and_overrides_are_merged_into_the_choice(write) -> None:
    write("model/mine.yaml", OWN)
    write("model/other.yaml", "path: gpt2-medium\n")
    recipe = str(write("r.yaml", "defaults: [demo, {model: mine}]\nmodel: {attention: padded}\n"))
    assert model(recipe) == {"path": "gpt2", "precision": "float32", "attention": "padded"}
    assert model(recipe, "model.lora.r=4") == {**model(recipe), "lora": {"r": 4}}
    assert model(recipe, "model=other") == {"path": "gpt2-medium"}
    assert model(recipe, "model.precision=auto", "model=other") == {"path": "gpt2-medium", "precision": "auto"}
    child = str(write("child.yaml", "defaults: [r, {model: other}, _self_]\nrun: child\n"))
    assert model(child) == {"path": "gpt2-medium"}
    assert resolve(child).config.stages.keys() == resolve("demo").config.stages.keys()


def test_a_chosen_section_resolves_to_itself(write, tmp_path: Path) -> None:
    write("model/mine.yaml", OWN)
    first = resolve(str(write("r.yaml", "defaults: [demo]\n")), ["model=mine"])
    assert resolve(str(write("again.yaml", first.to_yaml()))).config == first.config


@pytest.mark.parametrize(
    ("text", "overrides", "message"),
    [
        ("defaults: [demo]", ["model=smolm2"], "model: no model 'smolm2' - did you mean 'smollm2'"),
        ("defaults: [demo, {model: smolm2}]", [], "defaults: no model 'smolm2' - did you mean 'smollm2'"),
        ("defaults: [demo, {modle: smollm2}]", [], "chooses nothing - write {model: NAME} - did you mean 'model'?"),
        ("defaults: [demo, {model: 5}]", [], "chooses nothing - write {model: NAME}"),
        ("defaults: [demo, {model: wrong}]", [], "model.pth: unknown key - did you mean 'model.path'"),
    ],
)
def test_a_wrong_choice_is_told(write, text: str, overrides: list[str], message: str) -> None:
    write("model/wrong.yaml", "pth: gpt2\n")
    with pytest.raises(RecipeError) as caught:
        resolve(str(write("r.yaml", f"{text}\n")), overrides)
    assert message in str(caught.value)
