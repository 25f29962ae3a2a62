"""Reads a finished run of mazes: its mazes, and its models' outputs for every start next to the exact solution."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from rlpost.data.codec import make_codec
from rlpost.data.tasks import maze as task
from rlpost.errors import DataError, ModelError
from rlpost.policy.load import load_policy
from rlpost.policy.params import Model
from rlpost.policy.policy import Policy
from rlpost.policy.value_head import load_value_head_model
from rlpost.recipe.resolve import resolve
from rlpost.recipe.rules import Leaves
from rlpost.recipe.schema import Recipe
from rlpost.recipe.specs.common import Stage
from rlpost.run.names import CONFIG
from rlpost.run.stage import StageDirectory
from rlpost.types import Completion, Group


@dataclass(frozen=True)
class Solved:
    """One maze, with exact and learned values."""

    maze: str
    held_out: frozenset[int]
    """Starts that were not trained on."""
    walk: Mapping[int, float]
    """Exact: the probability that the random walk from a cell ends at the exit."""
    value: Mapping[int, float]
    """The value network's estimate of it; empty if the run has no network."""
    steps: Mapping[int, int]
    """Exact: fewest steps to the exit."""
    move: Mapping[int, int]
    """The policy's likeliest next cell."""

    @property
    def errors(self) -> dict[int, float]:
        """|V − exact| of every start."""
        return {c: abs(self.value[c] - self.walk[c]) for c in self.value}

    @property
    def starts(self) -> list[int]:
        """Cells from which the exit can be reached."""
        return list(self.move)

    def is_optimal(self, cell: int) -> bool:
        """Whether the policy's move is a step nearer to the exit."""
        return self.steps.get(self.move[cell], len(self.maze)) == self.steps[cell] - 1


def solved(run: Path, policy_stage: str | None = None) -> list[Solved]:
    """The mazes of a run with the results of its last stages.

    Args:
        run: a finished run of mazes, with a stage of kind value or without.
        policy_stage: the stage of the policy; the last one by default.

    Raises:
        ModelError: the run has no policy yet.
        DataError: its rows are not mazes.
    """
    recipe = recipe_of(run)
    network_at = finished(run, recipe, lambda stage: stage.leaves is Leaves.value)
    policy = load_policy(policy_of(run, recipe, policy_stage), Model(), trainable=False)
    rows = mazes_of(recipe)
    groups = [_group(row, policy) for row in rows]
    value = _values(network_at, groups) if network_at else []
    moves = _moves(policy, rows, groups)
    found = []
    for maze in dict.fromkeys(row["maze"] for row in rows):
        own = [i for i, row in enumerate(rows) if row["maze"] == maze]
        start = {i: int(rows[i]["start"]) for i in own}
        found.append(
            Solved(
                maze,
                frozenset(start[i] for i in own if rows[i]["held_out"]),
                task.walk_values(maze),
                {start[i]: value[i] for i in own if value},
                task.distances(maze),
                {start[i]: moves[i] for i in own},
            )
        )
    return found


def recipe_of(run: Path) -> Recipe:
    """The recipe of a run.

    Raises:
        ModelError: there is none.
    """
    file = run / CONFIG
    if not file.is_file():
        raise ModelError(f"{run}: no run; give the folder of one, like runs/maze")
    return resolve(str(file)).config


def policy_of(run: Path, recipe: Recipe, stage: str | None) -> Path:
    """The checkpoint of a stage's policy; by default of the last one.

    Raises:
        ModelError: it is not finished.
    """
    if stage is None:
        return final_of(run, recipe, lambda stage: stage.leaves is Leaves.policy, "a policy")
    done = StageDirectory(run / stage).done
    if done is None:
        raise ModelError(f"{run / stage}: not finished; run `rlpost train` to the end, or name another stage")
    return done


def final_of(run: Path, recipe: Recipe, wanted: Callable[[Stage], bool], what: str) -> Path:
    """The result that `finished` finds.

    Raises:
        ModelError: there is none; `what` names it in the message.
    """
    done = finished(run, recipe, wanted)
    if done is None:
        raise ModelError(f"{run}: no finished stage gives {what}; run `rlpost train` to the end")
    return done


def finished(run: Path, recipe: Recipe, wanted: Callable[[Stage], bool]) -> Path | None:
    """The result of the last finished stage that is `wanted`; None without one."""
    for name, stage in reversed(recipe.stages.items()):
        done = StageDirectory(run / name).done if stage.enabled and wanted(stage) else None
        if done is not None:
            return done
    return None


def _values(network: Path, groups: Sequence[Group]) -> list[float]:
    """A value network's values of the groups' prompts."""
    model = load_value_head_model(network, Model(), bfloat16=False, device="cpu")
    value: list[float] = torch.sigmoid(model.score(groups).before_N).tolist()
    return value


def mazes_of(recipe: Recipe) -> list[dict[str, Any]]:
    """All starts of the run's mazes.

    Raises:
        DataError: there are none.
    """
    for stage in recipe.stages.values():
        for source in stage.data.values():
            if source.task is not None and source.task.fn == "maze.train":
                args = source.task.args
                rows = [*task.train(**args), *task.held_out(**args)]
                return sorted(rows, key=lambda row: (row["number"], row["start"]))
    raise DataError(f"{recipe.run}: no stage of it reads maze.train; give a run of mazes")


def _group(row: Mapping[str, Any], policy: Policy) -> Group:
    codec = make_codec(policy.tokenizer)
    ids = (*codec.begin, *codec.ids(row["prompt"], "the prompt"))
    # The token does not matter: only the state before it is read.
    return Group(ids, (Completion((codec.end,), (True,)),))


def _moves(policy: Policy, rows: Sequence[Mapping[str, Any]], groups: Sequence[Group]) -> list[int]:
    """The policy's likeliest next cell from each start; the start itself if that is not a neighbour."""
    with torch.no_grad():
        best = policy.distributions(policy.batch(groups))(slice(None)).argmax(1).tolist()
    found = []
    for row, token in zip(rows, best, strict=True):
        sign, cell = policy.tokenizer.decode([token]), int(row["start"])
        near = task.neighbours(row["maze"], cell)
        found.append(next((n for n in near if sign in (row["maze"][n], task.LETTERS[n]) and sign != "."), cell))
    return found
