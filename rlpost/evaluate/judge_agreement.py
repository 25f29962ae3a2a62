"""How far a language model that judges agrees with known labels, and with itself when two texts swap places."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rlpost.errors import DataError
from rlpost.evaluate.statistics import Estimate, clustered_share
from rlpost.rewards.judge import Judge

TIE = "tie"


@dataclass(frozen=True)
class Agreement:
    """A judge's verdicts on pairs of which the better text is known."""

    pairs: int
    """Judged ones."""
    failed: int
    """Pairs without a verdict, left out of all else."""
    ties: int
    """Pairs in which the judge prefers neither; they count as disagreement."""
    agreement: Estimate
    """Share of pairs in which the judge prefers the text that is known to be better."""
    kappa: Estimate
    """The same, beyond what chance would give."""
    consistent: Estimate | None
    """Share of pairs with the same verdict in both orders; None for a judge that scores single texts."""
    first: Estimate | None
    """Share of wins of the text shown first, a tie being half of one: 0.5 without a bias."""


@dataclass(frozen=True)
class KnownPair:
    """A row, and two answers to it of which the better one is known."""

    row: Mapping[str, Any]
    chosen: str
    rejected: str


def judge_agreement(judge: Judge, pairs: Sequence[KnownPair], level: float = 0.95) -> Agreement:
    """Ask a judge about pairs whose better text is known.

    Intervals take pairs of one question as dependent, as those of an evaluation do (docs/intervals.md).

    Raises:
        DataError: there are no pairs, or the judge has a verdict on none.
        RewardError: the judge cannot be asked.
    """
    orders = _by_order(judge, pairs)
    judged = [(pair, own) for pair, own in zip(pairs, orders, strict=True) if own is not None]
    if not judged:
        raise DataError(f"judge: no verdict on any of {len(pairs)} pairs; give pairs that it can judge")
    questions = [judge.question_of(pair.row) for pair, _ in judged]
    known = ["a" if _is_first_name(pair) else "b" for pair, _ in judged]
    verdicts = [_name(sum(own) / 2, name) for (_, own), name in zip(judged, known, strict=True)]
    agreed = [float(verdict == name) for verdict, name in zip(verdicts, known, strict=True)]
    agreement = _share(questions, agreed, level)
    compares = judge.rubric.mode == "pairwise"
    same = [float(_sign(first) == _sign(second)) for _, (first, second) in judged]
    wins = [(first + 1.0 - second) / 2 for _, (first, second) in judged]
    return Agreement(
        pairs=len(judged),
        failed=len(pairs) - len(judged),
        ties=verdicts.count(TIE),
        agreement=agreement,
        kappa=beyond_chance(agreement, verdicts, known),
        consistent=_share(questions, same, level) if compares else None,
        first=_share(questions, wins, level) if compares else None,
    )


def beyond_chance(agreement: Estimate, judged: Sequence[Hashable], known: Sequence[Hashable]) -> Estimate:
    """Cohen's kappa (1960, Educational and Psychological Measurement 20): (p − e)/(1 − e) of an agreement p.

    e = Σ_c P(judged = c)·P(known = c) is what chance would give. The interval is that of p, with e as it was found;
    NaN where chance alone would always agree.

    Raises:
        ValueError: different numbers of labels, or none.
    """
    if len(judged) != len(known) or not judged:
        raise ValueError(f"{len(judged)} and {len(known)} labels; give one of each for every case")
    n, ours, theirs = len(judged), Counter(judged), Counter(known)
    e = sum(count * theirs[label] for label, count in ours.items()) / n**2
    if e == 1:
        return Estimate(float("nan"), float("nan"), float("nan"))
    return Estimate(*((p - e) / (1 - e) for p in (agreement.value, agreement.low, agreement.high)))


def _by_order(judge: Judge, pairs: Sequence[KnownPair]) -> list[tuple[float, float] | None]:
    """Wins of the chosen text when it is shown first and second; of a judge that scores, the same number twice."""
    if judge.rubric.mode == "pairwise":
        return judge.by_order([(pair.row, pair.chosen, pair.rejected) for pair in pairs])
    scores = iter(judge.scores([(pair.row, text) for pair in pairs for text in (pair.chosen, pair.rejected)]))
    found: list[tuple[float, float] | None] = []
    for _ in pairs:
        chosen, rejected = next(scores), next(scores)
        if chosen is None or rejected is None:
            found.append(None)
        else:
            won = 0.5 if chosen == rejected else float(chosen > rejected)
            found.append((won, won))
    return found


def _is_first_name(pair: KnownPair) -> bool:
    """Which text is called a: by chance, or else every label would be the same, and chance would always agree."""
    texts = pair.chosen, pair.rejected
    chosen, rejected = (hashlib.sha256(text.encode("utf-8", "replace")).digest() for text in texts)
    return chosen < rejected


def _name(won: float, known: str) -> str:
    """What the judge prefers, if the chosen text is called `known` and won such a share."""
    return {1: known, -1: "b" if known == "a" else "a", 0: TIE}[_sign(won)]


def _sign(won: float) -> int:
    return (won > 0.5) - (won < 0.5)


def _share(questions: Sequence[str], values: Sequence[float], level: float) -> Estimate:
    by_question: dict[str, list[float]] = {}
    for question, value in zip(questions, values, strict=True):
        by_question.setdefault(question, []).append(value)
    return clustered_share(list(by_question.values()), level)
