"""Search: BM25 on paragraphs, the same every time."""

import math
import re

import pytest

from rlpost.errors import RecipeError
from rlpost.tools.search import Index, ready, search
from rlpost.usercode.binding import bind
from rlpost.usercode.params import TOOL, ToolFunction

PASSAGES = ["The cat sat on the mat.", "A dog sat.", "Birds fly, and the dog runs after the birds.", "Unrelated."]


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "texts" / "more").mkdir(parents=True)
    (tmp_path / "texts" / "a.txt").write_text("\n\n".join(PASSAGES[:2]), "utf-8")
    (tmp_path / "texts" / "more" / "b.md").write_text(" \n\n \n".join(PASSAGES[2:]), "utf-8")
    (tmp_path / "texts" / "c.json").write_text("dog dog dog", "utf-8")
    return tmp_path / "texts"


def test_scores_are_those_of_the_formula():
    """By hand: N = 3 passages, of 2, 4 and 3 words; k₁ = 1.2, b = 0.75."""
    index = Index(["red dog", "dog dog dog cat", "blue old cat"])

    def part(times, length, containing):
        idf = math.log(1 + (3 - containing + 0.5) / (containing + 0.5))
        return idf * times * 2.2 / (times + 1.2 * (0.25 + 0.75 * length / 3))

    assert part(3, 4, 2) > part(1, 2, 2)
    assert index.best("dog", 3) == ["dog dog dog cat", "red dog"]
    assert part(1, 2, 1) + part(1, 2, 2) > part(3, 4, 2)
    assert index.best("Red, DOG!", 1) == ["red dog"]
    assert part(1, 3, 2) > part(1, 4, 2)
    assert index.best("cat", 3) == ["blue old cat", "dog dog dog cat"]


def test_ties_go_to_the_earlier_passage_and_repeated_words_count_once():
    index = Index(["b a", "a b", "c c c"])
    assert index.best("a b a a", 5) == ["b a", "a b"]
    assert Index(["b b", "a c"]).best("a a b", 2) == ["b b", "a c"]


def test_texts_of_a_folder(folder):
    assert search("dog", folder=str(folder), top=5) == f"{PASSAGES[1]}\n\n{PASSAGES[2]}"
    assert search("dog", folder=str(folder), top=1) == PASSAGES[1]
    assert search("zebra", folder=str(folder)) == "Nothing found."


def test_the_index_is_made_anew_when_the_texts_change(folder):
    assert search("zebra", folder=str(folder)) == "Nothing found."
    (folder / "z.txt").write_text("Zebra", "utf-8")
    assert search("zebra", folder=str(folder)) == "Zebra"


def test_bound_as_a_tool(folder):
    tool = bind(ToolFunction(fn="search", args={"folder": "texts", "top": 1}), TOOL, "tools[0]", folder.parent)
    told = tool.call.schema()["function"]
    assert told["name"] == "search"
    assert list(told["parameters"]["properties"]) == ["query"]
    assert tool.call({"query": "dog"}) == {"text": PASSAGES[1], "failed": False}
    assert tool.call({"querry": "dog"})["text"].startswith("Error: arguments of search: query: is missing; querry: ")


@pytest.mark.parametrize(
    ("args", "said"),
    [
        ({}, "args: give one of folder"),
        ({"folder": "x", "documents": "y.z"}, "args: give one of folder"),
        ({"folder": "nowhere"}, "args.folder: "),
        ({"folder": "."}, "args: there is no text in"),
        ({"documents": "nothing.at_all"}, "args.documents: 'nothing.at_all' gives no texts"),
        ({"documents": "addition.train"}, "args.documents: 'addition.train' gives no texts"),
        ({"folder": "x", "top": 0}, "args.top: 0 - give at least 1"),
    ],
)
def test_sources_that_are_none_are_refused(tmp_path, args, said):
    with pytest.raises(RecipeError, match=re.escape(said)):
        ready(args, "args", tmp_path)
