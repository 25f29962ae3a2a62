"""What is asked of vLLM for a completion, and which of its answers are taken."""

from __future__ import annotations

import math

import numpy as np
import pytest
from stubs import LETTERS, tiny_policy

from rlpost.engine.params import Sampling
from rlpost.engine.sampling import greedy
from rlpost.engine.vllm_requests import completion_of, sampling_params
from rlpost.errors import EngineError
from rlpost.types import Request

END = 25


@pytest.fixture(scope="module")
def policy():
    return tiny_policy(eos=END)


def asked(seed: int = 1, limit: int = 6, first: int = 0, **sampling) -> Request:
    return Request([5, 9], 4, Sampling(**sampling), seed, limit, first)


def ids(text: str) -> list[int]:
    return [END if x == "." else LETTERS.index(x) for x in text]


def answer(policy, text: str, finish: str, request: Request | None = None, logprobs=None):
    own = ids(text)
    return completion_of(
        own, [-1.0] * len(own) if logprobs is None else logprobs, finish, request or asked(), policy, 7, "rollouts"
    )


def test_everything_that_a_request_asks_for_is_said():
    sampling = {"temperature": 0.7, "top_k": 5, "top_p": 0.9, "stop": ["ab"]}
    found = sampling_params(asked(**sampling), 2, (END, 8))
    assert found.pop("seed") == sampling_params(asked(**sampling), 2, (END, 8))["seed"]
    assert found == {
        "n": 1,
        "temperature": 0.7,
        "top_k": 5,
        "top_p": 0.9,
        "min_p": 0.0,
        "max_tokens": 6,
        "stop_token_ids": [END, 8],
        "ignore_eos": True,
        "stop": ["ab"],
        "skip_special_tokens": False,
        "logprobs": 0,
    }


def test_seeds_depend_on_the_prompts_seed_and_the_number_alone_and_fit_a_server():
    every = {(s, n): sampling_params(asked(seed=s), n, ())["seed"] for s in (0, 1, 2**64 - 1) for n in range(50)}
    assert len(set(every.values())) == 150
    assert all(0 <= seed < 2**63 for seed in every.values())
    other = Request([1, 2, 3], 1, Sampling(temperature=0.5), 1, 9, first=3)
    assert sampling_params(other, 7, (1,))["seed"] == every[1, 7]


def test_greedy_tokens_are_not_filtered():
    request = Request([5], 1, greedy(Sampling(top_k=3, top_p=0.5, min_p=0.1)), 1)
    found = sampling_params(request, 0, ())
    assert [found[key] for key in ("temperature", "top_k", "top_p", "min_p")] == [0, 0, 1, 0]


def test_ids_without_a_token_are_not_drawn():
    assert sampling_params(asked(), 0, (), (62, 63))["logit_bias"] == {62: -100.0, 63: -100.0}
    assert math.exp(-100 / 2) * 1000 < 1e-18


@pytest.mark.parametrize(
    ("sampling", "line"),
    [
        ({"temperature": 0.001}, "sampling.temperature: vLLM takes 0.01 to 2, not 0.001 - use engine: local"),
        ({"temperature": 2.5}, "sampling.temperature: vLLM takes 0.01 to 2, not 2.5"),
        ({"top_p": 0.9, "min_p": 0.1}, "sampling.min_p: vLLM filters by it before top_p"),
    ],
)
def test_what_vllm_samples_otherwise_is_refused(sampling, line):
    with pytest.raises(EngineError, match=line):
        sampling_params(asked(**sampling), 0, ())


@pytest.mark.parametrize(
    ("text", "finish", "stop", "kept", "shown"),
    [
        ("abcdef", "length", [], "length", "abcdef"),
        ("abc.", "stop", [], "stop", "abc"),
        ("abc", "stop", ["bc"], "stop", "a"),
        ("ab.", "stop", ["</s>"], "stop", "ab"),
        ("abcdef", "length", ["cd"], "stop", "ab"),  # vLLM saw none
        ("abcde.", "length", [], "stop", "abcde"),
    ],
)
def test_an_answer_becomes_the_completion_that_the_local_engine_would_make(policy, text, finish, stop, kept, shown):
    found = answer(policy, text, finish, asked(stop=stop))
    assert (found.finish, found.text, found.weights_version) == (kept, shown, 7)
    assert found.logprobs.dtype == np.float32
    assert found.action.all()
    assert found.ids.tolist() == ids("abcd" if stop == ["cd"] else text)


@pytest.mark.parametrize(
    ("text", "finish", "logprobs", "line"),
    [
        ("abc", "length", None, "cut its completion at 3 of 6 tokens; raise max_model_len in rollouts.args"),
        ("abc", "stop", None, "ended its completion with 'abc', which has no stop string; use engine: local"),
        ("abc", "abort", None, "finish='abort'"),
        ("abc", None, None, "finish='none'"),
        ("abcdefg", "length", None, "of 7 tokens; its limit is 6"),
        ("a.bcde", "length", None, "goes on after an end token"),
        ("", "stop", None, "without a token"),
        ("abcdef", "length", [-1.0] * 5, "5 log-probabilities for 6 tokens"),
        ("ab.", "stop", [-1.0, math.nan, -1.0], "the model's logits are not numbers"),
        ("ab.", "stop", [-1.0, None, -1.0], "the model's logits are not numbers"),
        ("ab.", "stop", [-1.0, -math.inf, -1.0], "log-probability of -inf"),
        ("ab.", "stop", [-1.0, 0.5, -1.0], "log-probability of 0.5"),
    ],
)
def test_an_answer_to_something_else_is_refused(policy, text, finish, logprobs, line):
    with pytest.raises(EngineError, match=line) as error:
        answer(policy, text, finish, logprobs=logprobs)
    assert str(error.value).startswith("rollouts: ('fj'): ")
