"""Engines of the user's: what is wrong with what they give is told in a line that names the request."""

from __future__ import annotations

import threading
from dataclasses import replace

import numpy as np
import pytest
from engines import asked, local
from stubs import tiny_policy

from rlpost.engine.door import engine_for
from rlpost.engine.foreign import ForeignEngine
from rlpost.engine.params import EngineChoice, Sampling
from rlpost.errors import EngineError
from rlpost.types import Completion
from rlpost.usercode.bound import Bound

PROMPTS = [[5, 9, 7, 8], [4], [11, 12, 13]]
REQUESTS = asked(PROMPTS, 2, Sampling(max_new_tokens=6), [1, 2, 3])


class Honest:
    """The local engine, but for one completion, the second one of the second request."""

    def __init__(self, policy, spoil=lambda completion: completion):
        self.local = local(policy)
        self.spoil = spoil

    def update_weights(self, policy, version):
        self.local.update_weights(policy, version)

    def generate(self, requests):
        found = self.local.generate(requests)
        first, second = found[1]
        return [found[0], (first, self.spoil(second)), *found[2:]]

    def close(self):
        self.local.close()


def made(engine, deadline: float = 60.0, policy=None) -> ForeignEngine:
    policy = policy or tiny_policy(eos=3)
    foreign = ForeignEngine(Bound(lambda policy: engine(policy), "mine", "rollouts"), policy, deadline)
    foreign.update_weights(policy, 7)
    return foreign


def test_what_an_honest_engine_gives_is_passed_on_and_made_whole():
    policy = tiny_policy(eos=3)

    def bare(c):
        return Completion(c.ids, c.action, logprobs=c.logprobs)

    found = made(lambda policy: Honest(policy, bare), policy=policy).generate(REQUESTS)
    own = local(policy)
    own.update_weights(policy, 7)
    assert [c.digest() for cs in found for c in cs] == [c.digest() for cs in own.generate(REQUESTS) for c in cs]


@pytest.mark.parametrize(("ids", "finish"), [([1, 3], "stop"), ([1, 2], "length")])
def test_an_end_token_stops_a_completion_that_names_no_finish(ids, finish):
    found = made(lambda policy: Honest(policy, lambda _: Completion(ids, [True] * 2, logprobs=[-1.0] * 2)))
    assert found.generate(REQUESTS)[1][1].finish == finish


SPOILT = {
    "as a dict; return rlpost.types.Completion": lambda c: {"ids": c.ids},
    "without a token": lambda c: Completion([], []),
    "of 7 tokens; its limit is 6": lambda c: Completion([1] * 7, [True] * 7, logprobs=[-1.0] * 7),
    "with id 64; the vocabulary has ids from 0 to 63": lambda c: replace(c, ids=np.full(len(c.ids), 64)),
    "with id -1; ": lambda c: replace(c, ids=np.full(len(c.ids), -1)),
    "goes on after an end token": lambda c: Completion([1, 3, 1], [True] * 3, logprobs=[-1.0] * 3),
    "tokens that are not actions": lambda c: Completion([1, 2], [True, False], logprobs=[-1.0]),
    "with 0 log-probabilities for": lambda c: replace(c, logprobs=[]),
    "a log-probability of nan": lambda c: replace(c, logprobs=np.full(len(c.ids), np.nan)),
    "a log-probability of -inf": lambda c: replace(c, logprobs=np.full(len(c.ids), -np.inf)),
    "a log-probability of 0.5": lambda c: replace(c, logprobs=np.full(len(c.ids), 0.5)),
    "finish='done'": lambda c: replace(c, finish="done"),
    "of weights version 6; sample with version 7": lambda c: replace(c, weights_version=6),
}


@pytest.mark.parametrize("message", SPOILT)
def test_a_wrong_completion(message):
    told = f"rollouts: engine mine: request 2 of 3 ('e'): it gave completion 2 of 2 .*{message}"
    with pytest.raises(EngineError, match=told.replace("(", r"\(", 1).replace(")", r"\)", 1)) as caught:
        made(lambda policy: Honest(policy, SPOILT[message])).generate(REQUESTS)
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == 8


class Returning(Honest):
    """Returns something of its own."""

    def __init__(self, policy, answer):
        super().__init__(policy)
        self.answer = answer

    def generate(self, requests):
        return self.answer(self.local.generate(requests))


WRONG = {
    r"returned 2 groups of completions for 3 requests, none for request 3 of 3 \('lmn'\)": lambda found: found[:2],
    r"returned 4 groups of completions for 3 requests, the first \('fjhi'\); return": lambda found: [*found, found[0]],
    r"returned a NoneType for 3 requests": lambda found: None,
    r"request 1 of 3 \('fjhi'\): it gave 1 completion, not 2": lambda found: [found[0][:1], *found[1:]],
    r"request 2 of 3 \('e'\): it gave 3 completions, not 2": lambda found: [
        found[0],
        (*found[1], found[1][0]),
        found[2],
    ],
    r"request 3 of 3 \('lmn'\): it gave a Completion; return a tuple": lambda found: [*found[:2], found[2][0]],
    r"3 requests, the first \('fjhi'\): it raised ZeroDivisionError: division by zero; mend": lambda found: 1 / 0,
}


@pytest.mark.parametrize("message", WRONG)
def test_a_wrong_answer(message):
    with pytest.raises(EngineError, match=message) as caught:
        made(lambda policy: Returning(policy, WRONG[message])).generate(REQUESTS)
    assert "\n" not in str(caught.value)


def test_a_call_that_hangs_is_given_up():
    forever = threading.Event()
    engine = made(lambda policy: Returning(policy, lambda _: forever.wait()), deadline=0.2)
    for _ in range(2):
        with pytest.raises(EngineError, match=r"the first \('fjhi'\): no answer within 0.2 s; .* rollouts.deadline"):
            engine.generate(REQUESTS)
    engine.close()
    forever.set()


def test_a_function_that_returns_no_engine():
    with pytest.raises(EngineError, match=r"rollouts: engine mine: returned a list, which has no generate\(\)"):
        made(lambda policy: [])


def test_a_long_prompt_is_shortened():
    requests = asked([[5] * 30 + [6] * 30], 1, Sampling(max_new_tokens=6), [1])
    with pytest.raises(EngineError, match=r"a request \('f{20}…g{19}'\): it raised"):
        made(lambda policy: Returning(policy, lambda _: 1 / 0)).generate(requests)


def test_a_guide_refuses_a_users_engine():
    choice, function = EngineChoice(engine="mine.py:mine"), Bound(Honest, "mine", "rollouts")
    with pytest.raises(
        EngineError, match="rollouts: a guide needs every token's logits, which mine does not give; use the local"
    ):
        engine_for(tiny_policy(), choice, function, guide=object())
