"""What a recipe's function says of an argument that it refuses when it is called."""

from __future__ import annotations

import pytest
import torch

from rlpost.errors import RecipeError
from rlpost.objectives.ragged import Ragged
from rlpost.recipe.grouped import ADVANTAGE, FOCUS
from rlpost.usercode.binding import bind
from rlpost.usercode.params import Function


def test_it_is_named_by_its_place_in_the_recipe(tmp_path):
    function = bind(Function(fn="top_entropy", args={"share": 2}), FOCUS, "stages.rl.focus", tmp_path)
    with pytest.raises(RecipeError, match=r"^stages\.rl\.focus\.args\.share: top_entropy refuses it: share=2: a share"):
        function(entropy_N=torch.ones(3))


def test_an_error_of_something_else_is_left_as_it_is(tmp_path):
    args = {"accumulate": False}
    function = bind(Function(fn="optimal_token_baseline", args=args), ADVANTAGE, "stages.rl.advantage", tmp_path)
    with pytest.raises(ValueError, match="3 completions are not 1 groups of 2"):
        function(reward_PG=torch.ones(1, 2), logp_N=torch.ones(3), collision_N=torch.ones(3), rows=Ragged([1, 1, 1]))


def test_a_users_function_reports_its_own_errors(tmp_path):
    (tmp_path / "mine.py").write_text(
        "def picky(entropy_N, *, share=1.0):\n    raise ValueError(f'share={share} is not mine')\n", "utf-8"
    )
    function = bind(Function(fn="mine.py:picky", args={"share": 0.5}), FOCUS, "stages.rl.focus", tmp_path)
    with pytest.raises(Exception, match=r"share=0\.5 is not mine") as found:
        function(entropy_N=torch.ones(3))
    assert "refuses it" not in str(found.value)
