"""Rows out of flat arrays are those that encoding one by one gives, whatever their format and options."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from conversations import CHATML, THINKING, make
from tokenizers.processors import TemplateProcessing

from rlpost.data import files, flat
from rlpost.data.batch import Batched
from rlpost.data.codec import make_codec
from rlpost.data.dataset import open_dataset
from rlpost.data.encoding import Encoder
from rlpost.data.fitting import Limit, RowOutcomes
from rlpost.data.formats import DataRole, recognise
from rlpost.data.params import Direction, Source, TokenizerKind, TooLong, Unrendered
from rlpost.data.params import Tokenizer as Spec
from rlpost.data.tokenizers import make_tokenizer
from rlpost.errors import DataError, RlpostError

PAIR = {"prompt": "1+1=", "chosen": "2", "rejected": "3"}
ASKED = [{"role": "user", "content": "1+1="}]
SAID = [{"role": "assistant", "content": "2"}]
LONG = "1" * 30
SAMPLED = {"ids": [6, 7], "action": [1, 0], "logprobs": [-0.1], "text": "a", "finish": "stop", "reward": 1.0}


def answered(prompt, completion):
    return {"prompt": prompt, "completion": completion}


ROWS = {
    DataRole.completions: [
        [{"prompt": f"{i}+{i}=", "completion": str(2 * i), "answer": i} for i in range(30)],
        [answered("1", "2"), answered("", "3"), answered("<eos>", LONG)],
        [answered("1", "2<eos>"), answered("<bos>1", "1"), answered("1=", "4")],
        [answered("1", "2"), answered("1", "2<eos>3")],
        [answered("1", "2"), answered("1", "?")],
        [answered("1", "2"), {**answered("1", "2"), "tools": [{"name": "f"}]}],
        [answered("1", "2"), answered("1", "")],
        [{"prompt": ASKED, "completion": SAID}, {"prompt": "1+1=", "completion": "2"}],
        [{"prompt": "1", "completions": ["2", "3", LONG]}, {"prompt": "1", "completions": ["2"]}],
        [*[answered("1", "2")] * 30, {"prompt": ASKED, "completion": SAID + ASKED + SAID}],
        [{"messages": ASKED + SAID}, {"messages": ASKED + SAID + ASKED + SAID}],
        [{"text": "1+1=2"}, {"text": LONG}, {"text": "1"}],
    ],
    DataRole.pairs: [
        [PAIR] * 30 + [{**PAIR, "rejected": "2"}, {**PAIR, "margin": 0.5}],
        [{**PAIR, "chosen": LONG}, {**PAIR, "prompt": "1"}],
        [{"chosen": ASKED + SAID, "rejected": [*ASKED, {"role": "assistant", "content": "3"}]}],
    ],
    DataRole.prompts: [
        [{"prompt": "1+1=", "answer": "2"}, {"prompt": LONG}],
        [{"prompt": ASKED}],
        [{"messages": ASKED + SAID}],
    ],
    DataRole.labelled: [[{"prompt": "1", "completion": "2", "label": x} for x in (True, "no", 0)]],
    DataRole.ranked: [
        [{"prompt": "1", "completions": ["2", "3", "4"], "scores": [1, None, 0.5]}],
        [PAIR, {**PAIR, "chosen": "3"}],
    ],
    DataRole.steps: [
        [
            {"prompt": "1", "steps": ["2", "34"], "labels": [1, 0.25]},
            {"prompt": "1", "steps": ["2"], "labels": [0]},
        ]
    ],
    DataRole.recorded: [
        [
            {"prompt": [5], "completions": [{"ids": [6], "action": [1], "logprobs": [-1.5]}], "example": {}},
            {"prompt": [4, 5], "completions": [SAMPLED, {**SAMPLED, "reward": None}], "example": {"answer": "2"}},
            {"prompt": [4], "completions": [{"ids": [6], "action": [0], "logprobs": []}], "example": None},
        ]
    ],
}
CODECS = {
    "characters": lambda: _characters(),
    "begins": lambda: _begins(),
    "bytes": lambda: make(CHATML),
    "thinking": lambda: _thinking(),
}


def _characters():
    return make_tokenizer(Spec(kind=TokenizerKind.characters, alphabet="0123456789+="))


def _begins():
    """One that puts its begin token before every text."""
    tokenizer = _characters()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing("<bos> $A", special_tokens=[("<bos>", 1)])
    return tokenizer


def _thinking():
    tokenizer = make(CHATML)
    tokenizer.chat_template = THINKING
    return tokenizer


class Folders:
    """A shelf that believes what lies there."""

    def __init__(self, path):
        self.path, self.filled = path, 0

    def folder(self, key, whose, fill):
        folder, begun = self.path / key, self.path / f"{whose}.{self.filled}.begun"
        if not folder.exists():
            begun.mkdir(parents=True, exist_ok=True)
            fill(begun)
            begun.rename(folder)
            self.filled += 1
        return folder


def told(make):
    """What was made, or the error."""
    try:
        return make()
    except RlpostError as error:
        return str(error)


def one_by_one(rows, path, need, codec, limit, options):
    """Digests of the groups of an encoder that knows no batches, and what became of the rows."""
    alone = replace(codec, batched=None)
    encoder = Encoder(recognise(rows, "", need), alone, limit, **options)
    outcomes = RowOutcomes()
    groups = [encoder(row, f"data.c ({path}:{n})", outcomes) for n, row in enumerate(rows, start=1)]
    kept = [g.digest() for g in groups if g is not None]
    if not kept:
        raise DataError("nothing left")
    return kept, {k: n for k, n in outcomes.counts.items() if n}


def from_arrays(path, need, codec, limit, options, shelf):
    data = open_dataset(
        {"c": Source(path=str(path), **options)},
        codec,
        need=need,
        limit=limit,
        seed=0,
        where="data",
        stages=None,
        bind=None,
        shelf=shelf,
    )
    outcomes = data._parts[0].outcomes.counts
    return [g.digest() for g in data.all()], {k: n for k, n in outcomes.items() if n and k not in ("read", "kept")}


LIMITS = [Limit(100), Limit(12, TooLong.cut), Limit(12, TooLong.drop), Limit(12)]


@pytest.mark.parametrize(
    ("tokenizer", "limit"),
    [
        *(("characters", x) for x in LIMITS),
        *((name, x) for name in ("begins", "bytes", "thinking") for x in LIMITS[:2]),
    ],
)
def test_groups_are_those_of_single_rows(tokenizer, limit, write, tmp_path, monkeypatch):
    codec = make_codec(CODECS[tokenizer]())
    compared = 0
    for need, sets in ROWS.items():
        for number, rows in enumerate(sets):
            for options in ({}, {"direction": Direction.reverse}, {"unrendered": Unrendered.drop}):
                path = write(rows, f"{need}{number}.jsonl")
                wanted = told(lambda: one_by_one(rows, path, need, codec, limit, options))  # noqa: B023
                folders = [] if options else [Folders(tmp_path / f"{need}{number}")] * 2
                for shelf in (None, *folders):
                    monkeypatch.setattr(files, "AT_ONCE", 8192 if shelf is None else 1)
                    found = told(lambda: from_arrays(path, need, codec, limit, options, shelf))  # noqa: B023
                    if wanted == "nothing left":
                        assert "none of" in found
                    else:
                        assert found == wanted, (need, rows, options)
                    compared += not isinstance(found, str)
    assert compared > 30


def test_ends_that_do_not_fit_four_bytes_are_kept_in_eight(write, tmp_path, codec, monkeypatch):
    monkeypatch.setattr(files, "AT_ONCE", 100)
    path = write([answered(f"{i}=", f"{i}") for i in range(300)])
    arguments = (path, DataRole.completions, codec, Limit(100), {})
    wanted = from_arrays(*arguments, None)
    monkeypatch.setattr(flat, "_LARGE", 600)
    assert from_arrays(*arguments, None) == wanted
    assert from_arrays(*arguments, Folders(tmp_path / "kept")) == wanted
    assert next((tmp_path / "kept").glob("*/ids_ends.int64")).stat().st_size == 8 * 2 * 300
    assert not list((tmp_path / "kept").glob("*/ids_ends.uint32"))


def test_groups_are_views_that_cannot_be_written_to(write, codec):
    path = write([answered("1+1=", "2"), answered("2+2=", "4")])
    data = open_dataset(
        {"c": Source(path=str(path))},
        codec,
        need=DataRole.completions,
        limit=Limit(100),
        seed=0,
        where="data",
        stages=None,
        bind=None,
    )
    one, other = data.all(), data.all()
    for array in (one[1].prompt, one[1].completions[0].ids, one[1].completions[0].action):
        assert not array.flags.writeable
    assert np.shares_memory(one[1].prompt, other[1].prompt)


class Odd:
    """A tokenizer that is asked for many texts at once in vain."""

    is_fast, unk_token_id = True, None

    @property
    def backend_tokenizer(self):
        return self

    model = None

    def encode(self, text, **_):
        return [len(text)]

    def encode_batch_fast(self, texts, **_):
        return [SimpleNamespace(ids=[0]) for _ in texts]


def test_a_tokenizer_whose_batches_differ_is_asked_one_by_one():
    assert Batched(Odd())(["a", "bc"]).split() == [(1,), (2,)]
