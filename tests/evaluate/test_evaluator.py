"""Numbers of an evaluation from answers that can be counted by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest

from rlpost.evaluate.evaluator import Answers, Result, estimate_from, percent, summarise
from rlpost.evaluate.params import Evaluation
from rlpost.evaluate.statistics import Estimate, wilson
from rlpost.evaluate.table import measured, stage_table, telling_prompts
from rlpost.rewards.score import RewardBatch
from rlpost.types import Completion, Group


def answers(right, brief=None, mode="sampled", **examples) -> Answers:
    """Prompts with answers of 1, 2, 3, ... tokens; the last answer of each prompt is cut off."""
    groups = []
    for p, row in enumerate(right):
        ends = ["stop"] * (len(row) - 1) + ["length"]
        completions = [Completion((7,) * (g + 1), (True,) * (g + 1), f"{p}{g}", end) for g, end in enumerate(ends)]
        groups.append(Group((1,), tuple(completions), {key: column[p] for key, column in examples.items()}))
    by_name = {"right": right, **({"brief": brief} if brief else {})}
    total = [
        [None if any(v is None for v in values) else sum(values) for values in zip(*rows, strict=True)]
        for rows in zip(*by_name.values(), strict=True)
    ]
    return Answers(mode, tuple(groups), RewardBatch(total, by_name))


def test_one_answer_a_prompt_has_wilsons_interval():
    summary = summarise(answers([[1.0], [0.0], [1.0], [1.0]]), "right", Evaluation())
    assert summary.accuracy == {"all": wilson(3, 4)}
    assert (summary.prompts, summary.samples, summary.length) == (4, 1, 1.0)
    assert summary.finish == {"length": 4}


def test_several_answers_a_prompt():
    summary = summarise(answers([[1.0, 0.0], [1.0, 1.0], [0.0, 0.0]]), "right", Evaluation(pass_at=[1, 2]))
    assert summary.accuracy["all"].value == pytest.approx(0.5)
    assert summary.pass_at["1"].value == pytest.approx(0.5)
    assert summary.pass_at["2"].value == pytest.approx(2 / 3)
    assert summary.length == pytest.approx(1.5)
    assert summary.finish == {"stop": 3, "length": 3}
    assert summary.best_of is None


def test_an_answer_that_could_not_be_scored_counts_as_wrong_and_is_told():
    summary = summarise(answers([[1.0], [None], [1.0], [None]]), "right", Evaluation())
    assert summary.accuracy["all"].value == pytest.approx(0.5)
    assert summary.rewards == {"right": 1.0}
    assert summary.unscored == 2


def test_slices_are_the_prompts_whose_column_is_true():
    scored = answers([[1.0], [0.0], [1.0], [0.0]], carry=[True, True, False, False], never=[False] * 4)
    summary = summarise(scored, "right", Evaluation(slices=["carry", "never"]))
    assert summary.accuracy == {"all": wilson(2, 4), "carry": wilson(1, 2)}


def test_graded_rewards_have_a_mean_and_no_pass_at_k():
    summary = summarise(answers([[0.5, 2.0], [0.0, 1.5]]), "right", Evaluation(pass_at=[1]))
    assert summary.accuracy["all"].value == pytest.approx(1.0)
    assert summary.pass_at == {}


def test_the_best_of_a_prompts_answers_is_chosen_by_all_rewards():
    # Totals 1.0 1.2 / 0.0 0.5 / None 0.0: the second is best each time, and right once.
    scored = answers([[1.0, 1.0], [0.0, 0.0], [1.0, 0.0]], [[0.0, 0.2], [0.0, 0.5], [None, 0.0]])
    summary = summarise(scored, "right", Evaluation(best_of=True))
    assert summary.best_of == wilson(1, 3)
    assert summary.rewards == pytest.approx({"right": 0.5, "brief": 0.14})


def test_no_answer_scored_has_no_best():
    summary = summarise(answers([[1.0, 1.0]], [[None, None]]), "right", Evaluation(best_of=True))
    assert summary.best_of == wilson(0, 1)


def test_the_best_of_a_prompts_answers_is_chosen_by_a_judge():
    scored = replace(answers([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0]]), judged=[[0.1, -0.2], [3.0, 2.0], [-9.0, -9.5]])
    summary = summarise(scored, "right", Evaluation())
    assert summary.judged == wilson(2, 3)
    assert summary.best_of is None
    assert [row["judged"] for row in scored.rows(["a", "b", "c"])] == [0.1, -0.2, 3.0, 2.0, -9.0, -9.5]


def test_rows_tell_every_answer():
    first, second = answers([[1.0, 0.0]], carry=[True]).rows(["1+1="])
    assert first == {
        "mode": "sampled",
        "prompt": "1+1=",
        "completion": "00",
        "finish": "stop",
        "tokens": 1,
        "reward": 1.0,
        "rewards": {"right": 1.0},
        "example": {"carry": True},
    }
    assert (second["finish"], second["tokens"], second["reward"]) == ("length", 2, 0.0)


def test_the_table_has_a_row_a_stage():
    def result(right) -> dict:
        summary = summarise(answers(right, carry=[True, False]), "right", Evaluation(slices=["carry"]))
        return Result({"greedy": summary}, ()).to_json()

    columns, rows = stage_table({"base": result([[0.0], [0.0]]), "sft": result([[1.0], [0.0]])})
    assert columns == ["stage", "greedy", "greedy, carry"]
    assert [row[0] for row in rows] == ["base", "sft"]
    assert rows[1][1:] == [percent(wilson(1, 2)), percent(wilson(1, 1))]


def test_the_table_does_not_call_a_mean_of_other_scores_an_accuracy():
    def said(right) -> str:
        return measured([Result({"greedy": summarise(answers(right), "right", Evaluation())}, ()).to_json()])

    assert said([[1.0], [0.0], [0.5]]) == "held-out accuracy in %"
    for scores in ([[0.0], [0.0], [3.0]], [[5.0], [2.0], [2.0]], [[0.5], [-1.0], [0.6]]):
        assert said(scores) == "held-out mean score × 100 (scores outside 0 to 1: no accuracy)"


def test_the_table_says_how_good_the_best_of_several_are():
    def result(judged) -> dict:
        scored = replace(answers([[1.0, 0.0], [0.0, 0.0]]), judged=judged)
        return Result({"sampled": summarise(scored, "right", Evaluation(best_of=True))}, ()).to_json()

    columns, rows = stage_table({"base": result(None), "reward": result([[0.0, 1.0], [0.0, 1.0]])})
    assert columns == ["stage", "sampled", "best of 2 by rewards", "best of 2 by judge"]
    assert rows[0][2:] == [percent(wilson(1, 2)), ""]
    assert rows[1][2:] == [percent(wilson(1, 2)), percent(wilson(0, 2))]


def test_an_estimate_in_percent():
    assert percent(Estimate(0.934, 0.9221, 0.9441)) == "93.4 [92.2, 94.4]"
    assert estimate_from({"value": 0.5, "low": 0.25, "high": 0.75}) == Estimate(0.5, 0.25, 0.75)


def test_prompts_that_rose_most_are_told_first():
    assert telling_prompts([0.0, 1.0, 0.0, 1.0], [0.0, 0.0, 1.0, 1.0], 3) == [2, 0, 3]
