"""Single-edit typos in the packaged recipes: every one refused, nearly every one with the word that was meant."""

from __future__ import annotations

from pathlib import Path

import pytest
from mistyped import KINDS, NONSENSE, shipped, typos
from typos import copy_recipes, judge, run_command

from rlpost.errors import RecipeError
from rlpost.recipe.files import listing, packaged
from rlpost.recipe.resolve import resolve
from rlpost.suggest import MOST, closest, edits, hint, nearest

DATA = "vars.data=rows.jsonl"
LEAST = 0.95
"""Share of the typos of each kind whose suggestion is right."""
SMALL = ("dpo_pairs", "grpo_math", "methods/rloo")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory, with a copy of the packaged recipes."""
    copy_recipes(tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def check(kind: str, count: int, folder: Path, recipes: tuple[str, ...] = ()) -> float:
    """Every typo is refused in at most three lines that say where it is; returns the share of right suggestions."""
    found = [judge(typo, folder) for typo in typos(kind, count, 0, recipes)]
    for outcome in found:
        assert outcome.message is not None, outcome.typo
        assert len(outcome.message.splitlines()) <= 3, outcome
        assert outcome.unwanted == [], outcome
        assert outcome.placed, outcome
    return sum(outcome.right for outcome in found) / count


@pytest.mark.parametrize("kind", KINDS)
def test_typos_in_small_recipes(kind: str, folder: Path, tally) -> None:
    assert check(kind, 3, folder, SMALL) == 1.0
    tally("typos", refused=3)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_typos_in_all_recipes(kind: str, folder: Path, tally) -> None:
    assert check(kind, KINDS[kind], folder) >= LEAST
    tally("typos", refused=KINDS[kind])


def test_a_recipe_without_its_folder_is_suggested(folder: Path) -> None:
    names = packaged()
    for recipe in listing():
        name, last = recipe.name, recipe.name.rpartition("/")[2]
        if last not in names and not recipe.description.startswith("(shared by"):
            with pytest.raises(RecipeError, match=f"^{last}: .* - did you mean '{name}'"):
                resolve(last)


def refusal(recipe: str, *overrides: str) -> str:
    """What is wrong with a recipe; nothing where it is right."""
    try:
        resolve(recipe, overrides)
    except RecipeError as error:
        return str(error)
    return ""


FUNCTIONS = [
    ("methods/rloo", "stages.rl.advantage.fn"),
    ("methods/rloo", "stages.rl.loss.fn"),
    ("methods/ppo", "stages.rl.loss.fn"),
    ("methods/dpo", "stages.dpo.loss.fn"),
    ("methods/f_dpo", "stages.dpo.modifiers[0].fn"),
    ("methods/online_dpo", "stages.rl.loss.fn"),
    ("methods/kto", "stages.kto.loss.fn"),
    ("methods/dft", "stages.sft.loss.fn"),
    ("methods/reward_model", "stages.judge.loss.fn"),
    ("methods/process_reward_model", "stages.judge.loss.fn"),
    ("grpo_math", "stages.grpo.rewards[0].fn"),
    ("demo", "stages.sft.data.teacher.task.fn"),
    ("demo", "stages.sft.data.teacher.augment.fn"),
    ("grpo_math", "stages.grpo.data.questions.map.fn"),
    ("calculator", "stages.grpo.environment.fn"),
]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "place"), FUNCTIONS)
def test_every_function_on_offer_can_be_chosen(name: str, place: str) -> None:
    recipe = shipped(name)
    path = tuple(place.replace("[", ".").replace("]", "").split("."))
    tasks = recipe.offered(path, f"{NONSENSE}.x") if ".data." in place or ".environment." in place else [""]
    checked = 0
    for task in tasks:
        for function in recipe.offered(path, f"{task}.{NONSENSE}" if task else NONSENSE):
            word = f"{task}.{function}" if task else function
            checked += 1
            message = refusal(name, *recipe.given, f"{place}={word}")
            assert "no function" not in message, word
            assert f"{function!r} takes" not in message, word
    assert checked


@pytest.mark.slow
def test_typos_as_commands_import_no_torch(folder: Path) -> None:
    for kind in KINDS:
        for typo in typos(kind, 6, 1):
            code, said, *_ = run_command(typo, folder)
            *message, torch = said.splitlines()
            assert (code, torch) == (2, "torch imported: False"), said
            assert 1 <= len(message) <= 3, said


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("learning_rate=1", "did you mean 'stages.sft.learning_rate' or 'stages.dpo.learning_rate'"),
        ("stages.grpo.group_sise.x=1", "did you mean 'stages.grpo.group_size.x'"),
        ("stages.grop.steps=1", "the recipe has no stage 'grop' - did you mean 'grpo'?"),
        ("vars.widht=1", "the recipe has no variable 'widht' - did you mean 'width'?"),
        ("stages.sft.data.trian.limit=1", "the recipe has no source 'trian' - did you mean 'train'?"),
        ("stages.sft.steps.x=1", "stages.sft.steps: a single value, there are no keys below it"),
        ("stages.grpo.rewards.2.weight=1", "stages.grpo.rewards has 2 entries, counted from 0"),
        ("evaluation.sampling.top_k=1", "evaluation.sampling: is '${stages.grpo.sampling}' in the recipe"),
        ("zzzzzzzz=1", "zzzzzzzz: unknown key (keys: description, run"),
    ],
)
def test_where_a_wrong_key_leads(adding: str, override: str, message: str) -> None:
    with pytest.raises(RecipeError) as caught:
        resolve(adding, [DATA, override])
    assert message in str(caught.value)


def test_edits_counts_a_swap_of_neighbours_once() -> None:
    assert edits("gruop", "group") == 1
    assert edits("", "abc") == 3
    assert edits("kitten", "sitting") == 3
    assert closest("lerning_rate", ["learning_rate", "schedule"]) == "learning_rate"
    assert closest("frobnicate", ["learning_rate", "schedule"]) is None


def test_words_that_are_equally_near_are_all_suggested() -> None:
    assert hint("gpo", ["kto", "ppo", "dpo", "cpo"]) == " - did you mean 'cpo', 'dpo' or 'ppo'?"
    assert hint("bco", ["kto", "ppo"]) == ""
    assert len(nearest("x", "abcdefg")) == MOST
