"""Plots a run's mazes next to the exact solution: values as heat maps, policies as arrows, and errors."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from rlpost import console
from rlpost.data.tasks import maze as task
from rlpost.errors import ModelError
from rlpost.goals.maze_escapes import escapes
from rlpost.goals.maze_run import Solved, solved

ARROWS = {-task.SIDE: "↑", task.SIDE: "↓", -1: "←", 1: "→"}
SHADES = " ░▒▓█"


def plot_mazes(run: Path, out: Path | None = None, stage: str | None = None, count: int = 3) -> Path:
    """Draw a run's mazes in the terminal and as a PNG, and print its models' errors; returns the picture's path.

    Args:
        run: a finished run of mazes.
        out: the .png file; by default `maze.png` in the run.
        stage: the stage of the policy; the last one by default.
        count: number of mazes to draw.

    Raises:
        ModelError: the run has no walker or no policy yet, or matplotlib is not installed.
        DataError: its rows are not mazes.
    """
    found = solved(run, stage)
    for s in found[:count]:
        console.say("\n".join(["", *in_text(s)]))
    file = out or run / "maze.png"
    draw(found[:count], file)
    console.say("\n".join(["", *report(found), *escapes(run, stage)]))
    return file


def report(found: Sequence[Solved]) -> list[str]:
    """The numbers, as lines."""
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
                f", mean |V − exact| {error:.3f}: one evaluation is as good as {worth:.0f} walks from each start, "
                f"of {tokens:.1f} tokens"
            )
        lines.append(line)
    return lines


def _length(maze: str, start: int, walks: int = 20) -> float:
    """Mean tokens of a random walk, its end token included."""
    draw = random.Random(start)
    row = {"maze": maze, "start": start}
    return fmean(len(task.random_walk(row, draw)["completion"]) + 1 for _ in range(walks))


def in_text(s: Solved) -> list[str]:
    """The maze for a terminal: values as shades, the policy's arrows; x marks a move that is not best.

    The values are the network's, or exact ones if there is no network.
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
