"""Worlds of scripts/reverse.py: mazes of three shapes, and arithmetic with gaps; their teachers are solved exactly.

A problem is a start, a goal and a number of steps between them. A world writes its teacher's texts, reads what a model
wrote from either end, says what is legal, and knows with what probability one sample of the teacher solves a problem.

Axes: S states of the teacher's chain, T texts.
"""

from __future__ import annotations

import random as randomness
import re
from collections import deque
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

Node = Hashable
"""A place in a world: a cell of a maze; in arithmetic a number and how many operations stand before it."""
Visits = tuple[tuple[Node, int], ...]
"""The places that the legal part of a sample comes to, in order, each with the tokens it took to get there."""
LETTERS = "".join(c for c in map(chr, range(0x41, 0x250)) if c.isalpha())
SHAPES = ("open", "funnel", "one-way")
WALLS = 0.2
"""Share of the cells of an open maze and of a funnel that are walls."""
MODULUS, OPERATIONS = 100, 6
"""Of arithmetic: numbers 0 to 99, chains of six operations."""


@dataclass(frozen=True)
class Problem:
    """Find a legal way from `start` to `goal`: of at most `steps` steps in a maze, exactly as many in arithmetic."""

    start: Node
    goal: Node
    steps: int
    tokens: int
    """Of one full sample; the halves of a search from both ends have half as many."""


class World(Protocol):
    """What the experiment asks of a world; `backward` is where a text is read and written from its end."""

    @property
    def alphabet(self) -> str:
        """Every character of its texts."""
        ...

    def texts(self, count: int, seed: int) -> list[str]:
        """What the teacher writes."""
        ...

    def opening(self, problem: Problem, backward: bool) -> str:
        """What a model is given: the start, or the goal as a text from its end begins with it."""
        ...

    def visits(self, problem: Problem, text: str, backward: bool) -> Visits:
        """Where the sample goes from its end, up to the first thing in it that is not legal."""
        ...

    def legal(self, problem: Problem, path: Sequence[Node]) -> bool:
        """Whether a path solves the problem."""
        ...

    def arrivals(self, problem: Problem, backward: bool) -> list[float]:
        """[tokens] the exact P(a sample of the teacher from one end first passes through the other at that token)."""
        ...


@dataclass(frozen=True)
class Chain:
    """A stationary Markov chain."""

    place_S: NDArray[np.int64]
    """The cell that a state stands on."""
    move_SS: NDArray[np.float64]
    """P(next state | state)."""
    share_S: NDArray[np.float64]
    """The stationary distribution."""

    @cached_property
    def backward(self) -> Chain:
        """The chain read from the end: P(i before j) = π_i·P(i→j)/π_j (Norris 1997, Markov Chains, Theorem 1.9.1)."""
        joint_SS = (self.share_S[:, None] * self.move_SS).T
        return Chain(self.place_S, joint_SS / joint_SS.sum(1, keepdims=True), self.share_S)

    def arrivals(self, start: int, goal: int, steps: int) -> list[float]:
        """[steps] P(first on cell `goal` after 1, 2, … steps | now on cell `start`): a sum over states × steps."""
        mass_S = np.where(self.place_S == start, self.share_S, 0.0)
        mass_S, found = mass_S / mass_S.sum(), []
        for _ in range(steps):
            mass_S = mass_S @ self.move_SS
            found.append(float(mass_S[self.place_S == goal].sum()))
            mass_S = np.where(self.place_S == goal, 0.0, mass_S)
        return found

    def walks(self, steps: int, count: int, seed: int) -> NDArray[np.int64]:
        """[T, steps + 1] cells of stationary walks."""
        random = np.random.default_rng(seed)
        upto_SS = self.move_SS.cumsum(1)
        state_T = random.choice(len(self.share_S), size=count, p=self.share_S)
        cells = [self.place_S[state_T]]
        for _ in range(steps):
            # The sum of a row may be a rounding below 1, so what is drawn is held below it.
            drawn_T1 = random.random((count, 1)) * upto_SS[state_T, -1:]
            state_T = (upto_SS[state_T] > drawn_T1).argmax(1)
            cells.append(self.place_S[state_T])
        return np.stack(cells, 1)


@dataclass(frozen=True)
class Maze:
    """Cells with ways between them; a text is a walk, a character a cell.

    The teacher goes to any cell beside it but the one it came from, unless there is no other.
    """

    steps: int
    """The longest walk that counts, and the length of the texts."""
    ways: tuple[tuple[int, ...], ...]
    """Cell -> cells that can be stepped on from it; none from a wall."""
    ends: tuple[tuple[int, int], ...]
    """The starts and goals of its problems."""

    @property
    def alphabet(self) -> str:
        """A letter a cell."""
        return LETTERS[: len(self.ways)]

    @property
    def problems(self) -> tuple[Problem, ...]:
        """One a pair of ends."""
        return tuple(Problem(start, goal, self.steps, self.steps) for start, goal in self.ends)

    @cached_property
    def chain(self) -> Chain:
        """The teacher: a state is a cell and the one before it."""
        states = [(a, b) for a, beside in enumerate(self.ways) for b in beside]
        number = {state: i for i, state in enumerate(states)}
        move_SS = np.zeros((len(states), len(states)))
        for (a, b), i in number.items():
            onward = [c for c in self.ways[b] if c != a] or list(self.ways[b])
            for c in onward:
                move_SS[i, number[b, c]] = 1 / len(onward)
        # Staying half of the time changes no stationary distribution, and makes the powers converge.
        lazy_SS = (np.eye(len(states)) + move_SS) / 2
        for _ in range(16):
            lazy_SS = lazy_SS @ lazy_SS
            lazy_SS /= lazy_SS.sum(1, keepdims=True)
        return Chain(np.array([b for _, b in states]), move_SS, lazy_SS.mean(0))

    def texts(self, count: int, seed: int) -> list[str]:
        """Stationary walks of `steps` steps."""
        return ["".join(LETTERS[c] for c in walk) for walk in self.chain.walks(self.steps, count, seed)]

    def opening(self, problem: Problem, backward: bool) -> str:
        """The cell at one end."""
        return LETTERS[_cell(problem.goal if backward else problem.start)]

    def visits(self, problem: Problem, text: str, backward: bool) -> Visits:
        """The cells stepped on; backward, each must be a cell from which one comes to the next."""
        here, found = _cell(problem.goal if backward else problem.start), []
        for tokens, sign in enumerate(text, 1):
            there = LETTERS.find(sign)
            a, b = (there, here) if backward else (here, there)
            if not 0 <= there < len(self.ways) or b not in self.ways[a]:
                break
            found.append((there, tokens))
            here = there
        return tuple(found)

    def legal(self, problem: Problem, path: Sequence[Node]) -> bool:
        """From start to goal by the maze's ways, in no more than the steps allowed."""
        cells = [_cell(node) for node in path]
        return (
            (cells[0], cells[-1]) == (problem.start, problem.goal)
            and len(cells) - 1 <= problem.steps
            and all(b in self.ways[a] for a, b in pairwise(cells))
        )

    def arrivals(self, problem: Problem, backward: bool) -> list[float]:
        """By dynamic programming over states × steps."""
        start, goal = _cell(problem.start), _cell(problem.goal)
        if backward:
            return self.chain.backward.arrivals(goal, start, problem.steps)
        return self.chain.arrivals(start, goal, problem.steps)


def make_maze(shape: str, side: int, seed: int) -> Maze:
    """A random maze whose problems have their ends `side` steps apart, with twice as many allowed.

    `open`: walls at random, and three ways or more from either end. `funnel`: four corridors of side/2 cells lead out
    of such a maze, and the goals are where they end. `one-way`: from the entrance to every cell there is one way, and
    no way back; a dead end drops the walker at the entrance.

    Raises:
        ValueError: there is no such shape.
    """
    random = randomness.Random(f"{shape}/{side}/{seed}")
    while True:
        if shape == "one-way":
            maze = _one_way(side, random)
        elif shape in SHAPES:
            maze = _walled(side, random, corridors=shape == "funnel")
        else:
            raise ValueError(f"shape {shape!r}: one of {', '.join(SHAPES)}")
        if len(maze.ends) >= 3:
            return maze


def distances(ways: Sequence[Sequence[int]], start: int) -> dict[int, int]:
    """Fewest steps from a cell to every cell that can be reached."""
    found, queue = {start: 0}, deque([start])
    while queue:
        cell = queue.popleft()
        for n in ways[cell]:
            if n not in found:
                found[n] = found[cell] + 1
                queue.append(n)
    return found


def _walled(side: int, random: randomness.Random, corridors: bool) -> Maze:
    cells = {c for c in range(side**2) if random.random() >= WALLS}
    ways: list[list[int]] = [[n for n in _beside(c, side) if n in cells] if c in cells else [] for c in range(side**2)]
    inside = max((set(distances(ways, c)) for c in cells), key=len)
    ways = [beside if c in inside else [] for c, beside in enumerate(ways)]
    inner = [c for c in sorted(inside) if len(ways[c]) >= 3]
    goals = list(inner)
    if corridors:
        borders = ((0, side), (0, 1), (side - 1, side), (side - 1, 1))
        edges = [[c for c in inside if c // unit % side == line] for line, unit in borders]
        goals = [_corridor(ways, random.choice(sorted(edge)), side // 2) for edge in edges if edge]
    ends = [(s, g) for g in goals for s in inner if distances(ways, s).get(g) == side]
    return Maze(2 * side, tuple(map(tuple, ways)), tuple(ends))


def _corridor(ways: list[list[int]], mouth: int, length: int) -> int:
    """Dig one; returns the cell where it ends."""
    for here in [mouth, *range(len(ways), len(ways) + length - 1)]:
        ways[here].append(len(ways))
        ways.append([here])
    return len(ways) - 1


def _one_way(side: int, random: randomness.Random) -> Maze:
    ways: list[list[int]] = [[] for _ in range(side**2)]
    for cell in range(1, side**2):
        # The entrance is the first corner: nearer to it are the cells above and to the left.
        ways[random.choice([n for n in _beside(cell, side) if n < cell])].append(cell)
    depth = distances(ways, 0)
    dropped = tuple(tuple(beside or [0]) for beside in ways)
    return Maze(2 * side, dropped, tuple((0, c) for c, steps in depth.items() if steps == side))


def _beside(cell: int, side: int) -> Iterator[int]:
    row, column = divmod(cell, side)
    for r, c in ((row - 1, column), (row + 1, column), (row, column - 1), (row, column + 1)):
        if 0 <= r < side and 0 <= c < side:
            yield r * side + c


def _cell(node: Node) -> int:
    assert isinstance(node, int)
    return node


_FORWARD = re.compile(r"([+*])(\d)=(\d\d)")
_BACKWARD = re.compile(r"=(\d)([+*])(\d\d)")
TOKENS = 5
"""Of an operation and its result."""


@dataclass(frozen=True)
class Arithmetic:
    """Chains of six operations, +1 to +9 and *2 modulo 100: "12+7=19*2=38…"; `gaps` of them are to be filled in.

    From the start a model writes what comes after it, as in the first operations of a chain; from the goal what
    comes before it, as in the last ones. The teacher's first number and operations are uniform.
    """

    gaps: int

    alphabet = "0123456789+*="

    @cached_property
    def problems(self) -> tuple[Problem, ...]:
        """All starts and goals between which the operations can be filled in."""
        starts, goals = np.nonzero(np.linalg.matrix_power(self._move_SS, self.gaps))
        size = TOKENS * self.gaps
        pairs = zip(starts.tolist(), goals.tolist(), strict=True)
        return tuple(Problem((x, 0), (y, self.gaps), self.gaps, size) for x, y in pairs)

    @cached_property
    def _move_SS(self) -> NDArray[np.float64]:
        """P(next number | number)."""
        move_SS = np.zeros((MODULUS, MODULUS))
        for x in range(MODULUS):
            for y in results(x):
                move_SS[x, y] += 0.1
        return move_SS

    def texts(self, count: int, seed: int) -> list[str]:
        """Whole chains, numbers of two digits."""
        random = randomness.Random(f"arithmetic/{seed}")
        return [self._text(random) for _ in range(count)]

    def _text(self, random: randomness.Random) -> str:
        x = random.randrange(MODULUS)
        text = f"{x:02d}"
        for _ in range(OPERATIONS):
            sign = random.choice(["*2", *(f"+{d}" for d in range(1, 10))])
            x = apply(x, sign[0], int(sign[1]))
            text += f"{sign}={x:02d}"
        return text

    def opening(self, problem: Problem, backward: bool) -> str:
        """The number at one end, from the end its digits in reverse."""
        number, _ = _number(problem.goal if backward else problem.start)
        return f"{number:02d}"[::-1] if backward else f"{number:02d}"

    def visits(self, problem: Problem, text: str, backward: bool) -> Visits:
        """The numbers come to, one an operation that is complete, allowed and right."""
        here, place = _number(problem.goal if backward else problem.start)
        found = []
        for tokens in range(TOKENS, len(text) + 1, TOKENS):
            match = (_BACKWARD if backward else _FORWARD).fullmatch(text[tokens - TOKENS : tokens])
            if match is None:
                break
            digit, sign = match.group(1, 2) if backward else match.group(2, 1)
            there = int(match[3][::-1] if backward else match[3])
            x, y = (there, here) if backward else (here, there)
            allowed = digit == "2" if sign == "*" else digit != "0"
            if not allowed or apply(x, sign, int(digit)) != y:
                break
            here, place = there, place + (-1 if backward else 1)
            found.append(((here, place), tokens))
        return tuple(found)

    def legal(self, problem: Problem, path: Sequence[Node]) -> bool:
        """Every number is the result of an operation on the one before it, and they are as many as asked."""
        numbers = [_number(node)[0] for node in path]
        return (path[0], path[-1], len(path) - 1) == (problem.start, problem.goal, problem.steps) and all(
            y in results(x) for x, y in pairwise(numbers)
        )

    def arrivals(self, problem: Problem, backward: bool) -> list[float]:
        """All at the last token: forward P(y there | x); backward, by Bayes, times P(x)/P(y), each in its place."""
        (x, _), (y, _) = _number(problem.start), _number(problem.goal)
        power = np.linalg.matrix_power
        chance = power(self._move_SS, self.gaps)[x, y]
        if backward:
            before, end = (power(self._move_SS, n).mean(0) for n in (OPERATIONS - self.gaps, OPERATIONS))
            chance *= before[x] / end[y]
        return [0.0] * (problem.tokens - 1) + [float(chance)]


def apply(x: int, sign: str, digit: int) -> int:
    """One operation."""
    return (x * digit if sign == "*" else x + digit) % MODULUS


def results(x: int) -> list[int]:
    """Of the ten operations on a number."""
    return [apply(x, "*", 2), *(apply(x, "+", d) for d in range(1, 10))]


def _number(node: Node) -> tuple[int, int]:
    assert isinstance(node, tuple)
    return node
