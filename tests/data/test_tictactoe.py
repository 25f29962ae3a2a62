"""Tic-tac-toe: its text, the exact solution, and what moves and whole policies fall short of it."""

from __future__ import annotations

import random
from functools import cache
from types import SimpleNamespace

import pytest

from rlpost.data.tasks import _tictactoe as solved
from rlpost.data.tasks import tictactoe as task
from rlpost.errors import RecipeError

BEGINS = {solved.EMPTY: 1.0}
ANSWERS = {task._board(first): 1 / 9 for first in "123456789"}


def reachable() -> set[str]:
    """All boards that a game can come to, as the player to move sees them; ended ones too."""
    found, going = {solved.EMPTY}, [solved.EMPTY]
    while going:
        board = going.pop()
        if solved.won(solved.turned(board)):
            continue
        for cell in solved.free(board):
            after = solved.turned(solved.played(board, cell))
            if after not in found:
                found.add(after)
                going.append(after)
    return found


def test_positions_and_their_values():
    boards = reachable()
    assert len(boards) == 5478
    ended = [b for b in boards if solved.won(solved.turned(b)) or solved.FREE not in b]
    assert len(ended) == 958
    assert set(solved.minimax(solved.EMPTY).values()) == {0}
    # After a corner only the middle holds; after the middle only corners do.
    assert [c for c, v in solved.minimax("o........").items() if v == 0] == [4]
    assert [c for c, v in solved.minimax("....o....").items() if v == 0] == [0, 2, 6, 8]
    assert solved.minimax("xx.oo....") == {2: 1, 5: 0, 6: -1, 7: -1, 8: -1}


def test_a_perfect_player_gives_nothing_away_and_a_random_one_does():
    playing = [b for b in reachable() if solved.FREE in b and not solved.won(solved.turned(b))]
    for board in playing:
        one_level = {cell: solved._expected(solved.played(board, cell), 1.0) for cell in solved.free(board)}
        assert one_level == pytest.approx(solved.minimax(board))
        falling = [solved.best_value(board, skill) for skill in (0.0, 0.5, 1.0)]
        assert falling == pytest.approx(sorted(falling, reverse=True))
        for skill in (0.0, 0.3, 1.0):
            assert sum(solved.player(board, skill).values()) == pytest.approx(1)
    assert solved.best_value(solved.EMPTY, 0.0) == pytest.approx(191 / 192)  # a draw in 192 games


def uniform(nodes):
    return [dict.fromkeys(solved.free(n.board), 1 / n.board.count(solved.FREE)) for n in nodes]


@pytest.mark.parametrize(("starts", "mover"), [(BEGINS, "X"), (ANSWERS, "O")])
def test_the_regret_of_the_random_policy_against_a_walk_over_absolute_boards(starts, mover):
    """Another search: boards are tuples of X and O, values are X's, and states are not told apart by their past."""

    def line(board, who):
        rows = [board[i : i + 3] for i in (0, 3, 6)] + [board[i::3] for i in range(3)] + [board[::4], board[2:7:2]]
        return (who,) * 3 in rows

    @cache
    def value(board, who, perfect):
        """X's mean result; `perfect` is who takes the best of moves, at random among equals."""
        other = "O" if who == "X" else "X"
        if line(board, other):
            return 1.0 if other == "X" else -1.0
        moves = [(*board[:i], who, *board[i + 1 :]) for i in range(9) if not board[i]]
        if not moves:
            return 0.0
        if who == perfect:
            sign = 1 if who == "X" else -1
            worth = [sign * best(after, other) for after in moves]
            moves = [after for after, x in zip(moves, worth, strict=True) if x == max(worth)]
        return sum(value(after, other, perfect) for after in moves) / len(moves)

    @cache
    def best(board, who):
        other = "O" if who == "X" else "X"
        if line(board, other):
            return 1 if other == "X" else -1
        found = [best((*board[:i], who, *board[i + 1 :]), other) for i in range(9) if not board[i]]
        return (max if who == "X" else min)(found, default=0)

    sign, other = (1, "O") if mover == "X" else (-1, "X")
    against = solved.worth(uniform, 1.0, starts)
    expected = value(("",) * 9, "X", other) * sign
    if mover == "O":  # the perfect player's first move is any of the nine: all are worth 0
        assert len({best(("",) * i + ("X",) + ("",) * (8 - i), "O") for i in range(9)}) == 1
    assert against.value == pytest.approx(expected, abs=1e-12)
    assert against.regret == pytest.approx(-expected, abs=1e-12)
    assert against.illegal == pytest.approx(0, abs=1e-12)
    assert against.unknown == 0


def perfect(skill):
    def moves(nodes):
        values = [solved.action_values(n.board, skill) for n in nodes]
        return [{max(v, key=v.get): 1.0} for v in values]

    return moves


def test_the_solver_has_no_regret_and_cannot_be_exploited():
    for starts in (BEGINS, ANSWERS):
        for skill in (0.0, 0.5, 1.0):
            assert solved.worth(perfect(skill), skill, starts).regret == pytest.approx(0, abs=1e-12)
        assert solved.worst_value(perfect(1.0), list(starts)) == 0
    # What is best against a random player can be exploited where it counts on mistakes.
    assert solved.worst_value(perfect(0.0), list(ANSWERS)) == -1


def first_free(nodes):
    """And one time in eight a move that is not legal."""
    cells = [solved.free(n.board) for n in nodes]
    return [{own[0]: 0.875} if len(own) == 1 else {own[0]: 0.75, own[-1]: 0.125} for own in cells]


def test_moves_that_are_not_legal_lose_and_what_is_unknown_is_said():
    whole = solved.worth(first_free, 0.0, BEGINS)
    assert 0.125 < whole.illegal < 1
    assert solved.worst_value(first_free, [solved.EMPTY]) < whole.value
    assert solved.worth(lambda nodes: [{} for _ in nodes], 1.0, ANSWERS).value == pytest.approx(-1)
    unsure = solved.worth(lambda nodes: [{**m, solved.UNKNOWN: 0.125} for m in first_free(nodes)], 0.0, BEGINS)
    assert unsure.illegal == 0
    assert unsure.unknown == pytest.approx(whole.illegal)
    assert abs(unsure.value - whole.value) <= unsure.unknown + 1e-12
    rough = solved.worth(first_free, 0.0, BEGINS, tolerance=0.05)
    assert 0 < rough.unknown <= 0.05
    assert rough.positions < whole.positions
    assert abs(rough.value - whole.value) <= rough.unknown


def seen(text: str) -> str:
    """The board that a text ends with."""
    board = "".join("." if sign.isdigit() else sign for sign in text[-10:-1])
    assert task.shown(board) == text[-10:]
    return board


def play(choose, opponent, seed, skill=0.5, opening=""):
    """A game: what each of the model's turns was given."""
    game, given = task.TicTacToe(opponent=opponent, skill=skill), []
    random.seed(seed)
    board = seen(game.reset({"opening": opening}))
    while True:
        messages, reward, terminated, truncated, info = game.step(choose(board))
        given.append((reward, info))
        assert not truncated
        if terminated:
            assert messages is None
            return given
        board = seen(messages)


@pytest.mark.parametrize("opponent", ["random", "perfect", "mixed"])
def test_the_mean_regret_of_games_is_that_of_the_policy(opponent):
    """The values' differences along a game add up to what is lost in all, in the mean."""
    skill = {"random": 0.0, "perfect": 1.0, "mixed": 0.7}[opponent]
    choices = random.Random(4)
    games = [
        play(lambda board: str(choices.choice(solved.free(board)) + 1), opponent, seed, 0.7, "52")
        for seed in range(2000)
    ]
    expected = solved.worth(uniform, skill, {task._board("52"): 1.0})
    results = [sum(reward for reward, _ in game) for game in games]
    regrets = [sum(info["regret"] for _, info in game) for game in games]
    assert sum(results) / len(games) == pytest.approx(expected.value, abs=0.05)
    assert sum(regrets) / len(games) == pytest.approx(expected.regret, abs=0.05)


def test_a_game_by_hand():
    game = task.TicTacToe(opponent="perfect")
    assert game.reset({"opening": "1"}) == "o23456789>"
    random.seed(0)
    messages, reward, terminated, _, info = game.step("9")
    assert (reward, terminated, info) == (0.0, False, {"legal": True, "regret": 1})
    assert messages.count("o") == 2
    assert messages[0] + messages[8] == "ox"
    assert seen(messages)


@pytest.mark.parametrize("action", ["", "0", "10", "x", "1", "4 5", "²", "five"])
def test_a_move_that_is_not_legal_loses(action):
    game = task.TicTacToe()
    game.reset({"opening": "1"})
    assert game.step(action) == (None, -1.0, True, False, {"legal": False, "regret": 1.0 + game_value("o........")})


def game_value(board):
    return solved.best_value(board, 0.0)


def test_two_players_see_one_game_each_from_its_side():
    game = task.TicTacToe(opponent="self")
    assert game.reset({"opening": "5"}) == "1234o6789>"
    assert game.other() is None
    assert game.step("1")[:4] == (None, 0.0, False, False)
    assert game.other() == "123456789>5;o234x6789>"
    assert game.step_other("3")[:4] == ("x2o4o6789>", 0.0, False, False)
    assert game.other() is None
    game.step("9")
    assert game.other() == "123456789>5;o234x6789>3;o2x4x678o>"
    assert game.step_other("7") == (None, -1.0, True, False, {"other_legal": True})
    game.reset({"opening": ""})
    game.step("1")
    assert game.step_other("1") == (None, 1.0, True, False, {"other_legal": False})
    assert task.TicTacToe(opponent="perfect").other() is None


def test_openings():
    rows = task.train()
    assert [r["opening"] for r in rows] == [""] * 9 + list("123456789")
    assert rows[-1]["prompt"] == "12345678o>"
    held = {r["opening"] for r in task.held_out()}
    assert len(held) == 18
    more = task.train(opening=3)
    assert not held & {r["opening"][:2] for r in more}
    by_length = [sum(len(r["opening"]) == n for r in more) for n in range(4)]
    assert by_length == [378] * 4
    with pytest.raises(RecipeError, match="give 0 to 4"):
        task.train(opening=5)
    with pytest.raises(RecipeError, match="give a probability"):
        task.TicTacToe(opponent="mixed", skill=2.0)


def test_random_moves_are_legal_and_come_from_games():
    lengths = set()
    for seed, row in enumerate(task.train(opening=2)):
        found = task.random_move(row, random.Random(seed))
        board, move = seen(found["prompt"]), found["completion"]
        assert found["prompt"].startswith(row["prompt"])
        assert board[int(move[0]) - 1] == solved.FREE
        assert move[1:] == task.ENDS
        lengths.add(len(found["prompt"]))
    assert lengths == {10, 22, 34, 46, 58}


def test_rewards_read_the_whole_game():
    turns = [
        {"role": "assistant", "content": "5", "info": {"legal": True, "regret": 0.5}},
        {"role": "environment", "content": "xo3456789>"},
        {"role": "assistant", "content": "5", "info": {"legal": False, "regret": 1.0}},
    ]
    lost = SimpleNamespace(step_rewards=[0.0, -1.0], messages=turns, finish="stop")
    assert (task.result(lost), task.regret(lost), task.illegal(lost)) == (-1.0, 1.5, 1.0)
    unfinished = SimpleNamespace(step_rewards=[0.0], messages=turns[:1], finish="length")
    assert (task.result(unfinished), task.illegal(unfinished)) == (-1.0, 0.0)
