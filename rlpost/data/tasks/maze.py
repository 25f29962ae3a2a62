"""Mazes as text, in which values and policies can be computed exactly.

A maze of 5 × 5 cells is written row by row: `.` a cell, `#` a wall, `$` the exit, `!` a trap. The prompt is that,
`>`, and the letter of the start; the completion is the letters of the cells walked through, and ends with `$`, with
`!`, or with `?` where the walker gave up. The teacher walks at random and gives up with probability GIVES_UP before
each step, so that its next step depends on the cell alone.
Example: "...#.!.#...#.....#.$....#.>A" may be completed "BCHMNSS…".
"""

from __future__ import annotations

import random as randomness
from collections import deque
from collections.abc import Mapping
from functools import cache
from typing import Any, Literal

from rlpost.errors import RecipeError
from rlpost.types import Completion

SIDE = 5
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXY"
OPEN, EXIT, TRAP, WALL, LOST = ".", "$", "!", "#", "?"
GIVES_UP = 0.06
HELD_OUT = 4
"""One in so many starts of a maze is never trained on, if walks from other starts pass it."""


def train(*, mazes: int = 8, seed: int = 0) -> list[dict[str, Any]]:
    """Every start of every maze that is not held out.

    Raises:
        RecipeError: `mazes` is not a count.
    """
    return [row for row in _rows(mazes, seed) if not row["held_out"]]


def held_out(*, mazes: int = 8, seed: int = 0) -> list[dict[str, Any]]:
    """The held-out starts of the same mazes.

    Raises:
        RecipeError: `mazes` is not a count.
    """
    return [row for row in _rows(mazes, seed) if row["held_out"]]


def unseen(*, mazes: int = 20, seed: int = 1000) -> list[dict[str, Any]]:
    """All starts of mazes that `train` of another seed does not have.

    Raises:
        RecipeError: `mazes` is not a count.
    """
    return [{**row, "held_out": False, "unseen": True} for row in _rows(mazes, seed)]


def part_way(row: Mapping[str, Any], random: randomness.Random, *, steps: int = 6) -> dict[str, Any]:
    """The row with up to `steps` random steps behind it, which are part of the prompt: exploring starts.

    A good policy no longer visits the far corners, and would forget them.
    """
    maze, cell, path = row["maze"], int(row["start"]), ""
    for _ in range(random.randrange(steps + 1)):
        near = [n for n in neighbours(maze, cell) if maze[n] == OPEN]
        if near:
            cell = random.choice(near)
            path += LETTERS[cell]
    return {**row, "prompt": row["prompt"] + path, "start": cell}


def with_places(row: Mapping[str, Any]) -> dict[str, Any]:
    """The row with `places`: a prompt for every open cell, to ask a value network about."""
    maze = row["maze"]
    return {**row, "places": [prompt(maze, cell) for cell in range(len(maze)) if maze[cell] == OPEN]}


def read_value_annotations(
    row: Mapping[str, Any], *, part: Literal["train", "held_out", "unseen"]
) -> list[dict[str, Any]]:
    """The row with its annotations in the prompt, a digit for every open cell; no row of another part."""
    here = "unseen" if row["unseen"] else "held_out" if row["held_out"] else "train"
    if here != part:
        return []
    annotations = iter(row["value_annotations"])
    digits = "".join(next(annotations) if sign == OPEN else sign for sign in row["maze"])
    return [{**row, "prompt": prompt(digits, row["start"])}]


def random_walk(row: Mapping[str, Any], random: randomness.Random) -> dict[str, Any]:
    """The row with a walk of the teacher from its start."""
    return {**row, "completion": _walk(row["maze"], int(row["start"]), random)}


def random_walks(row: Mapping[str, Any], random: randomness.Random, *, n: int = 4) -> dict[str, Any]:
    """The row with `n` walks of the teacher from its start."""
    return {**row, "completions": [_walk(row["maze"], int(row["start"]), random) for _ in range(n)]}


def escaped(completion: Completion, example: Mapping[str, Any]) -> float:
    """1 for a walk through neighbouring cells that ends at the exit, else 0."""
    return float(completion.finish != "length" and _ends_at_exit(completion.text, example))


def brisk(completion: Completion, example: Mapping[str, Any], *, cost: float = 0.05) -> float:
    """1 less `cost` for every step beyond the fewest, for a walk that escapes; else 0."""
    if not escaped(completion, example):
        return 0.0
    return 1.0 - cost * (len(completion.text) - distances(example["maze"])[int(example["start"])])


def trapped(completion: Completion) -> float:
    """1 for a walk that ends in the trap, else 0."""
    return float(completion.text.endswith(TRAP))


def optimal(completion: Completion, example: Mapping[str, Any]) -> float:
    """The share of moves that come a step nearer to the exit; 0 from the first impossible one on."""
    maze, cell, good = example["maze"], int(example["start"]), 0
    steps = distances(maze)
    for sign in completion.text:
        here = next((n for n in neighbours(maze, cell) if _sign(maze, n) == sign), None)
        if here is None:
            break
        good += steps.get(here, len(maze)) == steps[cell] - 1
        cell = here
        if maze[cell] in (EXIT, TRAP):
            break
    return good / max(len(completion.text), 1)


def neighbours(maze: str, cell: int) -> list[int]:
    """The cells that can be reached in one step."""
    row, column = divmod(cell, SIDE)
    around = [(row - 1, column), (row + 1, column), (row, column - 1), (row, column + 1)]
    inside = [r * SIDE + c for r, c in around if 0 <= r < SIDE and 0 <= c < SIDE]
    return [n for n in inside if maze[n] != WALL]


@cache
def distances(maze: str) -> Mapping[int, int]:
    """Fewest steps to the exit from every cell that can reach it, past the trap: minus these are the values.

    Value iteration's fixed point: a cell's value is its best neighbour's minus one, the exit's is 0.
    """
    found = {maze.index(EXIT): 0}
    queue = deque(found)
    while queue:
        cell = queue.popleft()
        for n in neighbours(maze, cell):
            if n not in found and maze[n] != TRAP:
                found[n] = found[cell] + 1
                queue.append(n)
    return found


@cache
def walk_values(maze: str, sweeps: int = 2000) -> Mapping[int, float]:
    """The probability that the teacher's walk from a cell ends at the exit: policy evaluation to a fixed point."""
    value = {c: float(maze[c] == EXIT) for c in range(len(maze)) if maze[c] != WALL}
    open_cells = [c for c in value if maze[c] not in (EXIT, TRAP)]
    for _ in range(sweeps):
        change = 0.0
        for c in open_cells:
            around = neighbours(maze, c)
            new = (1 - GIVES_UP) * sum(value[n] for n in around) / len(around)
            change, value[c] = max(change, abs(new - value[c])), new
        if change < 1e-14:
            break
    return value


def starts(maze: str) -> list[int]:
    """Cells from which the exit can be reached, without the exit."""
    return sorted(c for c, steps in distances(maze).items() if steps)


def prompt(maze: str, start: int) -> str:
    """The text that a walk completes."""
    return f"{maze}>{LETTERS[start]}"


def _walk(maze: str, cell: int, random: randomness.Random) -> str:
    path = ""
    while True:
        if random.random() < GIVES_UP:
            return path + LOST
        cell = random.choice(neighbours(maze, cell))
        if maze[cell] in (EXIT, TRAP):
            return path + maze[cell]
        path += LETTERS[cell]


def _rows(count: int, seed: int) -> list[dict[str, Any]]:
    if count < 1:
        raise RecipeError(f"mazes={count}: give at least 1")
    rows = []
    for number in range(count):
        maze = _maze(randomness.Random(f"{seed}/{number}"))
        for i, start in enumerate(starts(maze)):
            # No walk from elsewhere passes a cell behind the exit: held out, it would be in no text at all.
            passed = any(maze[n] == OPEN for n in neighbours(maze, start))
            rows.append(
                {
                    "prompt": prompt(maze, start),
                    "maze": maze,
                    "number": number,
                    "start": start,
                    "held_out": passed and i % HELD_OUT == number % HELD_OUT,
                    "unseen": False,
                }
            )
    return rows


def _maze(random: randomness.Random) -> str:
    """Seven walls, an exit and a trap; all other cells are connected, and some are far from the exit."""
    while True:
        cells = [OPEN] * SIDE**2
        for cell, sign in zip(random.sample(range(SIDE**2), 9), f"{WALL * 7}{EXIT}{TRAP}", strict=True):
            cells[cell] = sign
        maze = "".join(cells)
        steps = distances(maze)
        if len(steps) == SIDE**2 - 8 and max(steps.values()) >= SIDE + 2:
            return maze


def _sign(maze: str, cell: int) -> str:
    return maze[cell] if maze[cell] in (EXIT, TRAP) else LETTERS[cell]


def _ends_at_exit(text: str, example: Mapping[str, Any]) -> bool:
    maze, cell = example["maze"], int(example["start"])
    for sign in text:
        here = next((n for n in neighbours(maze, cell) if _sign(maze, n) == sign), None)
        if here is None:
            return False
        cell = here
        if maze[cell] in (EXIT, TRAP):
            break
    return maze[cell] == EXIT and text.endswith(EXIT)
