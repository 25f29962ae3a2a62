"""How far a judge agrees with known labels: a judge of a known error rate is measured as having it."""

from __future__ import annotations

import hashlib
import json
import math
import random
from pathlib import Path
from typing import Any

import pytest
from judge_agreement import main
from judge_server import JudgeServer, judging, shown
from tiny_recipes import GRPO, jsonl, write

from rlpost.errors import DataError
from rlpost.evaluate.judge_agreement import KnownPair, beyond_chance, judge_agreement
from rlpost.evaluate.statistics import wilson
from rlpost.rewards.judge import Judge, ready

PAIRS = [KnownPair({"prompt": f"q{n}"}, f"good answer {n}", f"bad answer {n}") for n in range(60)]


def chance(*texts: str) -> float:
    """Uniform in [0, 1), by the texts."""
    return int.from_bytes(hashlib.sha256("/".join(texts).encode()).digest()[:4], "big") / 2**32


def noisy(prompt: str, error: float, first: float = 0.0) -> str:
    """Right but for a share `error` of pairs, in both orders; in a share `first` of prompts, whatever comes first."""
    one, other = shown(prompt, "first answer"), shown(prompt, "second answer")
    if chance("position", one, other) < first:
        return '{"better": "first"}'
    right = chance("error", *sorted((one, other))) >= error
    return json.dumps({"better": "first" if one.startswith("good") == right else "second"})


def comparing(server: JudgeServer, **args: Any) -> Judge:
    given = {"criteria": {"better": {"text": "?"}}, "mode": "pairwise", "url": server.url, "model_name": "m", **args}
    return ready(given, "args", Path())


def test_a_judge_of_a_known_error_rate():
    error = sum(chance("error", *sorted((p.chosen, p.rejected))) < 0.2 for p in PAIRS)
    assert 5 < error < 22
    with judging(lambda prompt: noisy(prompt, 0.2)) as server:
        found = judge_agreement(comparing(server), PAIRS)
    assert (found.pairs, found.failed, found.ties) == (60, 0, 0)
    assert found.agreement == wilson(60 - error, 60)
    assert found.agreement.low < 0.8 < found.agreement.high
    assert found.kappa.value == pytest.approx(1 - 2 * error / 60, abs=0.05)
    assert found.kappa.low < 0.6 < found.kappa.high
    assert found.consistent == wilson(60, 60)
    assert found.first is not None
    assert found.first.value == 0.5


def test_a_judge_that_prefers_what_comes_first():
    with judging(lambda prompt: noisy(prompt, 0.0, first=0.5)) as server:
        found = judge_agreement(comparing(server), PAIRS)
        assert found.consistent is not None
        assert found.first is not None
        # A tie where the order with the right text second is one of those in which the first text wins.
        assert found.consistent.low < 0.5 < found.consistent.high
        assert found.first.low < 0.75 < found.first.high
        assert found.ties == round(60 * (1 - found.consistent.value)) == 60 - round(60 * found.agreement.value)
        server.answer = lambda _: '{"better": "first"}'
        always = judge_agreement(comparing(server), PAIRS[:20])
    assert (always.ties, always.agreement.value, always.kappa.value) == (20, 0.0, 0.0)
    assert always.consistent == wilson(0, 20)
    assert always.first == wilson(20, 20)


def test_a_judge_that_scores_has_no_order_and_may_fail():
    def answer(prompt: str) -> str:
        text = shown(prompt, "answer")
        return "?" if text == "bad answer 7" else f'{{"better": {4 if text.startswith("good") else 2}}}'

    with judging(answer) as server:
        judge = comparing(server, mode="score", retries=0, on_failure="unscored")
        found = judge_agreement(judge, PAIRS[:20])
        assert (found.pairs, found.failed, found.ties) == (19, 1, 0)
        assert (found.agreement, found.kappa.value) == (wilson(19, 19), 1.0)
        assert (found.consistent, found.first) == (None, None)
        with pytest.raises(DataError, match="no verdict on any of 1 pairs"):
            judge_agreement(judge, [PAIRS[7]])


def test_pairs_of_one_question_are_no_more_than_one_trial():
    pairs = [KnownPair({"prompt": f"q{n % 4}"}, pair.chosen, pair.rejected) for n, pair in enumerate(PAIRS[:40])]

    def answer(prompt: str) -> str:
        return noisy(prompt, 0.0 if shown(prompt, "question") in ("q0", "q1") else 1.0)

    with judging(answer) as server:
        found = judge_agreement(comparing(server), pairs).agreement
    assert found == wilson(2, 4)


def test_kappa_by_hand():
    # 20 cases: both say yes in 8, both no in 6, we alone yes in 4, they alone in 2.
    ours, theirs = ["y"] * 12 + ["n"] * 8, ["y"] * 8 + ["n"] * 4 + ["y"] * 2 + ["n"] * 6
    e = 0.6 * 0.5 + 0.4 * 0.5
    assert beyond_chance(wilson(14, 20), ours, theirs).value == pytest.approx((0.7 - e) / (1 - e))
    assert math.isnan(beyond_chance(wilson(2, 2), ["y", "y"], ["y", "y"]).value)
    with pytest.raises(ValueError, match="2 and 1 labels"):
        beyond_chance(wilson(1, 1), ["y", "y"], ["y"])


@pytest.mark.slow
@pytest.mark.parametrize(("n", "error"), [(50, 0.1), (50, 0.3), (200, 0.05), (200, 0.25)])
def test_the_interval_of_kappa_holds_the_truth_as_often_as_it_says(n, error):
    """Takes a second. Known labels are balanced, so the true kappa is 1 − 2·error."""
    drawn, hits = random.Random(0), 0
    for _ in range(2000):
        known = [drawn.random() < 0.5 for _ in range(n)]
        judged = [k != (drawn.random() < error) for k in known]
        found = beyond_chance(wilson(sum(map(bool.__eq__, known, judged)), n), judged, known)
        hits += found.low <= 1 - 2 * error <= found.high
    assert 0.93 < hits / 2000 < 0.98


def test_the_script_prints_them(tmp_path, capsys):
    rows = [{**p.row, "chosen": p.chosen, "rejected": [{"role": "a", "content": p.rejected}]} for p in PAIRS[:50]]
    file = jsonl(tmp_path / "known.jsonl", rows)
    with judging(lambda prompt: noisy(prompt, 0.0)) as server:
        args = {"url": server.url, "model_name": "m", "criteria": {"better": {"text": "?"}}, "mode": "pairwise"}
        recipe = write(tmp_path, {"grpo": {**GRPO, "rewards": [{"fn": "judge", "args": args}]}})
        assert main([str(recipe), str(file), f"stages.grpo.rewards.0.args.cache={tmp_path}"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "pairs        50, 0 of them ties; 0 without a verdict",
        "agreement    100.0 [92.9, 100.0] %",
        "kappa        1.000 [0.851, 1.000]",
        "consistent   100.0 [92.9, 100.0] % of pairs have one verdict in both orders",
        "first wins   50.0 [36.6, 63.4] %",
    ]
    assert main([str(recipe), str(jsonl(tmp_path / "odd.jsonl", [{"prompt": "q", "chosen": 3}]))]) == 3
    assert "odd.jsonl:1: chosen is 3, neither text nor messages" in capsys.readouterr().err
