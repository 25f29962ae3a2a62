"""Rewards from models: what they make of scores, and what a judge reads."""

from __future__ import annotations

import math

import pytest
import torch
from families import tiny

from rlpost.data.codec import make_codec
from rlpost.data.params import Tokenizer, TokenizerKind
from rlpost.data.step_split import split_steps
from rlpost.data.tokenizers import make_tokenizer
from rlpost.errors import ModelError, RecipeError, RewardError
from rlpost.policy.attention import FLAT, use_attention
from rlpost.policy.judge import RewardModelJudge, reread, same_tokens
from rlpost.policy.policy import Policy
from rlpost.policy.value_head import ValueHeadModel
from rlpost.rewards.models import process_reward_model, process_steps, reward_model
from rlpost.rewards.score import Scorer
from rlpost.rewards.tree import BoundReward
from rlpost.types import Completion, Group


class Said:
    """A model that says what it was told to say."""

    def __init__(self, *scores, steps=()):
        self.given = scores
        self.steps = list(steps)
        self.ends = []

    def scores(self, groups):
        self.seen = groups
        return list(self.given)

    def step_scores(self, groups, step_end):
        self.seen = groups
        self.ends.append(step_end)
        return self.steps


def test_a_reward_model_gives_its_scores():
    assert reward_model([], Said(0.5, -3.0)) == [0.5, -3.0]


@pytest.mark.parametrize(
    ("reduce", "expected"), [("min", 0.2), ("last", 0.4), ("product", 0.9 * 0.2 * 0.4), ("mean", 0.5)]
)
def test_steps_become_one_number(reduce, expected):
    model = Said(steps=[[0.9, 0.2, 0.4], [], [0.7]])
    found = process_reward_model([], model, reduce=reduce, step_end="##")
    assert found == [pytest.approx(expected), None, pytest.approx(0.7)]
    assert model.ends == ["##"]


def test_another_reduction_is_refused_in_one_line():
    with pytest.raises(RecipeError, match="reduce='max' - give one of min, last, product, mean"):
        process_reward_model([], Said(), reduce="max")


def test_steps_are_rewarded_each_by_itself():
    group = Group(
        (1,), (Completion((2, 3), (True, True), "ab", steps=(1, 1)), Completion((4,), (True,), "c", steps=(1,)))
    )
    leaf = BoundReward("steps", 1.0, process_steps, Said(steps=[[0.25, 0.5], [1.0]]))
    scores = Scorer([leaf]).score([group], steps=[["a", "b"], ["c"]])
    assert scores.by_step == {"steps": [[0.25, 0.5], [1.0]]}
    with pytest.raises(RewardError, match="for 2 steps"):
        Scorer([BoundReward("steps", 1.0, process_steps, Said(steps=[[0.5], [1.0]]))]).score(
            [group], [["a", "b"], ["c"]]
        )


# --- What a judge reads

DIGITS = make_tokenizer(Tokenizer(kind=TokenizerKind.characters, alphabet="0123456789+=;"))
LETTERS = make_tokenizer(Tokenizer(kind=TokenizerKind.characters, alphabet="=+;9876543210"))
"""The same characters under other ids."""


def scalar(tokenizer, longest: int = 128) -> ValueHeadModel:
    model = tiny("gpt2", torch.float64)
    use_attention(model, FLAT)
    model.config.max_position_embeddings = longest
    head = ValueHeadModel(Policy(model, tokenizer, flat=True).eval())
    with torch.no_grad():
        head.head.weight.copy_(torch.randn(head.head.weight.shape, generator=torch.Generator().manual_seed(3)))
    return head


def written(*texts: str, prompt: str = "1+1=", tokenizer=DIGITS, finish: str = "stop", **example) -> Group:
    end = () if finish == "length" else (tokenizer.eos_token_id,)
    ids = [(*tokenizer.encode(text), *end) for text in texts]
    every = [Completion(i, (True,) * len(i), text, finish) for i, text in zip(ids, texts, strict=True)]
    return Group(tuple(tokenizer.encode(prompt)), tuple(every), {"prompt": prompt, **example})


def test_with_the_same_tokenizer_it_reads_the_very_tokens():
    model = scalar(DIGITS)
    # No text would be encoded to these ids: 2 ends it twice.
    odd = Group((5, 6), (Completion((7, 2, 2), (True, True, True), "", "stop"),))
    assert RewardModelJudge(model, DIGITS).scores([odd]) == model.score([odd]).final_S.tolist()


def test_with_another_tokenizer_it_reads_the_text():
    model = scalar(LETTERS)
    judged = RewardModelJudge(model, DIGITS)
    groups = [written("2", "3;4"), written("12", prompt="9=")]
    expected = model.score([written("2", "3;4", tokenizer=LETTERS), written("12", prompt="9=", tokenizer=LETTERS)])
    assert judged.scores(groups) == pytest.approx(expected.final_S.tolist(), abs=1e-12)
    flat = judged.scores(groups)
    assert judged.by_group(groups) == [flat[:2], flat[2:]]
    assert expected.final_S.tolist() != pytest.approx(model.score(groups).final_S.tolist(), abs=1e-3)


def test_what_was_cut_off_is_read_without_an_end():
    (group,) = reread(written("12", "3", finish="length"), DIGITS, make_codec(LETTERS))
    assert [tuple(c.ids) for c in group.completions] == [tuple(LETTERS.encode("12")), tuple(LETTERS.encode("3"))]


def test_an_empty_answer_is_read_as_its_end():
    (group,) = reread(written("", "3"), DIGITS, make_codec(LETTERS))
    assert [tuple(c.ids) for c in group.completions] == [(2,), (*LETTERS.encode("3"), 2)]
    assert tuple(group.prompt) == tuple(LETTERS.encode("1+1="))


def test_without_a_row_the_prompt_is_read_off_its_tokens():
    bare = Group(written("2").prompt, written("2").completions)
    assert tuple(reread(bare, DIGITS, make_codec(LETTERS))[0].prompt) == tuple(LETTERS.encode("1+1="))


def test_a_conversation_is_asked_in_the_judges_own_format():
    chatty = make_tokenizer(Tokenizer(kind=TokenizerKind.characters, alphabet="=+;9876543210AU:\n"))
    chatty.chat_template = (
        "{% for m in messages %}{{ 'A:' if m['role'] == 'assistant' else 'U:' }}{{ m['content'] }}"
        "{{ '<eos>' if m['role'] == 'assistant' else '' }}\n{% endfor %}{% if add_generation_prompt %}A:{% endif %}"
    )
    row = {"messages": [{"role": "user", "content": "1+1="}, {"role": "assistant", "content": "2"}]}
    asked = Group((5,), written("3").completions, row)
    (group,) = reread(asked, DIGITS, make_codec(chatty))
    assert chatty.decode(list(group.prompt)) == "U:1+1=\nA:"
    assert chatty.decode(list(group.completions[0].ids)).startswith("3<eos>")


def test_tokenizers_are_told_apart_by_vocabulary_end_and_template():
    other = make_tokenizer(Tokenizer(kind=TokenizerKind.characters, alphabet="0123456789+=;"))
    assert same_tokens(DIGITS, other)
    assert not same_tokens(DIGITS, LETTERS)
    other.chat_template = "{{ messages }}"
    assert not same_tokens(DIGITS, other)


def test_a_completion_longer_than_the_judge_reads():
    with pytest.raises(ModelError, match="has 9 tokens and the reward model reads 8"):
        RewardModelJudge(scalar(DIGITS, longest=8), DIGITS).scores([written("1234")])


def by_hand(model: ValueHeadModel, group: Group, ends: list[list[int]]) -> list[list[float]]:
    after = torch.sigmoid(model.score([group]).after_N).split([c.actions for c in group.completions])
    return [[float(x[at]) for at in found] for x, found in zip(after, ends, strict=True)]


def test_steps_are_judged_at_their_last_action():
    model = scalar(DIGITS)
    group = written("12;3;", "4", "5;67")
    found = RewardModelJudge(model, DIGITS).step_scores([group], ";")
    # The end token belongs to the last step, and is not read.
    assert found == by_hand(model, group, [[2, 4], [0], [1, 3]])
    assert found == RewardModelJudge(model, DIGITS).step_scores(
        [split_steps(group, DIGITS, ";", (DIGITS.eos_token_id,))], "unused"
    )
    assert all(0 < x < 1 for row in found for x in row)


def test_the_stages_step_end_goes_before_the_rewards():
    model = scalar(DIGITS)
    group = written("12;3;")
    assert RewardModelJudge(model, DIGITS, ";").step_scores([group], "+") == RewardModelJudge(
        model, DIGITS
    ).step_scores([group], ";")
    assert [len(row) for row in RewardModelJudge(model, DIGITS).step_scores([group], "+")] == [1]


def test_steps_of_another_tokenizer_are_divided_anew():
    model = scalar(LETTERS)
    group = split_steps(written("12;3;"), DIGITS, "", (DIGITS.eos_token_id,))
    found = RewardModelJudge(model, DIGITS).step_scores([group], ";")
    assert found == by_hand(model, written("12;3;", tokenizer=LETTERS), [[2, 4]])


def test_a_completion_without_actions_has_no_steps():
    model = scalar(DIGITS)
    silent = Group((5, 6), (Completion((7, 8), (False, False), "34"), *written("1;2").completions))
    judged = RewardModelJudge(model, DIGITS)
    assert [len(row) for row in judged.step_scores([silent], ";")] == [0, 2]
    assert process_reward_model([silent], judged, step_end=";")[0] is None
    assert all(math.isfinite(x) for x in judged.scores([silent]))
