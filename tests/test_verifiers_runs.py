"""The example of docs/verifiers.md, trained for a few steps: episodes of an environment of verifiers in a whole run."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from rlpost.errors import RewardError
from rlpost.pipeline import train
from rlpost.recipe.resolve import resolve

pytestmark = [pytest.mark.extras, pytest.mark.timeout(900)]

PAGE = (Path(__file__).parents[1] / "docs/verifiers.md").read_text("utf-8")
SHORT = ("stages.grpo.steps=2", "stages.grpo.prompts_per_step=3", "stages.grpo.group_size=3", "threads=1")
ROOM = (  # for a model that seldom ends a turn
    "stages.grpo.sampling.max_new_tokens=400",
    "stages.grpo.max_length=500",
    "model.config.max_position_embeddings=512",
)


@pytest.fixture
def recipe(tmp_path):
    """The page's recipe, with the files that it names beside it."""
    (tmp_path / "guess.py").write_text(re.search(r"```python\n(.*?)```", PAGE, re.DOTALL)[1])
    (tmp_path / "chat.jinja").write_text(re.search(r"chat_template: chat\.jinja # (.*)", PAGE)[1])
    (tmp_path / "guess.yaml").write_text(re.search(r"```yaml\n(model:.*?)```", PAGE, re.DOTALL)[1])
    return tmp_path / "guess.yaml"


def run(recipe: Path, name: str, *overrides: str) -> list[dict]:
    """The completions of all steps."""
    runs = [f"runs={recipe.parent / 'runs'}", f"run={name}", "stages.grpo.table_every=1"]
    train(resolve(str(recipe), [*SHORT, *runs, *overrides]))
    files = sorted((recipe.parent / "runs" / name / "grpo" / "rollouts").glob("*.jsonl"))
    rows = [json.loads(line) for file in files for line in file.read_text("utf-8").splitlines()]
    return [completion for row in rows for completion in row["completions"]]


def test_the_environment_plays_and_scores_the_episodes_of_a_run(recipe):
    found = run(recipe, "run", *ROOM)
    assert len(found) == 18
    for completion in found:
        turns = [message for message in completion["messages"] if message["role"] == "assistant"]
        heard = [message["content"] for message in completion["messages"] if message["role"] == "user"]
        assert len(completion["steps"]) == len(turns) == len(heard) + 1
        assert set(heard) <= {"higher", "lower"}
        info = turns[-1]["info"]
        assert completion["reward"] == pytest.approx(sum(info["rewards"].values()))
        assert turns[-1]["reward"] == completion["reward"]
        right = info["rewards"]["right"] == 1.0
        assert (completion["finish"], info["ended"]) == (("stop", "user_closed") if right else ("length", "max_turns"))
        assert right or len(turns) == 3
    assert run(recipe, "again", *ROOM) == found


def test_the_recipe_of_a_run_names_the_file_in_full(recipe):
    resolved = resolve(str(recipe), SHORT)
    for function in (resolved.config.stages["grpo"].environment, resolved.config.stages["grpo"].data["numbers"].task):
        assert function.args["env"] == str(recipe.parent / "guess.py")


def test_an_environment_that_fails_stops_the_run_or_leaves_episodes_unscored(recipe):
    game = recipe.parent / "guess.py"
    game.write_text(game.read_text().replace("if said.last_reply <", "if 1 / 0 or said.last_reply <"))
    with pytest.raises(
        RewardError, match=r"raised RuntimeError: its episode failed: ZeroDivisionError: .*, on the turn"
    ):
        run(recipe, "run")
    found = run(recipe, "lenient", "stages.grpo.environment.on_failure=unscored")
    assert {completion["finish"] for completion in found} == {"failed", "length"}
    assert all(completion["reward"] is None for completion in found if completion["finish"] == "failed")
