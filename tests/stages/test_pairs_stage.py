"""Preference pairs from a model's own samples."""

from __future__ import annotations

import json
import os
import signal

import pytest
from tiny_recipes import DPO, PAIRS, SFT, base, metrics, run, weights

from rlpost.errors import DataError, Interrupted
from rlpost.rewards.score import Scorer
from rlpost.stages import pairs as stage
from rlpost.stages.pairs import rows_of_group
from rlpost.stages.params import PairChoice
from rlpost.types import Completion, Group

OWN = {**DPO, "data": {"own": {"stage": "pairs"}}}


def group(*answers: tuple[str, str], **example) -> Group:
    completions = tuple(Completion((1,), (True,), text, finish) for text, finish in answers)
    return Group((1,), completions, example or {"prompt": "p", "answer": "7"})


def chosen(rows) -> list[tuple[str, str]]:
    return [(row["chosen"], row["rejected"]) for row in rows]


FIVE = group(("a", "stop"), ("b", "stop"), ("c", "stop"), ("d", "stop"), ("b", "stop"))


def test_one_pair_of_the_best_and_the_worst():
    rows = list(rows_of_group(FIVE, [1.0, 3.0, 0.0, 2.0, 3.0], PairChoice.one, 0.0))
    assert rows == [
        {
            "prompt": "p",
            "answer": "7",
            "chosen": "b",
            "rejected": "c",
            "chosen_reward": 3.0,
            "rejected_reward": 0.0,
        }
    ]


def test_all_pairs_of_distinct_texts_whose_rewards_differ():
    rows = rows_of_group(FIVE, [1.0, 3.0, 0.0, 1.0, 3.0], PairChoice.all, 0.0)
    assert chosen(rows) == [("b", "a"), ("b", "d"), ("b", "c"), ("a", "c"), ("d", "c")]


def test_a_gap_must_be_more_than_the_smallest():
    rewards = [1.0, 3.0, 0.0, 2.5, 3.0]
    assert chosen(rows_of_group(FIVE, rewards, PairChoice.all, 2.0)) == [("b", "c"), ("d", "c")]
    assert chosen(rows_of_group(FIVE, rewards, PairChoice.one, 3.0)) == []


def test_answers_that_are_unfinished_or_unscored_make_no_pair():
    answers = group(("a", "length"), ("b", "stop"), ("c", "stop"), ("d", "stop"))
    assert chosen(rows_of_group(answers, [9.0, 1.0, None, 0.0], PairChoice.all, 0.0)) == [("b", "d")]
    assert chosen(rows_of_group(answers, [9.0, 1.0, None, None], PairChoice.one, 0.0)) == []
    assert chosen(rows_of_group(answers, [None] * 4, PairChoice.one, 0.0)) == []


def test_the_prompt_of_a_conversation_is_all_but_its_answer():
    asked = [{"role": "user", "content": "q"}]
    answered = [*asked, {"role": "assistant", "content": "old"}]
    for messages in (asked, answered):
        answers = group(("a", "stop"), ("b", "stop"), messages=messages)
        (row,) = rows_of_group(answers, [1.0, 0.0], PairChoice.one, 0.0)
        assert row["prompt"] == asked


def test_a_blank_answer_makes_a_pair_after_a_text_but_not_in_a_conversation():
    answers = (("a", "stop"), ("", "stop"), (" ", "stop"))
    assert chosen(rows_of_group(group(*answers), [1.0, 0.0, 0.5], PairChoice.one, 0.0)) == [("a", "")]
    asked = [{"role": "user", "content": "q"}]
    for example in ({"messages": asked}, {"prompt": asked}):
        assert chosen(rows_of_group(group(*answers, **example), [1.0, 0.0, 0.5], PairChoice.one, 0.0)) == []


def test_a_ranking_has_every_distinct_text_with_its_first_reward():
    (row,) = rows_of_group(FIVE, [1.0, 3.0, 0.0, 1.0, 2.0], PairChoice.ranked, 0.0)
    expected = {"completions": ["a", "b", "c", "d"], "scores": [1.0, 3.0, 0.0, 1.0]}
    assert row == {"prompt": "p", "answer": "7", **expected}


def test_a_text_by_itself_is_desirable_above_the_prompts_mean():
    rows = list(rows_of_group(FIVE, [1.0, 3.0, 0.0, 1.5, 9.0], PairChoice.labelled, 0.0))
    # The mean of distinct texts is 1.375; with the second "b" it would be 2.9.
    assert [(row["completion"], row["label"]) for row in rows] == [("a", False), ("b", True), ("c", False), ("d", True)]
    assert all(row["prompt"] == "p" and row["answer"] == "7" for row in rows)


def test_a_text_that_is_exactly_the_mean_is_not_desirable():
    answers = group(("a", "stop"), ("b", "stop"), ("c", "stop"))
    rows = rows_of_group(answers, [0.0, 1.0, 2.0], PairChoice.labelled, 0.0)
    assert [row["label"] for row in rows] == [False, False, True]


def test_a_blank_text_counts_for_the_mean_but_is_no_row_by_itself():
    answers = group(("a", "stop"), ("b", "stop"), ("", "stop"))
    rows = list(rows_of_group(answers, [1.0, 0.5, -6.0], PairChoice.labelled, 0.0))
    assert [(row["completion"], row["label"]) for row in rows] == [("a", True), ("b", True)]
    (row,) = rows_of_group(answers, [1.0, 0.5, -6.0], PairChoice.ranked, 0.0)
    assert (row["completions"], row["scores"]) == (["a", "b", ""], [1.0, 0.5, -6.0])


@pytest.mark.parametrize("choice", [c for c in PairChoice if c is not PairChoice.valued])
def test_rewards_that_do_not_differ_by_more_than_the_gap_give_nothing(choice):
    assert list(rows_of_group(FIVE, [1.0] * 5, choice, 0.0)) == []
    assert list(rows_of_group(FIVE, [1.0, 1.0, 3.0, 1.0, 1.0], choice, 2.0)) == []
    assert len(list(rows_of_group(FIVE, [1.0, 1.0, 3.5, 1.0, 1.0], choice, 2.0))) > 0
    unfinished = group(("a", "length"), ("b", "stop"))
    assert list(rows_of_group(unfinished, [1.0, 0.0], choice, 0.0)) == []


def rows_of(final) -> list[dict]:
    return [json.loads(line) for line in (final / "rows.jsonl").read_text("utf-8").splitlines()]


def test_a_stage_writes_pairs_that_the_next_stage_trains_on(tmp_path):
    final = run(tmp_path, {"sft": SFT, "pairs": PAIRS, "dpo": OWN})
    rows = rows_of(tmp_path / "runs/run/pairs/final")
    assert len(rows) >= 4
    for row in rows:
        assert row["chosen"].count("1") == row["chosen_reward"] > row["rejected_reward"] == row["rejected"].count("1")
        assert row["prompt"][2] == "+"
        assert "answer" in row
    assert len(metrics(tmp_path, "dpo")) == 4
    # The model passes unchanged: pairs hold rows, and the stage after them starts from the model before them.
    about = json.loads((final / "checkpoint.json").read_text("utf-8"))
    assert about["parent"] == str(tmp_path / "runs/run/sft/final")
    made = json.loads((tmp_path / "runs/run/pairs/final/checkpoint.json").read_text("utf-8"))
    assert (made["stage"], made["kind"], made["parent"]) == ("pairs", "pairs", about["parent"])


@pytest.mark.parametrize(
    ("choice", "stage"),
    [
        ("all", {**DPO, "steps": 2}),
        ("ranked", {**DPO, "steps": 2, "loss": {"fn": "dpo_plackett_luce"}}),
        ("ranked", {**DPO, "steps": 2, "kind": "reward_model", "loss": {"fn": "plackett_luce"}}),
        ("labelled", {**DPO, "steps": 2, "kind": "kto"}),
    ],
    ids=["all", "ranked", "ranked-reward", "labelled"],
)
def test_rows_of_every_kind_are_read_by_the_stage_that_learns_from_them(tmp_path, choice, stage):
    pairs = {**PAIRS, "choice": choice, "group_size": 6, "prompts": 16}
    run(tmp_path, {"sft": SFT, "pairs": pairs, "next": {**stage, "data": {"own": {"stage": "pairs"}}}})
    rows = rows_of(tmp_path / "runs/run/pairs/final")
    by_prompt = {row["prompt"]: [other for other in rows if other["prompt"] == row["prompt"]] for row in rows}
    for own in by_prompt.values():
        if choice == "all":
            assert all(row["chosen"].count("1") > row["rejected"].count("1") for row in own)
            assert len({(row["chosen"], row["rejected"]) for row in own}) == len(own)
        elif choice == "ranked":
            (row,) = own
            assert row["scores"] == [text.count("1") for text in row["completions"]]
            assert len(set(row["scores"])) > 1
        else:
            worst_good = min(row["completion"].count("1") for row in own if row["label"])
            assert worst_good > max((row["completion"].count("1") for row in own if not row["label"]), default=-1)
    assert len(by_prompt) > 2
    assert len(metrics(tmp_path, "next")) == 2


def test_a_pipeline_that_ends_with_pairs_ends_with_the_model_before_them(tmp_path):
    assert run(tmp_path, {"sft": SFT, "pairs": PAIRS}) == tmp_path / "runs/run/sft/final"
    longer = {**PAIRS, "sampling": {"max_new_tokens": 12}, "prompts": 64}
    assert run(tmp_path, {"pairs": longer}, "run=base_only") == base(tmp_path, "base_only")
    assert weights(base(tmp_path, "base_only"))


def test_the_same_seed_gives_the_same_pairs(tmp_path):
    rows = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        run(tmp_path, {"sft": SFT, "pairs": PAIRS}, f"run={name}", f"seed={seed}")
        rows.append(rows_of(tmp_path / f"runs/{name}/pairs/final"))
    assert rows[0] == rows[1] != rows[2]


def test_no_pair_at_all_is_an_error_that_says_what_to_do(tmp_path):
    stage = {**PAIRS, "rewards": [{"fn": "rewards.py:always"}]}
    with pytest.raises(DataError, match=r"stages\.pairs: no prompt gave two.*raise group_size"):
        run(tmp_path, {"pairs": stage})
    assert not (tmp_path / "runs/run/pairs/DONE").exists()


def test_a_signal_ends_the_sampling_between_two_lots_of_prompts(tmp_path, monkeypatch):
    monkeypatch.setattr(stage, "AT_ONCE", 8)
    score, lots = Scorer.score, []

    def signalled(self, groups):
        if not lots:
            os.kill(os.getpid(), signal.SIGTERM)
        lots.append(len(groups))
        return score(self, groups)

    monkeypatch.setattr(Scorer, "score", signalled)
    with pytest.raises(Interrupted, match=r"pairs stopped while it sampled") as raised:
        run(tmp_path, {"sft": SFT, "pairs": PAIRS})
    assert (raised.value.exit_code, lots) == (143, [8])
    assert not (tmp_path / "runs/run/pairs/DONE").exists()
