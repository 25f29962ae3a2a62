"""What a `value` stage refuses."""

from __future__ import annotations

import pytest

from rlpost.errors import RecipeError
from rlpost.recipe.resolve import resolve

RECIPE = """\
model: {path: gpt2}
stages:
  v: {kind: value, data: {a: {path: rows.jsonl}}, steps: 1, learning_rate: 1e-3, goals: {texts: [x]}}
"""


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (
            ["stages.v.goals.texts=[]"],
            r"stages\.v\.goals: give exactly one of .* \(none is given\)",
        ),
        (["stages.v.goals.path=a.txt"], r"\(texts and path\)"),
        (["stages.v.hindsight=0.5"], r"stages\.v\.condition: with hindsight goals differ"),
        (["stages.v.target=contrastive"], r"with target: contrastive goals differ"),
        (["stages.v.condition='to '"], r"does not say where the goal goes"),
        (["stages.v.condition='{goal} '", "stages.v.hindsight=0.5", "stages.v.group_size=1"], r"give at least 2"),
        (["stages.v.condition='{goal} '", "stages.v.target=contrastive", "stages.v.avoid=true"], r"use another target"),
        (["stages.v.hindsight=2"], r"stages\.v\.hindsight: expected from 0 to 1"),
    ],
)
def test_it_is_refused_in_one_line(tmp_path, words, said):
    file = tmp_path / "r.yaml"
    file.write_text(RECIPE)
    with pytest.raises(RecipeError, match=said):
        resolve(str(file), words)


def test_goals_by_hindsight_alone(tmp_path):
    file = tmp_path / "r.yaml"
    file.write_text(RECIPE)
    words = ["stages.v.condition='{goal} '", "stages.v.hindsight=1", "stages.v.goals.texts=[]"]
    assert resolve(str(file), words).config.stages["v"].hindsight == 1
