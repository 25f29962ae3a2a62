"""A reward from a language model that judges, behind an OpenAI-compatible endpoint.

S completions, each judged by itself or against others of its prompt.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import permutations
from pathlib import Path
from typing import Any, Literal

from rlpost.console import Spell
from rlpost.errors import DataError
from rlpost.ranks import from_first
from rlpost.rewards import judge_answers
from rlpost.rewards.judge_client import Endpoint, Question, Unanswered
from rlpost.rewards.judge_prompts import Rubric
from rlpost.rewards.judge_settings import body_of, endpoint_of, rubric_of
from rlpost.section import LocalPath
from rlpost.types import Group

FILE = "judge.sqlite"
"""What a folder with a judge's answers holds."""


def judge(
    groups: Sequence[Group],
    *,
    url: str,
    model_name: str,
    criteria: Mapping[str, Any] | None = None,
    template: LocalPath | None = None,
    mode: Literal["score", "pairwise"] = "score",
    scale: Sequence[float] = (1, 5),
    pairs: Literal["all", "reference"] = "all",
    question: str | None = None,
    reference: str | None = None,
    votes: int = 1,
    temperature: float | None = 0.0,
    max_tokens: int | None = 1024,
    extra_body: Mapping[str, Any] | None = None,
    api_key_env: str | None = None,
    timeout: float = 120.0,
    retries: int = 4,
    concurrency: int = 16,
    per_minute: int | None = None,
    on_failure: Literal["stop", "unscored"] = "stop",
    cache: str | None = None,
) -> list[float | None]:
    """What a language model behind an OpenAI-compatible endpoint thinks of a completion, from 0 to 1 (docs/rewards.md).

    With `score`, the mean over votes of (score − worst)/(best − worst), averaged over criteria by weight. With
    `pairwise`, the mean over opponents, both orders and votes of 1 for a win, 1/2 for a tie, 0 for a loss.

    Raises:
        RecipeError: an argument is wrong.
        RewardError: no answer, and `on_failure` is `stop`; or the endpoint refuses us.
        DataError: a row lacks a column.
        DiskError: answers cannot be kept.
    """
    given = dict(locals())
    del given["groups"]
    return ready(given, "judge", Path())(groups)


def ready(args: Mapping[str, Any], where: str, base: Path) -> Judge:
    """The judge with arguments that are checked, and a template that is read, once.

    Args:
        args: of `judge`.
        where: their key path, for errors.
        base: the folder that the template's path is relative to.

    Raises:
        RecipeError: an argument is wrong.
    """
    parameters = inspect.signature(judge).parameters.values()
    full = {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY} | dict(args)
    return Judge(
        rubric=rubric_of(full, where, base),
        endpoint=endpoint_of(full, where),
        body=body_of(full, where),
        votes=full["votes"],
        question=full["question"],
        reference=full["reference"],
        against_reference=full["pairs"] == "reference",
        unscored=full["on_failure"] == "unscored",
        cache=None if full["cache"] is None else Path(full["cache"]).expanduser(),
    )


# Called instead of the function when a recipe is bound (rlpost/usercode/binding.py).
vars(judge)["ready"] = ready


@dataclass(frozen=True)
class Judge:
    """A language model that judges completions."""

    rubric: Rubric
    endpoint: Endpoint
    body: Mapping[str, Any]
    """What every request holds besides its messages."""
    votes: int
    question: str | None
    """Column of the question; None: `prompt` or `messages`."""
    reference: str | None
    """Column of a reference answer."""
    against_reference: bool
    """Completions are compared with the reference and not with each other."""
    unscored: bool
    cache: Path | None
    failing: Spell = field(default_factory=Spell, compare=False)
    """Whether its last questions had no answer."""
    alone: Spell = field(default_factory=Spell, compare=False)
    """Whether its last prompts had one completion each."""

    def __str__(self) -> str:
        """Where texts are sent, and with what key: for the user, before they are."""
        key = f" with the key in {self.endpoint.api_key_env}" if self.endpoint.api_key_env else ""
        return f"shows questions and completions to {self.body['model']} at {self.endpoint.url}{key}"

    def __call__(self, groups: Sequence[Group]) -> list[float | None]:
        """[S] rewards; raises as `judge`."""
        if self.rubric.mode == "score":
            return self.scores([(g.example, c.text) for g in groups for c in g.completions])
        if self.against_reference:
            return self.wins([(g.example, c.text, self._reference(g.example)) for g in groups for c in g.completions])
        return self._of_groups(groups)

    def scores(self, asked: Sequence[tuple[Mapping[str, Any], str]]) -> list[float | None]:
        """The score of each text, as an answer to its row's question; None where the judge failed."""
        texts = [{**self._shown(row), "answer": text} for row, text in asked]
        return [_mean(votes) for votes in self._verdicts(texts)]

    def wins(self, rows: Sequence[tuple[Mapping[str, Any], str, str]]) -> list[float | None]:
        """Of (row, one, other), the share of wins of `one`, over both orders; None where the judge failed."""
        return [None if own is None else math.fsum(own) / 2 for own in self.by_order(rows)]

    def by_order(self, rows: Sequence[tuple[Mapping[str, Any], str, str]]) -> list[tuple[float, float] | None]:
        """Of (row, one, other), the share of wins of `one` when it is shown first, and when it is shown second.

        Equal texts are a tie, without a question. None where the judge failed.
        """
        shown = [
            {**self._shown(row), "first": first, "second": second}
            for row, one, other in rows
            if one != other
            for first, second in ((one, other), (other, one))
        ]
        verdicts = iter([_mean(votes) for votes in self._verdicts(shown)])
        found: list[tuple[float, float] | None] = []
        for _, one, other in rows:
            if one == other:
                found.append((0.5, 0.5))
                continue
            first, second = next(verdicts), next(verdicts)
            found.append(None if first is None or second is None else (first, 1.0 - second))
        return found

    def _of_groups(self, groups: Sequence[Group]) -> list[float | None]:
        """Each completion against every other one of its group; None for one that is alone."""
        if groups and all(len(group.completions) == 1 for group in groups):
            self.alone.begins("judge: no prompt has two completions to compare; set args.pairs: reference")
        else:
            self.alone.ends("judge: there are completions to compare again")
        # Both orders of a pair are the same two questions, which are asked once.
        rows = [(g.example, one.text, other.text) for g in groups for one, other in permutations(g.completions, 2)]
        won = iter(self.wins(rows))
        return [_mean([next(won) for _ in g.completions[1:]]) for g in groups for _ in g.completions]

    def _shown(self, row: Mapping[str, Any]) -> dict[str, str]:
        """The texts besides what is judged."""
        shown = {"question": self.question_of(row)}
        if self.reference is not None:  # where it is compared with, a template has no field for it
            shown["reference"] = self._reference(row)
        return shown

    def question_of(self, row: Mapping[str, Any]) -> str:
        """The question of a row, as the judge is shown it; raises DataError."""
        if self.question is not None:
            return _column(row, self.question, "question")
        given = row.get("prompt") or row.get("messages")
        if isinstance(given, str):
            return given
        if isinstance(given, Sequence) and given and all(isinstance(m, Mapping) for m in given):
            return _conversation(given)
        raise DataError("judge: a row has no `prompt` or `messages`; name the question's column by args.question")

    def _reference(self, row: Mapping[str, Any]) -> str:
        assert self.reference is not None
        return _column(row, self.reference, "reference")

    def _verdicts(self, shown: Sequence[Mapping[str, str]]) -> list[list[float | None]]:
        """The verdict of every vote on each, asked by the first rank alone; None for one that failed."""
        questions = [self._ask(self.rubric.prompt(texts), vote) for texts in shown for vote in range(self.votes)]
        if not questions:
            return []
        found = from_first(lambda: self._answered(questions))
        failed = [verdict for verdict in found if isinstance(verdict, Unanswered)]
        if failed:
            times = f"{len(failed)} of {len(found)} questions"
            self.failing.begins(f"judge: {self.endpoint.url}: {times} have no answer; the first: {failed[0]}")
        else:
            self.failing.ends(f"judge: {self.endpoint.url}: every question has an answer again")
        values = [None if isinstance(verdict, Unanswered) else verdict for verdict in found]
        return [values[i : i + self.votes] for i in range(0, len(values), self.votes)]

    def _answered(self, questions: Sequence[Question]) -> list[float | Unanswered]:
        home = judge_answers.home()
        file = self.cache / FILE if self.cache is not None else home.file if home is not None else None
        return self.endpoint.ask(questions, file, home.run if home is not None else None, stop=not self.unscored)

    def _ask(self, prompt: str, vote: int) -> Question:
        body = {"messages": [{"role": "user", "content": prompt}], **self.body}
        return Question(body, vote, self.rubric.read, self.rubric.form)


def _column(row: Mapping[str, Any], name: str, argument: str) -> str:
    value = row.get(name)
    if isinstance(value, str):
        return value
    what = f"is {value!r:.40}, not text" if name in row else f"is not there (there are: {', '.join(map(str, row))})"
    raise DataError(f"judge: column {name!r} of a row {what}; name another by args.{argument}")


def _conversation(messages: Sequence[Mapping[str, Any]]) -> str:
    """The content of a single message of a user; else every message with its role before it.

    An answer that the row ends with is left out, as it is from the prompt.
    """
    texts = [(str(m.get("role")), m.get("content")) for m in messages]
    if texts[-1][0] == "assistant":
        texts.pop()
    for role, content in texts:
        if not isinstance(content, str):
            raise DataError(f"judge: a message of {role} is {content!r:.40}, not text; it cannot be shown to the judge")
    if [role for role, _ in texts] == ["user"]:
        return str(texts[0][1])
    return "\n\n".join(f"{role}:\n{content}" for role, content in texts)


def _mean(values: Iterable[float | None]) -> float | None:
    """The mean, None where one is missing or there are none."""
    known = list(values)
    if not known or any(value is None for value in known):
        return None
    return math.fsum(value for value in known if value is not None) / len(known)
