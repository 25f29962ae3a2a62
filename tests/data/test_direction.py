"""Text read backwards: what the rows become, and which recipes may ask for it."""

from __future__ import annotations

import copy

import pytest
from conversations import CHATML, make, talk

from rlpost.data.codec import Codec, make_codec
from rlpost.data.dataset import open_dataset
from rlpost.data.direction import backwards, before_what, in_reading_order
from rlpost.data.fitting import Limit
from rlpost.data.formats import DataRole, Format, encode
from rlpost.data.params import Direction, Source, TooLong
from rlpost.errors import DataError, RecipeError
from rlpost.recipe.resolve import resolve
from rlpost.types import Group

BEGIN, END = 1, 2


def turned(row, form, codec) -> Group:
    return backwards(encode(row, form, codec, "row 1"), codec)


def shown(group: Group, codec: Codec) -> str:
    """All of it as text, what is learned in brackets."""
    (completion,) = group.completions
    learned = [token for token, acts in zip(completion.ids, completion.action, strict=True) if acts]
    assert len(learned) == len(completion.ids)
    return f"{codec.tokenizer.decode(list(group.prompt))}[{codec.tokenizer.decode(learned)}]"


@pytest.fixture(scope="module")
def without_begin(digits) -> Codec:
    tokenizer = copy.deepcopy(digits)
    tokenizer.bos_token = None
    return make_codec(tokenizer)


def test_a_prompt_and_its_answer_by_hand(codec):
    """0 to 9 are tokens 4 to 13, + is 14 and = is 15."""
    group = turned({"prompt": "1+2=", "completion": "3"}, Format.completion, codec)
    assert tuple(group.prompt) == (BEGIN,)
    (completion,) = group.completions
    assert tuple(completion.ids) == (7, 15, 6, 14, 5, END)
    assert tuple(completion.action) == (True,) * 6
    assert completion.text == "3=2+1"
    assert group.example == {"prompt": "1+2=", "completion": "3"}


def test_a_text_is_the_same_text_however_it_is_cut(codec):
    whole = turned({"text": "1+2=3"}, Format.text, codec)
    cut = turned({"prompt": "1+2=", "completion": "3"}, Format.completion, codec)
    assert shown(whole, codec) == "<bos>[3=2+1<eos>]"
    assert tuple(whole.prompt) == tuple(cut.prompt)
    assert whole.completions[0].same(cut.completions[0])


@pytest.mark.parametrize(
    ("row", "form"),
    [({"text": "1+2=3"}, Format.text), ({"prompt": "1+2=", "completion": "3"}, Format.completion)],
)
def test_without_a_begin_token_the_last_token_is_the_prompt(row, form, without_begin):
    assert shown(turned(row, form, without_begin), without_begin) == "3[=2+1<eos>]"


def test_a_conversation_is_one_text_that_is_learned_whole():
    codec = make_codec(make(CHATML))
    row = {"messages": talk("ab", "cd")}
    group = turned(row, Format.messages, codec)
    ahead = encode(row, Format.messages, codec, "row 1")
    assert tuple(group.completions[0].ids) == (*reversed((*ahead.prompt, *ahead.completions[0].ids)), END)
    # Special tokens are tokens: the turn's stop token now begins it.
    assert shown(group, codec).startswith("<bos>[<|im_end|>dc\n")
    assert shown(group, codec).endswith("ba\nuser<|im_start|><eos>]")


def test_twice_backwards_is_the_text_again(codec):
    once = turned({"text": "12+3"}, Format.text, codec)
    again = backwards(once, codec)
    assert shown(again, codec) == "<bos>[12+3<eos>]"


def test_what_is_asked_and_answered(codec, without_begin):
    ids = codec.ids("=3", "here")
    assert before_what(ids, codec.tokenizer) == (BEGIN, 7, 15)
    assert before_what((), codec.tokenizer) == (BEGIN,)
    assert before_what(ids, without_begin.tokenizer) == (7, 15)
    assert in_reading_order((6, 14, 5, END), END) == (5, 14, 6)
    assert in_reading_order((6, 14), END) == (14, 6)
    with pytest.raises(DataError, match="nothing to read backwards from"):
        before_what((), without_begin.tokenizer)


def opened(path, codec, limit):
    source = Source(path=str(path), direction=Direction.reverse)
    return open_dataset(
        {"rows": source},
        codec,
        need=DataRole.completions,
        limit=limit,
        seed=0,
        where="stages.sft.data",
        stages=None,
        bind=None,
    )


def test_what_is_too_long_keeps_the_end_of_the_text(write, codec):
    path = write([{"prompt": "11+22=", "completion": "33"}])
    (group,) = opened(path, codec, Limit(5, TooLong.cut)).all()
    # begin and four tokens; the beginning of the text, and the end token with it, are not learned.
    assert shown(group, codec) == "<bos>[33=2]"
    with pytest.raises(DataError, match="has 10 tokens, the limit is 5"):
        opened(path, codec, Limit(5))


# --- Recipes

RECIPE = """\
model: {path: gpt2}
stages:
  first: {kind: sft, data: {a: {path: rows.jsonl}}, steps: 1, learning_rate: 1e-3}
  back: {kind: sft, data: {a: {path: rows.jsonl, direction: reverse}}, steps: 1, learning_rate: 1e-3}
  last: {kind: grpo, data: {a: {path: rows.jsonl}}, steps: 1, learning_rate: 1e-3, rewards: [{fn: ends}]}
evaluation: {data: {a: {path: rows.jsonl}}, rewards: [{fn: ends}], samples: 2}
"""


@pytest.fixture
def recipe(tmp_path) -> str:
    file = tmp_path / "r.yaml"
    file.write_text(RECIPE)
    return str(file)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["stages.last.data.a.direction=reverse"], r"stages\.last\.data\.a\.direction: reverse is for sft"),
        (["evaluation.data.a.direction=reverse"], r"evaluation\.data\.a\.direction: reverse is for sft"),
        (["stages.last.start=back"], r"stages\.last\.start: 'back' reads backwards, and leaves no policy"),
        (["stages.last.reference=back"], r"stages\.last\.reference: 'back' reads backwards"),
        (["stages.last.rewards=[{fn: reverse_likelihood}]"], r"model: missing - name an sft stage with direction: rev"),
        (
            ["stages.last.rewards=[{fn: reverse_likelihood, model: first}]"],
            r"rewards\[0\]\.model: 'first' does not read backwards - name an sft stage with direction: reverse",
        ),
        (["stages.last.rewards=[{fn: reward_model, model: back}]"], r"'back' is of kind sft - name a reward_model"),
        (["evaluation.judge=first"], r"evaluation\.judge: 'first' is of kind sft - name a reward_model stage or a rev"),
        (["stages.back.data.a.direction=sideways"], r"stages\.back\.data\.a\.direction"),
    ],
)
def test_it_is_refused_in_one_line(recipe, words, said):
    with pytest.raises(RecipeError, match=said):
        resolve(recipe, words)


def test_a_stage_reads_one_way(tmp_path):
    file = tmp_path / "r.yaml"
    file.write_text(RECIPE.replace("direction: reverse}}", "direction: reverse}, b: {path: more.jsonl}}"))
    with pytest.raises(RecipeError, match=r"stages\.back\.data\.a\.direction: a model reads one way"):
        resolve(str(file), [])


def test_a_reverse_stage_may_judge(recipe):
    words = ["stages.last.rewards=[{fn: reverse_likelihood, model: back}]", "evaluation.judge=back"]
    assert resolve(recipe, words).config.stages["last"].rewards[0].model == "back"
