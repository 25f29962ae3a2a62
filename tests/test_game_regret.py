"""The exact regret of a model at tic-tac-toe: its moves' probabilities are those it is sampled with."""

from __future__ import annotations

from collections import Counter

import game_regret
import pytest
from engines import asked, local
from tiny_recipes import MODEL, policy, run

from rlpost.data.codec import make_codec
from rlpost.data.tasks import _tictactoe as solved
from rlpost.data.tasks import tictactoe as task
from rlpost.engine.params import Sampling

GAMES = {"task": {"fn": "tictactoe.train"}, "augment": {"fn": "tictactoe.random_move"}}
SFT = {
    "kind": "sft",
    "data": {"games": GAMES},
    "steps": 12,
    "batch_size": 32,
    "learning_rate": 3e-2,
    "max_length": 64,
}
ALPHABET = {"kind": "characters", "alphabet": "123456789xo>;"}
LATER = solved.Node(((solved.EMPTY, 4), ("o...x....", 2)), "o.x.x.o..", 1.0)


@pytest.fixture(scope="module")
def learned(tmp_path_factory):
    """A model that has heard of the rules."""
    model = {**MODEL, "config": {**MODEL["config"], "max_position_embeddings": 64}, "tokenizer": ALPHABET}
    return policy(run(tmp_path_factory.mktemp("game"), {"sft": SFT}, model=model))


def texts(model, node, n, **how):
    """What the engine writes at a position."""
    prompt = make_codec(model.tokenizer).ids(game_regret.context(node), "a game")
    sampling = Sampling(max_new_tokens=6, stop=[task.ENDS])
    (turns,) = local(model).generate(asked([prompt], n, sampling, [3], **how))
    return turns


@pytest.mark.parametrize("node", [solved.Node((), solved.EMPTY, 1.0), LATER])
def test_chances_are_the_frequencies_of_samples(learned, node):
    (chances,) = game_regret.sampled(learned, 1.0)([node])
    assert set(chances) == {*solved.free(node.board), solved.UNKNOWN}
    found: Counter[int | None] = Counter()
    for turn in texts(learned, node, 2000):
        by_stop = turn.ids[-1] != learned.end_ids[0]
        cell = task.cell_of(turn.text, node.board) if turn.finish == "stop" else None
        found[cell if cell is None or by_stop else solved.UNKNOWN] += 1
    for cell, p in chances.items():
        assert found[cell] / 2000 == pytest.approx(p, abs=0.04)
    assert found[None] / 2000 == pytest.approx(1 - sum(chances.values()), abs=0.04)
    assert max(chances.values()) > 0.05


def test_the_greedy_model_writes_its_likeliest_turn(learned):
    nodes = [solved.Node((), solved.EMPTY, 1.0), LATER]
    for node, chances in zip(nodes, game_regret.greedy(learned)(nodes), strict=True):
        (turn,) = texts(learned, node, 1, greedy=True)
        cell = task.cell_of(turn.text, node.board) if turn.finish == "stop" else None
        assert chances == ({} if cell is None else {cell: 1.0})


def test_the_context_is_what_the_game_shows():
    game = task.TicTacToe(opponent="self")
    text = game.reset({"opening": ""})
    for own, other in (("5", "1"), ("3", "7")):
        game.step(own)
        text += own + task.ENDS + game.step_other(other)[0]
    assert game_regret.context(LATER) == text


def test_a_report(learned):
    found = game_regret.report(game_regret.greedy(learned), 0.0)
    assert set(found) == {"perfect", "random"}
    for name, best in (("perfect", 0.0), ("random", 0.994792)):
        assert found[name]["first"]["best"] == best
        assert found[name]["regret"] == pytest.approx(
            (found[name]["first"]["regret"] + found[name]["second"]["regret"]) / 2
        )
        assert 0 < found[name]["regret"] <= 2
