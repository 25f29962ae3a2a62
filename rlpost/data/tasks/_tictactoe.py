"""Tic-tac-toe solved: values of all positions, best answers to fallible players, and the value of a whole policy.

A board is nine cells, row by row, as the player to move sees it: `x` its own stones, `o` the other's, `.` free. Values
are of the result to the player to move: 1 won, 0 drawn, -1 lost. Cells are counted from 0.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

FREE, OWN, OTHER = ".", "x", "o"
EMPTY = FREE * 9
LINES = ((0, 1, 2), (3, 4, 5), (6, 7, 8), (0, 3, 6), (1, 4, 7), (2, 5, 8), (0, 4, 8), (2, 4, 6))
UNKNOWN = -1
"""In a policy's probabilities of moves: the share of which nothing is known."""
_TURNED = str.maketrans(OWN + OTHER, OTHER + OWN)


def turned(board: str) -> str:
    """The board as the other player sees it."""
    return board.translate(_TURNED)


def free(board: str) -> list[int]:
    """The free cells, ascending."""
    return [cell for cell, sign in enumerate(board) if sign == FREE]


def played(board: str, cell: int) -> str:
    """The board after a stone of the player to move, who still looks at it."""
    return f"{board[:cell]}{OWN}{board[cell + 1 :]}"


@cache
def won(board: str) -> bool:
    """Whether the player who looks at the board has three in a row."""
    return any(all(board[cell] == OWN for cell in line) for line in LINES)


@cache
def minimax(board: str) -> Mapping[int, int]:
    """The value of every legal move if both players go on without a mistake."""
    values = {}
    for cell in free(board):
        after = played(board, cell)
        values[cell] = 1 if won(after) else -max(minimax(turned(after)).values(), default=0)
    return values


@cache
def player(board: str, skill: float) -> Mapping[int, float]:
    """The probabilities of the moves of a player to move who is perfect with probability `skill`, and else random.

    Random: uniform over legal moves. Perfect: uniform over those of the highest value by `minimax`.
    """
    values = minimax(board)
    top = max(values.values())
    best = [cell for cell, value in values.items() if value == top]
    return {cell: (1 - skill) / len(values) + skill * (cell in best) / len(best) for cell in values}


@cache
def action_values(board: str, skill: float) -> Mapping[int, float]:
    """The value of every legal move against `player(skill)`, for one who goes on with the best answers to that player.

    Expectimax; with `skill` 1 that is `minimax`, without its rounding.
    """
    if skill == 1:
        return minimax(board)
    return {cell: _expected(played(board, cell), skill) for cell in free(board)}


def best_value(board: str, skill: float) -> float:
    """The highest of `action_values`."""
    return max(action_values(board, skill).values())


def _expected(after: str, skill: float) -> float:
    """The value to the player who has just moved."""
    if won(after):
        return 1.0
    if FREE not in after:
        return 0.0
    return sum(
        p * (best_value(board, skill) if result is None else result)
        for p, board, result in answers(after, player(turned(after), skill))
        if p
    )


class Answer(NamedTuple):
    """What becomes of a position by a move of the other player."""

    probability: float
    board: str
    """As the first player, who is to move again, sees it."""
    result: float | None
    """To the first player; None if the game goes on."""


def answers(after: str, moves: Mapping[int, float]) -> list[Answer]:
    """The other player's moves, with their probabilities, after the first has moved to `after`."""
    seen, found = turned(after), []
    for cell, p in moves.items():
        answered = played(seen, cell)
        result = -1.0 if won(answered) else None if FREE in answered else 0.0
        found.append(Answer(p, turned(answered), result))
    return found


class Node(NamedTuple):
    """A position that a policy is asked about, with all that led to it."""

    turns: tuple[tuple[str, int], ...]
    """The boards that the policy has seen, each with its move."""
    board: str
    """The policy is to move."""
    reach: float
    """The probability of coming here."""


Moves = Callable[[Sequence[Node]], Sequence[Mapping[int, float]]]
"""A policy: for each position, the probabilities of legal moves; what is missing from 1 is a move that is not legal,
which loses, but for the share of `UNKNOWN`."""


@dataclass(frozen=True)
class Worth:
    """What a whole policy is worth against a player, by enumeration."""

    value: float
    """Mean result, in which what is unknown counts as drawn."""
    best: float
    """The value of the best policy against the same player."""
    illegal: float
    """The probability that a game ends by a move that is not legal."""
    unknown: float
    """The probability of games that were not followed to their ends: the value is within so much of the true one."""
    positions: int
    """How many the policy was asked about."""

    @property
    def regret(self) -> float:
        """What the policy falls short of the best one."""
        return self.best - self.value


def worth(moves: Moves, skill: float, starts: Mapping[str, float], tolerance: float = 0.0) -> Worth:
    """The value of a policy against `player(skill)`.

    Args:
        moves: the policy, which may depend on all that came before.
        skill: of the player.
        starts: boards with the policy to move, and their probabilities.
        tolerance: positions that are reached with at most so small a probability in all are left unknown.
    """
    value = illegal = unknown = 0.0
    positions = 0
    nodes = [Node((), board, p) for board, p in starts.items()]
    while nodes:
        nodes, left_out = _likely(nodes, tolerance / 5)  # the policy has at most five turns
        unknown += left_out
        positions += len(nodes)
        going: list[Node] = []
        for node, chances in zip(nodes, moves(nodes), strict=True):
            unknown += node.reach * chances.get(UNKNOWN, 0.0)
            lost = node.reach * max(0.0, 1.0 - sum(chances.values()))
            illegal, value = illegal + lost, value - lost
            for cell, p in chances.items():
                if cell != UNKNOWN and p > 0:
                    ended, more = _moved(node, cell, node.reach * p, skill)
                    value += ended
                    going += more
        nodes = going
    best = sum(p * best_value(board, skill) for board, p in starts.items())
    return Worth(value, best, illegal, unknown, positions)


def worst_value(moves: Moves, boards: Sequence[str]) -> float:
    """The value of a policy against a player who knows it and does best against it; the perfect policy's is 0.

    Args:
        moves: the policy; all positions are followed that it can come to, so it should have few moves.
        boards: with the policy to move, of which that player chooses the first.
    """
    levels: list[list[Node]] = []
    nodes = [Node((), board, 1.0) for board in boards]
    games: list[list[tuple[float, float | range]]] = []
    """Of each node: the probabilities of its moves, each with its result or with the nodes that may follow."""
    while nodes:
        levels.append(nodes)
        going: list[Node] = []
        for node, chances in zip(nodes, moves(nodes), strict=True):
            games.append([(1.0 - sum(chances.values()), -1.0)])
            for cell, p in chances.items():
                if cell == UNKNOWN or p <= 0:
                    continue
                games[-1].append((p, _forced(node, cell, going, sum(map(len, levels)))))
        nodes = going
    values = [0.0] * len(games)
    for i in reversed(range(len(games))):
        values[i] = sum(p * (min(values[j] for j in x) if isinstance(x, range) else x) for p, x in games[i])
    return min(values[: len(boards)])


def _forced(node: Node, cell: int, going: list[Node], first: int) -> float | range:
    """The result of a move if the other player may choose it; else the numbers of the nodes that it may choose from.

    These are appended to `going`, which begins with number `first`.
    """
    after = played(node.board, cell)
    if won(after):
        return 1.0
    if FREE not in after:
        return 0.0
    found = answers(after, dict.fromkeys(free(after), 1.0))
    results = [a.result for a in found if a.result is not None]
    if results:  # a win for that player, or the only free cell
        return min(results)
    begin = first + len(going)
    going += [Node((*node.turns, (node.board, cell)), a.board, 1.0) for a in found]
    return range(begin, first + len(going))


def _moved(node: Node, cell: int, reach: float, skill: float) -> tuple[float, list[Node]]:
    """What games that end now add to the value, and the positions that others go on from."""
    after = played(node.board, cell)
    if won(after):
        return reach, []
    if FREE not in after:
        return 0.0, []
    value, going, turns = 0.0, [], (*node.turns, (node.board, cell))
    for p, board, result in answers(after, player(turned(after), skill)):
        if result is not None:
            value += reach * p * result
        elif p:
            going.append(Node(turns, board, reach * p))
    return value, going


def _likely(nodes: list[Node], tolerance: float) -> tuple[list[Node], float]:
    """The positions without the least likely ones, and with what probability those are reached in all."""
    if not tolerance:
        return nodes, 0.0
    order = sorted(range(len(nodes)), key=lambda i: nodes[i].reach)
    dropped: set[int] = set()
    left_out = 0.0
    for i in order:
        if left_out + nodes[i].reach > tolerance:
            break
        left_out += nodes[i].reach
        dropped.add(i)
    return [node for i, node in enumerate(nodes) if i not in dropped], left_out
