"""What a run knows of its mazes, beside the exact solution: values as heat maps, policies as arrows, and the errors."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from rlpost.data.codec import make_codec
from rlpost.data.tasks import maze as task
from rlpost.errors import DataError, ModelError
from rlpost.policy.load import load_policy
from rlpost.policy.params import Model
from rlpost.policy.policy import Policy
from rlpost.policy.scalar import load_scalar
from rlpost.recipe.resolve import resolve
from rlpost.recipe.rules import Leaves
from rlpost.recipe.schema import Recipe
from rlpost.recipe.specs.common import Stage
from rlpost.run.names import CONFIG
from rlpost.run.stage import StageDirectory
from rlpost.types import Completion, Group

ARROWS = {-task.SIDE: "↑", task.SIDE: "↓", -1: "←", 1: "→"}
SHADES = " ░▒▓█"


@dataclass(frozen=True)
class Solved:
    """One maze: what is exact, and what was learned."""

    maze: str
    held_out: frozenset[int]
    """Starts that nothing was trained on."""
    walk: Mapping[int, float]
    """Exact: the probability that the random walk from a cell ends at the exit."""
    value: Mapping[int, float]
    """What the value network says of it; empty where the run has none."""
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
        """The policy's move comes a step nearer to the exit."""
        return self.steps.get(self.move[cell], len(self.maze)) == self.steps[cell] - 1


def solved(run: Path, policy_stage: str | None = None) -> list[Solved]:
    """The mazes of a run, as its last stages know them.

    Args:
        run: a finished run of mazes, with a stage of kind value or without.
        policy_stage: whose policy; the last one by default.

    Raises:
        ModelError: the run has no policy yet.
        DataError: its rows are no mazes.
    """
    recipe = recipe_of(run)
    scalar_at = finished(run, recipe, lambda stage: stage.leaves is Leaves.value)
    policy = load_policy(policy_of(run, recipe, policy_stage), Model(), trainable=False)
    rows = mazes_of(recipe)
    groups = [_group(row, policy) for row in rows]
    value = _values(scalar_at, groups) if scalar_at else []
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
    """What a run did.

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
        ModelError: it is not there yet.
    """
    if stage is None:
        return final_of(run, recipe, lambda stage: stage.leaves is Leaves.policy, "a policy")
    done = StageDirectory(run / stage).done
    if done is None:
        raise ModelError(f"{run / stage}: not finished; run `rlpost train` to the end, or name another stage")
    return done


def report(found: Sequence[Solved]) -> list[str]:
    """The numbers, in lines."""
    lines = []
    for title, wanted in (("trained on", False), ("held out", True)):
        some = [(s, c) for s in found for c in s.starts if (c in s.held_out) == wanted]
        best = fmean(float(s.is_optimal(c)) for s, c in some)
        line = f"starts {title}: {len(some)}, optimal moves {best:.1%}"
        if found[0].value:
            error = fmean(s.errors[c] for s, c in some)
            noise = fmean(s.walk[c] * (1 - s.walk[c]) for s, c in some)
            worth = noise / max(fmean(s.errors[c] ** 2 for s, c in some), 1e-12)
            tokens = fmean(_length(s.maze, c) for s, c in some)
            line += (
                f", mean |V − exact| {error:.3f}: one look is as good as {worth:.0f} walks from each, "
                f"of {tokens:.1f} tokens"
            )
        lines.append(line)
    return lines


def _length(maze: str, start: int, walks: int = 20) -> float:
    """Mean tokens of a random walk and its end token."""
    draw = random.Random(start)
    row = {"maze": maze, "start": start}
    return fmean(len(task.random_walk(row, draw)["completion"]) + 1 for _ in range(walks))


def in_text(s: Solved) -> list[str]:
    """The maze for a terminal: values as shades, the policy's arrows; x marks a move that is not best.

    The values are the network's, or the exact ones where there is none.
    """
    lines = []
    for row in range(task.SIDE):
        shades, arrows = "", ""
        for cell in range(row * task.SIDE, (row + 1) * task.SIDE):
            sign = s.maze[cell]
            if cell in s.move:
                value = s.value.get(cell, s.walk[cell])
                shades += SHADES[min(int(value * len(SHADES)), len(SHADES) - 1)] * 2
                arrows += ARROWS.get(s.move[cell] - cell, "·") + (" " if s.is_optimal(cell) else "x")
            else:
                shades += sign * 2
                arrows += sign + " "
        lines.append(f"{shades}   {arrows}")
    return lines


def draw(found: Sequence[Solved], file: Path) -> None:
    """A PNG: a row a maze, with the exact values, the learned ones, the best moves and the policy's.

    Raises:
        ModelError: matplotlib is not installed.
    """
    try:
        import matplotlib

        matplotlib.use("Agg")
        import matplotlib.pyplot as plt
    except ImportError as error:
        raise ModelError("pictures need matplotlib: pip install rlpost[plots]") from error
    titles = ["exact V of the walk", *(["learned V"] if found[0].value else []), "fewest steps", "the policy"]
    size = (2.5 * len(titles), 2.6 * len(found))
    figure, axes = plt.subplots(len(found), len(titles), figsize=size, squeeze=False, layout="constrained")
    for s, line in zip(found, axes, strict=True):
        _heat(line[0], s, {c: s.walk[c] for c in s.starts}, "{:.2f}")
        if s.value:
            _heat(line[1], s, s.value, "{:.2f}")
        _heat(line[-2], s, {c: 1 - s.steps[c] / 12 for c in s.starts}, "", arrows={c: _best(s, c) for c in s.starts})
        _heat(line[-1], s, {c: float(s.is_optimal(c)) for c in s.starts}, "", arrows={c: [s.move[c]] for c in s.starts})
    for title, axis in zip(titles, axes[0], strict=True):
        axis.set_title(title, fontsize=10)
    figure.savefig(file, dpi=110)
    plt.close(figure)


def _heat(
    axes: Any, s: Solved, value: Mapping[int, float], form: str, arrows: Mapping[int, Sequence[int]] | None = None
) -> None:
    grid = [[value.get(r * task.SIDE + c, float("nan")) for c in range(task.SIDE)] for r in range(task.SIDE)]
    axes.set_facecolor("0.15")
    axes.imshow(grid, cmap="viridis", vmin=0, vmax=1)
    for cell, sign in enumerate(s.maze):
        row, column = divmod(cell, task.SIDE)
        if cell not in value:
            axes.text(column, row, "" if sign == task.WALL else sign, color="w", ha="center", va="center", fontsize=14)
            continue
        ink = "w" if value[cell] < 0.6 else "k"
        if form:
            axes.text(column, row, form.format(value[cell]), color=ink, ha="center", va="center", fontsize=7)
        for to in (arrows or {}).get(cell, ()):
            down, right = (to // task.SIDE - row) * 0.6, (to % task.SIDE - column) * 0.6
            axes.annotate(
                "",
                (column + right / 2, row + down / 2),
                (column - right / 2, row - down / 2),
                arrowprops={"arrowstyle": "->", "color": ink, "lw": 1.5},
            )
        if cell in s.held_out:
            axes.plot(column + 0.38, row - 0.38, "o", ms=3, color="tab:red")
    axes.set(xticks=[], yticks=[])


def _best(s: Solved, cell: int) -> list[int]:
    return [n for n in task.neighbours(s.maze, cell) if s.steps.get(n, len(s.maze)) == s.steps[cell] - 1]


def final_of(run: Path, recipe: Recipe, wanted: Callable[[Stage], bool], what: str) -> Path:
    """As `finished`.

    Raises:
        ModelError: there is none; `what` is said to be missing.
    """
    done = finished(run, recipe, wanted)
    if done is None:
        raise ModelError(f"{run}: no finished stage gives {what}; run `rlpost train` to the end")
    return done


def finished(run: Path, recipe: Recipe, wanted: Callable[[Stage], bool]) -> Path | None:
    """The result of the last finished stage of those wanted; None where there is none."""
    for name, stage in reversed(recipe.stages.items()):
        done = StageDirectory(run / name).done if stage.enabled and wanted(stage) else None
        if done is not None:
            return done
    return None


def _values(network: Path, groups: Sequence[Group]) -> list[float]:
    """What a value network says of the groups' prompts."""
    scalar = load_scalar(network, Model(), bfloat16=False, device="cpu")
    value: list[float] = torch.sigmoid(scalar.score(groups).before_N).tolist()
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
    # Any token will do: the state before it is looked at.
    return Group(ids, (Completion((codec.end,), (True,)),))


def _moves(policy: Policy, rows: Sequence[Mapping[str, Any]], groups: Sequence[Group]) -> list[int]:
    """The cell that the policy is likeliest to go to from each start; the start itself if it is no cell beside it."""
    with torch.no_grad():
        best = policy.distributions(policy.batch(groups))(slice(None)).argmax(1).tolist()
    found = []
    for row, token in zip(rows, best, strict=True):
        sign, cell = policy.tokenizer.decode([token]), int(row["start"])
        near = task.neighbours(row["maze"], cell)
        found.append(next((n for n in near if sign in (row["maze"][n], task.LETTERS[n]) and sign != "."), cell))
    return found
