"""Single-edit typos of keys: every one refused, nearly every one with the key that was meant."""

from __future__ import annotations

import random
import string
from pathlib import Path

import pytest

from rlpost.errors import RecipeError
from rlpost.recipe.files import chain, find
from rlpost.recipe.keys import Keys
from rlpost.recipe.resolve import resolve
from rlpost.suggest import closest, edits

DATA = "vars.data=rows.jsonl"


def single_edit(word: str, rng: random.Random) -> str:
    letters = string.ascii_lowercase + "_"
    i = rng.randrange(len(word))
    kind = rng.choice(["drop", "insert", "replace", "swap"] if len(word) > 2 else ["insert", "replace"])
    if kind == "drop":
        return word[:i] + word[i + 1 :]
    if kind == "insert":
        return word[:i] + rng.choice(letters) + word[i:]
    if kind == "replace":
        return word[:i] + rng.choice(letters) + word[i + 1 :]
    i = min(i, len(word) - 2)
    return word[:i] + word[i + 1] + word[i] + word[i + 2 :]


def typos(paths: list[str], count: int, seed: int) -> list[tuple[str, str]]:
    """(typo, key that was meant), none of which is a key itself."""
    rng = random.Random(seed)
    made: list[tuple[str, str]] = []
    while len(made) < count:
        path = rng.choice(paths)
        parent, _, last = path.rpartition(".")
        typo = f"{parent}.{single_edit(last, rng)}".lstrip(".")
        if typo not in paths:
            made.append((typo, path))
    return made


def test_typos_on_the_command_line(adding: str) -> None:
    tree = chain(find(adding))[0].keys
    # A recipe's own names, those of transformers, and what is a reference as a whole.
    open_ones = ("vars.", "model.config.", "evaluation.sampling.")
    paths = [p for p in Keys(tree).paths() if "[" not in p and not p.startswith(open_ones)]
    right = 0
    for typo, meant in typos(paths, 200, seed=0):
        with pytest.raises(RecipeError) as caught:
            resolve(adding, [DATA, f"{typo}=1"])
        right += f"{meant.rpartition('.')[2]}'" in str(caught.value).partition("did you mean")[2]
        assert str(caught.value).startswith(typo)
    assert right >= 0.95 * 200


def test_typos_in_the_file(adding: str, write) -> None:
    recipe = Path(adding).read_text()
    keys = [
        "learning_rate",
        "max_new_tokens",
        "rewards",
        "evaluation",
        "tokenizer",
        "alphabet",
        "epochs",
        "model",
    ]
    rng = random.Random(1)
    right = 0
    for i in range(40):
        key = keys[i % len(keys)]
        typo = single_edit(key, rng)
        if typo == key:
            typo = f"{key}s"
        file = write(f"typo{i}.yaml", recipe.replace(f"{key}:", f"{typo}:", 1))
        with pytest.raises(RecipeError) as caught:
            resolve(str(file), [DATA])
        right += f"{key}'" in str(caught.value).partition("did you mean")[2]
    assert right >= 38


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("learning_rate=1", "did you mean 'stages.sft.learning_rate' or 'stages.dpo.learning_rate'"),
        ("stages.grpo.group_sise.x=1", "did you mean 'stages.grpo.group_size.x'"),
        ("stages.grop.steps=1", "the recipe has no stage 'grop' - did you mean 'grpo'?"),
        ("vars.widht=1", "the recipe has no variable 'widht' - did you mean 'width'?"),
        ("stages.sft.data.trian.limit=1", "the recipe has no entry 'trian' - did you mean 'train'?"),
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
