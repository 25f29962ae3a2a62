"""Fresh rollouts from the middle of completions, and the steps that completions are divided into."""

from __future__ import annotations

import pytest
from engines import local
from stubs import Letters, tiny_policy

from rlpost.data.step_split import ends_of, split_steps, step_starts, step_texts
from rlpost.engine.mc_rollouts import mc_rollouts
from rlpost.engine.params import Sampling
from rlpost.policy.score import logprobs
from rlpost.types import Completion, Group, completions

TOKENIZER = Letters(eos=0)
ENDS = (0,)


def whole(ids: tuple[int, ...], action: tuple[bool, ...] | None = None) -> Completion:
    return Completion(ids, action or (True,) * len(ids), TOKENIZER.decode(list(ids)))


GROUP = Group((1, 2, 3), (whole((5, 6, 7, 0)), whole((5, 8, 0)), whole(())), {"row": 1})


def test_every_token_may_be_a_step_and_the_end_belongs_to_the_last():
    divided = split_steps(GROUP, TOKENIZER, "", ENDS)
    assert [tuple(c.steps) for c in divided.completions] == [(1, 1, 2), (1, 2), ()]
    assert [step_texts(c, TOKENIZER, ENDS) for c in divided.completions] == [["f", "g", "h"], ["f", "i"], []]
    assert [step_starts(c) for c in divided.completions] == [[0, 1, 2], [0, 1], []]
    assert ends_of(divided.completions[0]) == [True, True, False, True]


def test_a_text_ends_a_step():
    divided = split_steps(GROUP, TOKENIZER, "g", ENDS).completions[0]
    assert tuple(divided.steps) == (2, 2)
    assert step_texts(divided, TOKENIZER, ENDS) == ["fg", "h"]
    # Nothing but the end follows the last separator: no step of its own.
    assert tuple(split_steps(GROUP, TOKENIZER, "h", ENDS).completions[0].steps) == (4,)
    assert tuple(split_steps(GROUP, TOKENIZER, "zz", ENDS).completions[0].steps) == (4,)


def test_what_an_environment_wrote_belongs_to_no_step():
    turns = whole((5, 9, 9, 6, 0), (True, False, False, True, True))
    divided = split_steps(Group((1,), (turns,)), TOKENIZER, "", ENDS).completions[0]
    assert tuple(divided.steps) == (1, 2)
    assert step_starts(divided) == [0, 3]
    assert step_texts(divided, TOKENIZER, ENDS) == ["f", "g"]


@pytest.fixture(scope="module")
def fresh():
    policy = tiny_policy(eos=0)
    groups = [GROUP, Group((4,), (whole((5, 0)), whole((9, 0))))]
    starts = [[0, 1, 2], [0, 1], [], [0], [0]]
    found = mc_rollouts(local(policy), TOKENIZER, groups, starts, 3, Sampling(max_new_tokens=6), seed=1)
    return found, policy


def test_rollouts_share_the_beginning_and_go_on_afresh(fresh):
    found, _ = fresh
    prefixes = [(), (5,), (5, 6), (), (5,), (), ()]
    assert [tuple(g.prompt) for g in found] == [(1, 2, 3)] * 5 + [(4,)] * 2
    for group, prefix in zip(found, prefixes, strict=True):
        assert len(group.completions) == 3
        for c in group.completions:
            assert tuple(c.ids[: len(prefix)]) == prefix
            assert tuple(c.action) == (False,) * len(prefix) + (True,) * (len(c.ids) - len(prefix))
            assert len(c.ids) <= 6
            assert c.text == TOKENIZER.decode(list(c.ids))
    assert found[0].example == {"row": 1}


def test_equal_states_are_tried_once(fresh):
    found, _ = fresh
    assert found[0] is found[3]
    assert found[1] is found[4]
    assert found[5] is found[6]
    assert not found[0].same(found[5])


def test_they_are_samples_of_the_policy_in_that_state(fresh):
    found, policy = fresh
    sampled = [x for c in completions(found) for x in c.logprobs]
    assert logprobs(policy, found).tolist() == pytest.approx(sampled, abs=1e-5)
    assert len({tuple(c.ids) for c in found[0].completions}) > 1
