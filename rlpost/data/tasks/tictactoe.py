"""Tic-tac-toe as a conversation, in which every move can be compared with the exactly best one.

The model is shown the board as nine cells, row by row, and `>`: `x` its own stones, `o` the other player's, and free
ones by their numbers. It answers with the number of a cell and ends its turn with `;`; then it is shown the board after
the other player's move. Two turns: "1234o6789>1;xo34o6789>8;". A move that is not legal loses.
"""

from __future__ import annotations

import random as randomness
from collections.abc import Iterator, Mapping
from itertools import permutations
from typing import Any, Literal

from rlpost.data.tasks._tictactoe import EMPTY, FREE, action_values, free, played, player, turned, won
from rlpost.errors import RecipeError
from rlpost.types import Completion

ASKS, ENDS = ">", ";"
"""What follows a board, and what ends the model's turn."""
HELD_OUT = 4
"""One in so many pairs of first moves is held out."""
SKILLS = {"random": 0.0, "perfect": 1.0, "self": 1.0}
"""How likely a player's move is a perfect one; in self-play, the one that moves are compared against."""


def train(*, opening: int = 1) -> list[dict[str, Any]]:
    """Games that begin with up to `opening` moves already made, in all legal ways, and the model to move.

    There are as many rows with each number of moves. With none the model begins, with one the other player does: its
    first move is any of the nine, as a random player's is, and a perfect one's. Of two moves and more those are left
    out whose first two `held_out` has; other games may come by the same positions. `seat` says whether the model is the
    first player of the game or the second.

    Raises:
        RecipeError: `opening` is not 0 to 4.
    """
    if not 0 <= opening <= 4:
        raise RecipeError(f"opening={opening}: give 0 to 4 moves")
    own = [[moves for moves in _openings(n) if not _is_held_out(moves)] for n in range(opening + 1)]
    most = max(map(len, own))
    return [_row(moves) for some in own for moves in some for _ in range(most // len(some))]


def held_out() -> list[dict[str, Any]]:
    """Games that begin with two moves which no row of `train` begins with."""
    return [_row(moves) for moves in _openings(2) if _is_held_out(moves)]


def random_move(row: Mapping[str, Any], random: randomness.Random) -> dict[str, Any]:
    """The row with a random turn of a random game: all before it as the prompt, any legal move as the completion."""
    board, text, turns = _board(row["opening"]), "", []
    while True:
        cell = random.choice(free(board))
        turns.append((text + shown(board), f"{cell + 1}{ENDS}"))
        text = "".join(turns[-1])
        after = turned(played(board, cell))
        if won(turned(after)) or FREE not in after:
            break
        answered = played(after, random.choice(free(after)))
        if won(answered) or FREE not in answered:
            break
        board = turned(answered)
    prompt, completion = random.choice(turns)
    return {**row, "prompt": prompt, "completion": completion}


class TicTacToe:
    """A game against a player of rlpost's, or of the model against another (`self`)."""

    def __init__(
        self, *, opponent: Literal["random", "perfect", "mixed", "self"] = "random", skill: float = 0.5
    ) -> None:
        """Prepare for one game.

        Args:
            opponent: `random` plays any legal move, `perfect` any of the best by minimax, `mixed` a perfect one with
                probability `skill` and else a random one. `self`: the moves are sampled from a model.
            skill: of `mixed`.

        Raises:
            RecipeError: `skill` is not a probability.
        """
        if not 0 <= skill <= 1:
            raise RecipeError(f"skill={skill}: give a probability, 0 to 1")
        self._from_model = opponent == "self"
        self._skill = SKILLS.get(opponent, skill)
        self._board = EMPTY
        """As the player to move sees it."""
        self._model_moves = True
        self._others = ""
        """What the other player has seen and played."""

    def reset(self, example: Mapping[str, Any]) -> str:
        """Begin after the row's `opening`; returns the board."""
        self._board, self._others, self._model_moves = _board(example["opening"]), "", True
        if example["opening"]:
            # The other player made the last of these moves, on the board before it.
            self._others = shown(_board(example["opening"][:-1])) + example["opening"][-1] + ENDS
        return shown(self._board)

    def step(self, action: str) -> tuple[str | None, float, bool, bool, dict[str, Any]]:
        """Play the model's move, and the other player's answer unless a model is asked for it.

        `info` has `legal`, and `regret`: the value of the best move less that of this one, against the other player
        (in self-play, a perfect one), for a model that makes no further mistake.
        """
        values = action_values(self._board, self._skill)
        cell = cell_of(action, self._board)
        info = {"legal": cell is not None, "regret": max(values.values()) - (-1.0 if cell is None else values[cell])}
        if cell is None:
            return None, -1.0, True, False, info
        self._board = turned(played(self._board, cell))
        if won(turned(self._board)):
            return None, 1.0, True, False, info
        if FREE not in self._board:
            return None, 0.0, True, False, info
        if self._from_model:
            self._model_moves = False
            return None, 0.0, False, False, info
        moves = player(self._board, self._skill)
        messages, reward, terminated = self._answer(randomness.choices(list(moves), list(moves.values()))[0])
        return messages, reward, terminated, False, info

    def other(self) -> str | None:
        """The game so far as the other player sees it, to be continued with its move; None if it is not to move."""
        return None if self._model_moves else self._others + shown(self._board)

    def step_other(self, action: str) -> tuple[str | None, float, bool, bool, dict[str, Any]]:
        """Play the other player's move; if it is not legal the model has won."""
        cell = cell_of(action, self._board)
        if cell is None:
            return None, 1.0, True, False, {"other_legal": False}
        self._others += f"{shown(self._board)}{cell + 1}{ENDS}"
        messages, reward, terminated = self._answer(cell)
        return messages, reward, terminated, False, {"other_legal": True}

    def _answer(self, cell: int) -> tuple[str | None, float, bool]:
        """Play the other player's legal move: the model's next board, its reward, and whether the game is over."""
        answered = played(self._board, cell)
        self._board, self._model_moves = turned(answered), True
        if won(answered):
            return None, -1.0, True
        if FREE not in answered:
            return None, 0.0, True
        return shown(self._board), 0.0, False


def result(completion: Completion) -> float:
    """1 for a game won, 0 drawn, -1 lost; -1 too for one that the model did not play to its end."""
    return float(sum(completion.step_rewards)) if completion.finish == "stop" else -1.0


def regret(completion: Completion) -> float:
    """The values of the best moves less those of the model's, summed over its turns (`TicTacToe.step`)."""
    return float(sum(message.get("info", {}).get("regret", 0.0) for message in completion.messages))


def illegal(completion: Completion) -> float:
    """1 where the model lost by a move that is not legal, else 0."""
    return float(any(message.get("info", {}).get("legal") is False for message in completion.messages))


def shown(board: str) -> str:
    """A board as it is put to a player."""
    return "".join(str(cell + 1) if sign == FREE else sign for cell, sign in enumerate(board)) + ASKS


def cell_of(action: str, board: str) -> int | None:
    """The free cell that a turn names; None for anything else."""
    text = action.strip()
    if len(text) != 1 or text not in "123456789" or board[int(text) - 1] != FREE:
        return None
    return int(text) - 1


def _row(opening: str) -> dict[str, Any]:
    return {"prompt": shown(_board(opening)), "opening": opening, "seat": ("first", "second")[len(opening) % 2]}


def _openings(length: int) -> Iterator[str]:
    """Up to four moves are a game that goes on, whatever they are."""
    return map("".join, permutations("123456789", length))


def _is_held_out(opening: str) -> bool:
    """By the first two moves, the pairs of which are counted through."""
    if len(opening) < 2:
        return False
    first, second = int(opening[0]), int(opening[1])
    return (8 * (first - 1) + second - 1 - (second > first)) % HELD_OUT == 0


def _board(opening: str) -> str:
    """The board after these moves, as the player to move sees it."""
    board = EMPTY
    for sign in opening:
        board = turned(played(board, int(sign) - 1))
    return board
