"""Mazes: their text, the teacher's walk, and the exact solutions."""

from __future__ import annotations

import itertools
import random

import pytest

from rlpost.data.tasks import maze as task
from rlpost.types import Completion

CORRIDOR = "ABCDE"
MAZE = "..$.!" + "#####" * 4
"""A corridor: cells A and B, the exit, D, and the trap."""


def walked(text: str, finish: str = "stop") -> Completion:
    return Completion((), (), text=text, finish=finish)


def example(start: int, maze: str = MAZE) -> dict:
    return {"maze": maze, "start": start}


def test_values_of_a_corridor_by_hand():
    assert task.distances(MAZE) == {2: 0, 1: 1, 0: 2, 3: 1}
    go = 1 - task.GIVES_UP
    # From B to the exit or back to A, from which there is but one way.
    b = go * 0.5 / (1 - go * go * 0.5)
    values = task.walk_values(MAZE)
    assert values[1] == pytest.approx(b, abs=1e-12)
    assert values[0] == pytest.approx(go * b, abs=1e-12)
    assert values[3] == pytest.approx(go * 0.5, abs=1e-12)
    assert values[4] == 0


def test_the_best_neighbour_minus_one():
    for row in task.train(mazes=6):
        maze, steps = row["maze"], task.distances(row["maze"])
        for cell, distance in steps.items():
            if maze[cell] != task.EXIT:
                assert distance == 1 + min(steps[n] for n in task.neighbours(maze, cell) if n in steps)


@pytest.mark.parametrize(
    ("start", "text", "escaped", "optimal"),
    [
        (0, "B$", 1, 1),
        (0, "BAB$", 1, 3 / 4),
        (0, "$", 0, 0),  # through a cell
        (0, "BCB", 0, 1 / 3),  # the exit is not called C
        (3, "!", 0, 0),
        (1, "A?", 0, 0),
        (1, "", 0, 0),
    ],
)
def test_walks_by_hand(start, text, escaped, optimal):
    assert task.escaped(walked(text), example(start)) == escaped
    assert task.optimal(walked(text), example(start)) == pytest.approx(optimal)


def test_a_walk_that_was_cut_off_has_not_escaped():
    assert task.escaped(walked("B$", "length"), example(0)) == 0


def test_every_step_too_many_costs():
    assert task.brisk(walked("B$"), example(0)) == 1
    assert task.brisk(walked("BAB$"), example(0), cost=0.1) == pytest.approx(0.8)
    assert task.brisk(walked("BA?"), example(0)) == 0
    assert task.trapped(walked("!")) == 1


def test_the_teacher_walks_as_its_values_say():
    """2,000 walks a start, within four standard errors of the exact value."""
    draw = random.Random(0)
    for row in task.train(mazes=1)[:4]:
        ends = [task.random_walk(row, draw)["completion"] for _ in range(2000)]
        share = sum(e.endswith("$") for e in ends) / 2000
        exact = task.walk_values(row["maze"])[row["start"]]
        assert abs(share - exact) < 4 * (exact * (1 - exact) / 2000) ** 0.5 + 1e-9
        assert {e[-1] for e in ends} <= set("$!?")
        assert all(task.escaped(walked(e), row) == e.endswith("$") for e in ends)


def test_held_out_starts_are_of_the_same_mazes_and_not_trained_on():
    seen, kept = task.train(), task.held_out()
    assert {r["maze"] for r in kept} == {r["maze"] for r in seen}
    assert not {r["prompt"] for r in kept} & {r["prompt"] for r in seen}
    assert 0.2 < len(kept) / (len(kept) + len(seen)) < 0.3
    assert not {r["maze"] for r in task.unseen()} & {r["maze"] for r in seen}


def test_annotations_stand_in_the_places_of_open_cells():
    (row,) = [r for r in task.train(mazes=1) if r["start"] == task.starts(r["maze"])[1]]
    asked = task.with_places(row)["places"]
    assert len(asked) == row["maze"].count(".")
    assert [text[:-1] for text in asked] == [row["maze"] + ">"] * len(asked)
    assert [row["maze"][task.LETTERS.index(text[-1])] for text in asked] == ["."] * len(asked)
    annotations = "".join(str(i % 10) for i in range(len(asked)))
    (read,) = task.read_value_annotations({**row, "value_annotations": annotations}, part="train")
    seen, start = read["prompt"].split(">")
    assert start == task.LETTERS[row["start"]]
    assert "".join(sign for sign in seen if sign.isdigit()) == annotations
    assert [i for i, sign in enumerate(seen) if not sign.isdigit()] == [
        i for i, sign in enumerate(row["maze"]) if sign != "."
    ]
    assert task.read_value_annotations({**row, "value_annotations": annotations}, part="held_out") == []
    assert task.read_value_annotations({**row, "value_annotations": annotations}, part="unseen") == []


def test_walks_from_one_start_go_their_own_ways():
    row = task.train(mazes=1)[0]
    walks = task.random_walks(row, random.Random(3), n=8)["completions"]
    assert len(walks) == 8
    assert len(set(walks)) > 2
    assert walks[0] == task.random_walk(row, random.Random(3))["completion"]


def test_rows_say_which_part_they_are():
    assert {(r["held_out"], r["unseen"]) for r in task.train(mazes=2)} == {(False, False)}
    assert {(r["held_out"], r["unseen"]) for r in task.held_out(mazes=2)} == {(True, False)}
    assert {(r["held_out"], r["unseen"]) for r in task.unseen(mazes=2)} == {(False, True)}


def test_a_walk_may_have_begun_already():
    draw = random.Random(0)
    row = task.train(mazes=1)[3]
    found = [task.part_way(row, draw, steps=4) for _ in range(300)]
    lengths = set()
    for begun in found:
        path = begun["prompt"].removeprefix(row["prompt"])
        cells = [row["start"], *map(task.LETTERS.index, path)]
        assert all(b in task.neighbours(row["maze"], a) for a, b in itertools.pairwise(cells))
        assert begun["start"] == cells[-1]
        assert row["maze"][begun["start"]] == task.OPEN
        lengths.add(len(path))
    assert lengths == {0, 1, 2, 3, 4}
