"""Questions about invented people, which only a search can answer.

"Where does Mara Tolin live?" is to be answered by a call of `search` with the name, and then, when the passage "Mara
Tolin lives in Veshka and is a miller." has come, by "Veshka". Who lives where is drawn at random, so nothing about it
can be known; people of held-out questions are in no question of training. The teacher guesses instead of searching,
searches for somebody else, or reads the wrong word of what it found, some of the time.
"""

from __future__ import annotations

import json
import random as randomness
from collections.abc import Mapping
from functools import cache
from typing import Any

from rlpost.errors import RecipeError
from rlpost.types import Completion

Row = dict[str, Any]
FIRST = (
    *("Mara", "Ilo", "Tessa", "Bren", "Oda", "Kiri", "Jon", "Sela", "Tavi", "Rune", "Edda", "Milo", "Nela", "Pavo"),
    *("Lio", "Vera", "Hanno", "Suri", "Otto", "Yana", "Emil", "Dora", "Finn", "Greta", "Ivo", "Lotte", "Nils", "Petra"),
    *("Rafa", "Tilda", "Udo", "Wanda"),
)
LAST = (
    *("Tolin", "Varga", "Holm", "Resk", "Dune", "Marsh", "Okoro", "Lind", "Sato", "Brandt", "Cole", "Dvorak", "Egger"),
    *("Falk", "Grim", "Hart", "Ionescu", "Juhl", "Kova", "Lorne", "Moor", "Novak", "Orso", "Prall", "Quist", "Rhee"),
    *("Stark", "Thorn", "Ulm", "Voss", "Wolff", "Zeller"),
)
PLACES = (
    *("Veshka", "Torn", "Alma", "Birk", "Corva", "Delft", "Esk", "Fara", "Gorm", "Hvar", "Ilmen", "Jarno", "Kells"),
    *("Lund", "Mora", "Nida", "Orla", "Pisa", "Riga", "Sund"),
)
TRADES = (
    *("miller", "baker", "weaver", "sailor", "smith", "painter", "tailor", "cook", "farmer", "potter", "mason"),
    *("printer", "singer", "doctor", "lawyer", "hunter", "banker", "clerk", "dancer", "diver"),
)
PEOPLE = len(FIRST) * len(LAST)


MISTAKES = (*("guesses",) * 6, "confuses", "misreads")
"""What a careless teacher does; three times of four he does not search."""


def documents() -> list[Row]:
    """A passage about every person, to be searched."""
    return [{"text": _passage(person)} for person in _people()]


def train(*, held_out: int = 200, seed: int = 0) -> list[Row]:
    """Two questions about each person that `held_out(n=held_out, seed=seed)` does not ask about, in random order.

    Raises:
        RecipeError: nobody would be left.
    """
    if not 0 <= held_out < PEOPLE:
        raise RecipeError(f"held_out={held_out}: give 0 to {PEOPLE - 1}, there are {PEOPLE}")
    rows = [row for number in _order(seed)[held_out:] for row in _questions(_people()[number])]
    randomness.Random(seed + 1).shuffle(rows)
    return rows


def held_out(*, n: int = 200, seed: int = 0) -> list[Row]:
    """Two questions about each of `n` people.

    Raises:
        RecipeError: there are not so many.
    """
    if not 1 <= n <= PEOPLE:
        raise RecipeError(f"n={n}: give 1 to {PEOPLE}")
    return [row for number in _order(seed)[:n] for row in _questions(_people()[number])]


def careless_teacher(row: Mapping[str, Any], random: randomness.Random, *, errs: float = 0.7) -> Row:
    """A conversation that answers a question by a search, with a mistake with probability `errs`.

    Raises:
        RecipeError: `errs` is not a probability.
    """
    if not 0 <= errs <= 1:
        raise RecipeError(f"errs={errs}: give a probability, 0 to 1")
    mistake = random.choice(MISTAKES) if random.random() < errs else ""
    asks_place = row["answer"] in PLACES
    if mistake == "guesses":
        return _conversation(row, _said(random.choice(PLACES if asks_place else TRADES)))
    person = random.choice(_people()) if mistake == "confuses" else _by_name()[row["name"]]
    call = {"type": "function", "function": {"name": "search", "arguments": {"query": person[0]}}}
    found = {"role": "tool", "name": "search", "content": _passage(person)}
    concluded = person[1] if asks_place != (mistake == "misreads") else person[2]
    return _conversation(row, {**_said(""), "tool_calls": [call]}, found, _said(concluded))


def texts() -> list[Row]:
    """What a tokenizer is to know: names, places and trades as words of their own."""
    call = '<call>{"name": "search", "arguments": {"query": ""}}</call>'
    lines = ["user: ", "assistant: ", call, "tool: ", json.dumps(_tools(), ensure_ascii=False)]
    asked = [row["prompt"][0]["content"] for row in _questions(_people()[0])]
    spoken = [f'"{first} {last}" {first} {last}' for first, last in zip(FIRST, LAST, strict=True)]
    said = [f"lives in {place} and is a {trade}. {place} {trade}" for place, trade in zip(PLACES, TRADES, strict=True)]
    bare = [*PLACES, *TRADES, *FIRST]
    return [{"text": line} for line in [*lines, *asked, *spoken, *said, *bare] * 5]


def answered(completion: Completion, example: Mapping[str, Any]) -> float:
    """1 for exactly the right word as the last turn, else 0."""
    return float(completion.text.strip() == example["answer"])


@cache
def _people() -> list[tuple[str, str, str]]:
    """Name, place and trade of each person, always the same."""
    random = randomness.Random(0)
    names = [f"{first} {last}" for first in FIRST for last in LAST]
    return [(name, random.choice(PLACES), random.choice(TRADES)) for name in names]


@cache
def _by_name() -> dict[str, tuple[str, str, str]]:
    return {person[0]: person for person in _people()}


def _passage(person: tuple[str, str, str]) -> str:
    name, place, trade = person
    return f"{name} lives in {place} and is a {trade}."


def _questions(person: tuple[str, str, str]) -> list[Row]:
    name, place, trade = person
    asked = ((f"Where does {name} live?", place), (f"What trade is {name} in?", trade))
    return [{"prompt": [{"role": "user", "content": q}], "name": name, "answer": a} for q, a in asked]


def _conversation(row: Mapping[str, Any], *messages: Row) -> Row:
    return {"messages": [*row["prompt"], *messages], "tools": _tools()}


def _said(content: str) -> Row:
    return {"role": "assistant", "content": content}


def _tools() -> list[Row]:
    """What the model is told of the search, as a stage with that tool tells it."""
    from rlpost.tools.search import search
    from rlpost.usercode.tools import schema

    return [schema(search, {})]


def _order(seed: int) -> list[int]:
    numbers = list(range(PEOPLE))
    randomness.Random(seed).shuffle(numbers)
    return numbers
