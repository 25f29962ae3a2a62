"""The best evaluation so far, and when to stop early; without a model."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest
import torch
from torch import nn

from rlpost.train.evaluation import StageEvaluation
from rlpost.train.params import KeepBest, Mode


def evaluation(**keys) -> StageEvaluation:
    return StageEvaluation(10, [dict], KeepBest(**{"metric": "loss", **keys}))


def after(values, made: StageEvaluation) -> StageEvaluation:
    for number, value in enumerate(values, 1):
        made.note(10 * number, {} if value is None else {made.keep_best.metric: value})
    return made


@pytest.mark.parametrize(
    ("keys", "values", "best", "waited"),
    [
        ({}, [3.0, 2.0, 2.5], (2.0, 20), 1),
        ({}, [3.0, 3.0], (3.0, 10), 1),  # a tie is none
        ({"metric": "greedy/accuracy"}, [0.3, 0.5, 0.4, 0.5], (0.5, 20), 2),
        ({"metric": "greedy/truncated"}, [0.3, 0.5], (0.3, 10), 1),
        ({"mode": Mode.max}, [3.0, 4.0], (4.0, 20), 0),
        ({"min_delta": 0.5}, [3.0, 2.6, 2.4], (2.4, 30), 0),
        ({}, [math.nan, 3.0, math.inf, None], (3.0, 20), 2),
        ({}, [None, None], (None, None), 2),
    ],
)
def test_the_best_value_and_how_long_nothing_was_better(keys, values, best, waited):
    made = after(values, evaluation(**keys))
    assert ((made.best, made.best_step), made.waited) == (best, waited)


def test_it_stops_when_patience_is_over_and_a_better_value_begins_it_anew():
    made = evaluation(patience=2)
    stops = []
    for number, value in enumerate([3.0, 3.1, 2.9, 3.0, 3.0], 1):
        made.note(number, {"loss": value})
        stops.append(made.stops)
    assert stops == [False, False, False, False, True]
    assert not after([1.0] * 9, evaluation()).stops


def test_a_resumed_stage_knows_the_best_of_the_same_metric():
    made = after([3.0, 2.0, 2.5], evaluation(patience=2))
    resumed = evaluation(patience=2)
    resumed.load(made.state())
    assert (resumed.best, resumed.best_step, resumed.waited) == (2.0, 20, 1)
    resumed.note(40, {"loss": 2.5})
    assert resumed.stops
    for other in (evaluation(metric="nll"), evaluation(mode=Mode.max), StageEvaluation(10, [dict], None)):
        other.load(made.state())
        assert other.best_step is None
    assert StageEvaluation(10, [dict], None).state() == {}


def test_it_is_due_every_so_many_steps_and_after_the_last():
    made = evaluation()
    assert [done for done in range(1, 26) if made.due(done, 25)] == [10, 20, 25]
    assert not StageEvaluation(0, [dict], None).due(25, 25)
    assert not StageEvaluation(10, [], None).due(10, 25)


def test_measuring_leaves_random_numbers_and_dropout_as_they_were():
    model = nn.Dropout(0.5)
    seen = []

    def measure():
        seen.append(model.training)
        return {"loss": random.random() + float(np.random.random()) + float(torch.rand(()))}

    made = StageEvaluation(1, [measure, lambda: {"more": 1.0}], None)

    def drawn():
        return random.random(), np.random.random(), torch.rand(3).tolist()

    for generator in (random.seed, np.random.seed, torch.manual_seed):
        generator(5)
    expected = drawn()
    for generator in (random.seed, np.random.seed, torch.manual_seed):
        generator(5)
    assert made.measure([model]).keys() == {"loss", "more"}
    assert drawn() == expected
    assert (seen, model.training) == ([False], True)


def test_what_is_said_names_the_best_and_the_compared_metric_first():
    made = after([3.0, 2.0], evaluation(patience=1))
    line = made.line(20, {"nll": 1.0, "greedy/accuracy/carry": 0.5, "loss": 2.0})
    assert line == "evaluation: loss 2.000, nll 1.000 (the best so far)"
    made.note(30, {"loss": 2.5})
    assert made.line(30, {"loss": 2.5}).endswith("(the best was at step 20)")
    assert made.shown({"loss": 2.5}) == {"eval/loss": 2.5}
    assert list(made.outcome(30, 50)) == [
        "stopped early after step 30: 1 evaluation without a better loss",
        "the result is of step 20, the best by loss (2.000)",
    ]
    assert made.about_result(30) == {"step": 20, "best": {"metric": "loss", "value": 2.0, "steps_done": 30}}
