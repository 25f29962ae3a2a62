"""Engines that score given tokens: the policy's own, vLLM's server as a teacher, and a user's."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from engines import local
from fake_vllm import FakeVllm
from stubs import Letters, policy_of, tiny_policy

from rlpost import ranks
from rlpost.engine import vllm_client
from rlpost.engine.api import ScoringEngine, TopTokens
from rlpost.engine.divided import DividedScoringEngine
from rlpost.engine.door import frozen_scoring_engine, scoring_engine
from rlpost.engine.local import LocalEngine
from rlpost.engine.params import ScoringChoice
from rlpost.engine.top_tokens import actions_of, by_group, joined, top_tokens
from rlpost.engine.vllm_teacher import vocabulary_probe
from rlpost.errors import EngineError, RecipeError
from rlpost.policy.policy import Policy
from rlpost.policy.vocabulary import Vocabulary
from rlpost.types import Completion, Group
from rlpost.usercode.binding import bind_engine, functions_in
from rlpost.usercode.bound import Bound

A, E = True, False
"""An action of the policy's, and a token of the environment's."""
GROUPS = [
    Group([5, 9, 7], [Completion([1, 2, 3, 30], [A, A, E, A]), Completion([8], [A])]),
    Group([4], [Completion([6, 6], [E, E]), Completion([61, 0, 2], [A, E, E])]),
    Group([11, 12], []),
    Group([11, 12], [Completion([13, 14, 15, 16, 17], [A] * 5)]),
]
N = 10


@pytest.fixture(scope="module")
def policy() -> Policy:
    return tiny_policy(eos=3)


@torch.no_grad()
def one_by_one(policy: Policy, temperature: float = 1.0) -> tuple[torch.Tensor, torch.Tensor]:
    """[N, V] log-probabilities where each action was taken, each from a row that ends there; and [N] the actions."""
    found, actions = [], []
    for group in GROUPS:
        for c in group.completions:
            for at in np.flatnonzero(c.action):
                before = Group(group.prompt, [Completion(c.ids[:at], [A] * at)])
                found.append(policy.next_logits(policy.batch([before]))[0])
                actions.append(int(c.ids[at]))
    return (torch.stack(found) / temperature).log_softmax(-1), torch.tensor(actions)


def assert_right(found: TopTokens, policy: Policy, k: int, temperature: float = 1.0) -> None:
    logp_NV, action_N = one_by_one(policy, temperature)
    assert [x.dtype for x in (found.ids_NK, found.logp_NK, found.logp_N)] == [torch.int64] + [torch.float32] * 2
    assert found.ids_NK.shape == found.logp_NK.shape == (N, k)
    torch.testing.assert_close(found.logp_NK, logp_NV.topk(k).values, atol=1e-5, rtol=0)
    assert found.ids_NK.tolist() == logp_NV.topk(k).indices.tolist()
    torch.testing.assert_close(found.logp_N, logp_NV.gather(1, action_N[:, None])[:, 0], atol=1e-5, rtol=0)


@pytest.mark.parametrize(("k", "temperature"), [(5, 1.0), (64, 0.6), (0, 2.0)])
def test_a_policy_scores_as_a_row_that_ends_at_each_action_does(policy, k, temperature):
    engine = frozen_scoring_engine(policy)
    assert isinstance(engine, LocalEngine)
    assert_right(engine.score(GROUPS, k, temperature), policy, k, temperature)


def test_passes_and_tiles_do_not_change_what_it_says(policy, monkeypatch):
    monkeypatch.setattr("rlpost.policy.logprobs.LOGITS_AT_ONCE", 64 * 4 * 3)  # three actions a tile
    assert_right(top_tokens(policy, GROUPS, 4, budget=6), policy, 4)
    padded = policy_of(tiny_policy().model, flat=False)
    assert_right(top_tokens(padded, GROUPS, 4), padded, 4)


def test_scoring_leaves_the_mode_of_training(policy):
    policy.train()
    assert len(top_tokens(policy, GROUPS, 1).logp_N) == N
    assert policy.training
    policy.eval()
    assert [x.shape for x in vars(top_tokens(policy, [], 3)).values()] == [(0, 3), (0, 3), (0,)]


def knowing(policy: Policy, tokens: set[int]) -> Policy:
    known = SimpleNamespace(get_vocab=lambda: {str(i): i for i in tokens})
    return Policy(policy.model, Letters(3), flat=True, known=Vocabulary(known, 64)).eval()


def test_ids_without_a_token_are_never_among_the_likeliest(policy):
    cut = knowing(policy, {i for i in range(60) if i != 7})
    few = [Group([5, 9], [Completion([1, 2], [A, A])])]
    found = top_tokens(cut, few, 59)
    assert found.ids_NK.sort(1).values.tolist() == [[i for i in range(60) if i != 7]] * 2
    torch.testing.assert_close(found.logp_NK.exp().sum(1), torch.ones(2))
    with pytest.raises(EngineError, match="the 60 likeliest tokens of 59: ask for 0 to 59"):
        top_tokens(cut, few, 60)
    assert vocabulary_probe(cut, 100).tolist() == [i for i in range(60) if i != 7]
    assert vocabulary_probe(cut, 3).tolist() == [0, 30, 59]


@pytest.mark.parametrize(
    ("k", "temperature", "message"), [(65, 1.0, "65 likeliest"), (-1, 1.0, "the -1"), (2, 0.0, "give one above 0")]
)
def test_what_cannot_be_asked(policy, k, temperature, message):
    with pytest.raises(EngineError, match=message):
        local(policy).score(GROUPS, k, temperature)


def test_an_engine_without_weights_scores_nothing(policy):
    with pytest.raises(EngineError, match="update_weights first"):
        LocalEngine(policy).score(GROUPS, 2)


# vLLM's server


@pytest.fixture
def teacher() -> Policy:
    torch.manual_seed(5)
    policy = tiny_policy(eos=3)
    with torch.no_grad():
        for p in policy.parameters():
            p.add_(0.3 * torch.randn_like(p))
    return policy


@pytest.fixture
def server(teacher) -> Iterator[FakeVllm]:
    with FakeVllm(teacher) as fake:
        yield fake


@pytest.fixture(autouse=True)
def _at_once(monkeypatch):
    monkeypatch.setattr(vllm_client, "BACKOFF", 0.001)


def served(policy: Policy, *servers: FakeVllm, k: int = 6, **more: Any) -> ScoringEngine:
    return scoring_engine(policy, ScoringChoice(urls=[f"{s.url}/" for s in servers], **more), k)


def test_a_server_scores_with_its_own_model_and_is_given_nothing(policy, teacher, server):
    engine = served(policy, server)
    server.requests.clear()
    assert_right(engine.score(GROUPS, 6), teacher, 6)
    assert len(server.requests) == 4  # those with an action
    assert [r["prompt"] for r in server.requests if len(r["prompt"]) == 2] == [[4, 61]]  # as far as the last action
    assert_right(engine.score(GROUPS, 0), teacher, 0)
    assert_right(engine.score(GROUPS, 20), teacher, 20)
    assert [x.shape for x in vars(engine.score([], 3)).values()] == [(0, 3), (0, 3), (0,)]
    engine.close()
    assert set(server.paths) == {"/v1/models", "/detokenize", "/v1/completions"}
    assert not isinstance(engine, LocalEngine)
    assert not hasattr(engine, "update_weights")


def test_rows_are_shared_among_servers_and_answers_come_in_order(policy, teacher, server):
    with FakeVllm(teacher, name="other") as other:
        engine = served(policy, server, other)
        for fake in (server, other):
            fake.requests.clear()
            fake.together = 2  # answered from the last to the first
        assert_right(engine.score(GROUPS, 6), teacher, 6)
        assert [len(s.requests) for s in (server, other)] == [2, 2]
        assert {r["model"] for r in other.requests} == {"other"}
        engine.close()


def test_a_server_that_has_several_models_is_asked_for_the_one_that_is_named(policy, teacher, server):
    server.models["tutor"] = policy
    engine = served(policy, server, served="tutor")
    assert_right(engine.score(GROUPS, 3), policy, 3)
    engine.close()


def changed(**fields: Any) -> Callable[[Any], Any]:
    def change(answer: Any) -> Any:
        answer[1]["choices"][0] |= fields
        return answer

    return change


FAILURES = {
    "fails": (lambda _: (500, {"error": {"message": "EngineCore"}}), "it failed: EngineCore"),
    "breaks off": (lambda _: (200, None), "no answer"),
    "nothing": (lambda _: (200, {}), "another form"),
    "other tokens": (changed(prompt_token_ids=[1]), "scores of other tokens than it was sent"),
    "too few": (changed(prompt_logprobs=[None]), "scores of 1 tokens, and the row has 4"),
    "without": (changed(prompt_logprobs=[None] * 4), "no score of token 3 of a row"),
    "short": (changed(prompt_logprobs=[{"8": {"logprob": -1.0}}] * 4), "1 likeliest tokens, not 6"),
}


@pytest.mark.parametrize(("failure", "message"), FAILURES.values(), ids=FAILURES)
def test_what_is_no_answer_is_asked_for_again_and_at_last_told(policy, teacher, server, failure, message):
    engine = served(policy, server, retries=1)
    groups = [Group([5, 9, 7], [Completion([8], [A])])]
    expected = engine.score(groups, 6)
    server.failures.append(failure)
    assert torch.equal(engine.score(groups, 6).logp_NK, expected.logp_NK)
    server.failures.extend([failure] * 2)
    with pytest.raises(EngineError, match=message) as told:
        engine.score(groups, 6)
    assert str(told.value).startswith(f"teacher: {server.url}: ")
    assert "(tried 2 times); the same command goes on" in str(told.value)
    engine.close()


def spoilt(answer: Any, change: Callable[[dict[str, Any]], None]) -> Any:
    for place in answer[1]["choices"][0]["prompt_logprobs"][1:]:
        change(place)
    return answer


def to_logits(place: dict[str, Any]) -> None:
    for about in place.values():
        about["logprob"] = max(-0.01, about["logprob"])


MEETINGS = {
    "other tokens": (
        lambda fake: setattr(fake.models["policy"], "tokenizer", SimpleNamespace(decode=lambda _: "what")),
        'another tokenizer: .* is "what" to it, and here it is "abc',
    ),
    "one other token": (
        lambda fake: setattr(
            fake.models["policy"],
            "tokenizer",
            SimpleNamespace(decode=lambda ids: Letters(3).decode([*ids[:50], 9, *ids[51:]])),
        ),
        r'… is "\[49\]j\[51\].* to it, and here it is "\[49\]\[50\]\[51\]',
    ),
    "fewer logprobs": (lambda fake: setattr(fake, "max_logprobs", 5), "greater than max allowed: 5.*--max-logprobs 6"),
    "logits": (
        lambda fake: fake.failures.append(lambda answer: spoilt(answer, to_logits)),
        "probabilities that sum to .*; give log-probabilities, not logits",
    ),
    "more tokens": (
        lambda fake: fake.failures.append(
            lambda answer: spoilt(answer, lambda place: place.update({"64": {"logprob": 0.0}}))
        ),
        r"token 64, and the vocabulary has none such \(64 ids\)",
    ),
    "minus infinity": (
        lambda fake: fake.failures.append(
            lambda answer: spoilt(answer, lambda place: [p.update(logprob=-9999.0) for p in place.values()])
        ),
        "a log-probability of -inf",
    ),
    "short rows": (lambda fake: setattr(fake, "positions", 2), "takes no rows"),
    "other routes": (lambda fake: setattr(fake, "_get_v1_models", lambda _: (404, {})), "is no server of vLLM"),
}


@pytest.mark.parametrize(("setting", "message"), MEETINGS.values(), ids=MEETINGS)
def test_a_server_that_cannot_be_the_teacher_is_refused_when_it_is_met(policy, server, setting, message):
    setting(server)
    with pytest.raises(EngineError, match=message) as told:
        served(policy, server, retries=0)
    assert "\n" not in str(told.value)


def test_every_answer_is_looked_at(policy, server):
    engine = served(policy, server)
    server.failures.append(lambda answer: spoilt(answer, to_logits))
    with pytest.raises(EngineError, match=r"^teacher: vLLM gave probabilities that sum to"):
        engine.score(GROUPS, 6)
    engine.close()


def test_a_smaller_vocabulary_is_noticed_by_its_last_token(policy, server):
    server.models["policy"] = knowing(policy, set(range(63)))
    with pytest.raises(EngineError, match=r"does not score the policy's tokens .*Token id 63 is out of vocabulary"):
        served(policy, server)


def test_a_server_that_is_not_there_is_told_with_its_command(policy):
    chosen = ScoringChoice(urls=["http://127.0.0.1:9"], retries=0)
    with pytest.raises(EngineError, match=r"http://127\.0\.0\.1:9: no answer .*; start it with: vllm serve TEACHER"):
        scoring_engine(policy, chosen, 2)


def test_a_server_scores_at_temperature_1_alone_and_rows_that_fit(policy, server):
    engine = served(policy, server)
    with pytest.raises(EngineError, match=r"teacher: temperature: vLLM scores given tokens at temperature 1, not 0\.5"):
        engine.score(GROUPS, 2, 0.5)
    whole = Group([1] * 20, [Completion([2] * 11, [A] * 11)])
    assert len(engine.score([whole], 2).logp_N) == 11
    with pytest.raises(EngineError, match="of 32 tokens, and the server scores at most 31; start it with a larger"):
        engine.score([Group([1] * 21, whole.completions)], 2)
    engine.close()


# A user's engine


class Teacher:
    """Scores with a policy of its own, but for what `spoil` does."""

    def __init__(self, policy: Policy, spoil: Callable[[TopTokens], Any]) -> None:
        self.policy, self.spoil, self.closed = policy, spoil, False

    def score(self, groups, k, temperature):
        return self.spoil(top_tokens(self.policy, groups, k, temperature))

    def close(self):
        self.closed = True


def users(policy: Policy, make: Callable[[Policy], Any], deadline: float = 30.0) -> ScoringEngine:
    chosen = ScoringChoice(engine="mine.py:mine", deadline=deadline)
    return scoring_engine(policy, chosen, 4, Bound(make, "mine", "teacher"), "teacher")


def test_what_a_users_engine_says_is_passed_on(policy):
    def plain(found: TopTokens) -> Any:  # arrays, as other libraries give them
        return SimpleNamespace(
            ids_NK=found.ids_NK.int().numpy(), logp_NK=found.logp_NK.double().numpy(), logp_N=found.logp_N.numpy()
        )

    own = Teacher(policy, plain)
    engine = users(policy, lambda _: own)
    assert_right(engine.score(GROUPS, 4, 0.7), policy, 4, 0.7)
    engine.close()
    assert own.closed


SPOILT: dict[str, Callable[[TopTokens], Any]] = {
    "a dict; return rlpost.engine.api.TopTokens": lambda _: {},
    r"ids_NK of shape \(9, 4\); for 10 actions and k=4 return \(10, 4\)": lambda t: replace(t, ids_NK=t.ids_NK[1:]),
    r"logp_NK of shape \(10, 3\)": lambda t: replace(t, logp_NK=t.logp_NK[:, 1:]),
    r"logp_N of shape \(10, 1\); for 10 actions and k=4 return \(10,\)": lambda t: replace(t, logp_N=t.logp_N[:, None]),
    "ids_NK of torch.float32; return int64": lambda t: replace(t, ids_NK=t.ids_NK.float()),
    "token 64, and the vocabulary has none such": lambda t: replace(t, ids_NK=t.ids_NK + 64 - t.ids_NK.max()[None]),
    "token -1": lambda t: replace(t, ids_NK=t.ids_NK - t.ids_NK.min() - 1),
    "a log-probability of nan": lambda t: replace(t, logp_N=t.logp_N * float("nan")),
    "a log-probability of 0.5": lambda t: replace(t, logp_N=torch.full((N,), 0.5)),
    "a log-probability of -inf": lambda t: replace(t, logp_NK=t.logp_NK.clone().fill_(-torch.inf)),
    "not in falling order": lambda t: replace(t, logp_NK=t.logp_NK.flip(1)),
    "the same token twice": lambda t: replace(t, ids_NK=t.ids_NK[:, :1].repeat(1, 4)),
    "sum to 3.96": lambda t: replace(t, logp_NK=torch.full((N, 4), -0.01)),
    "score each where it was taken": lambda t: replace(t, logp_N=t.logp_N.roll(1)),
}


@pytest.mark.parametrize("message", SPOILT)
def test_what_is_wrong_with_a_users_scores_is_told_in_a_line(policy, message):
    engine = users(policy, lambda p: Teacher(p, SPOILT[message]))
    with pytest.raises(EngineError, match=rf"^teacher: engine mine: scoring 4 groups: it gave .*{message}") as told:
        engine.score(GROUPS, 4)
    assert "\n" not in str(told.value)
    engine.close()


def test_an_action_beyond_the_likeliest_is_no_likelier_than_they_are(policy):
    outside = int(one_by_one(policy)[0][0].argmin())
    groups = [Group([5, 9, 7], [Completion([outside], [A])])]
    found = users(policy, lambda p: Teacher(p, lambda t: t)).score(groups, 4)
    assert not (found.ids_NK == outside).any()
    too_likely = users(policy, lambda p: Teacher(p, lambda t: replace(t, logp_N=t.logp_NK[:, 0])))
    with pytest.raises(
        EngineError, match=f"for action 0, token {outside}, and among the likeliest tokens there another"
    ):
        too_likely.score(groups, 4)


def test_a_users_engine_needs_no_weights_and_must_score(policy):
    with pytest.raises(EngineError, match=r"returned a SimpleNamespace, which has no score\(\); return an object with"):
        users(policy, lambda _: SimpleNamespace(close=lambda: None))
    failing = users(policy, lambda p: Teacher(p, lambda _: 1 / 0))
    with pytest.raises(EngineError, match="scoring 4 groups: it raised ZeroDivisionError: division by zero; mend"):
        failing.score(GROUPS, 4)


def test_tokens_of_an_environment_are_no_actions(policy):
    assert actions_of(GROUPS).tolist() == one_by_one(policy)[1].tolist() == [1, 2, 30, 8, 61, 13, 14, 15, 16, 17]
    assert actions_of([]).dtype is torch.int64


# Recipes and ranks

REFUSED = {
    "urls: missing - start a server": {},
    r"urls\[0\]: 'localhost' is no address": {"urls": ["localhost"]},
    "args: is for file.py:function": {"urls": ["http://x"], "args": {"a": 1}},
    "engine: local would score with a model of the run": {"engine": "local"},
    "engine: vllm would": {"engine": "vllm"},
    "urls: is for vllm_server, not for t.py:t": {"engine": "t.py:t", "urls": ["http://x"]},
    "served: is for": {"engine": "t.py:t", "served": "x"},
    "retries: is for": {"engine": "t.py:t", "retries": 1},
}


@pytest.mark.parametrize("message", REFUSED)
def test_what_cannot_be_right_in_a_recipe(message):
    (problem,) = ScoringChoice(**REFUSED[message]).problems("stages.distill.teacher")
    with pytest.raises(AssertionError, match=f"^stages.distill.teacher.{message}"):
        raise AssertionError(problem)


def test_a_temperature_that_a_server_cannot_score_at():
    chosen, key = ScoringChoice(urls=["http://x"]), "sampling.temperature"
    assert list(chosen.unlike_vllm(1.0, key)) == []
    (problem,) = chosen.unlike_vllm(0.7, key)
    assert problem.startswith("sampling.temperature: vLLM scores given tokens at temperature 1, not 0.7 - set it to 1")
    assert list(ScoringChoice(engine="t.py:t").unlike_vllm(0.7, key)) == []
    assert list(ScoringChoice(urls=["http://x"]).problems("teacher")) == []


def test_a_users_engine_is_found_in_its_file(policy, tmp_path: Path):
    (tmp_path / "t.py").write_text("def tutor(policy, *, size):\n    return size\n", "utf-8")
    chosen = ScoringChoice(engine="t.py:tutor", args={"size": 3})
    (named,) = functions_in(chosen, "teacher")
    assert (named[0].fn, named[2]) == ("t.py:tutor", "teacher")
    bound = bind_engine(chosen, "teacher", tmp_path)
    assert bound is not None
    assert bound(policy) == 3
    with pytest.raises(RecipeError, match=r"teacher\.args\.size: missing"):
        bind_engine(ScoringChoice(engine="t.py:tutor"), "teacher", tmp_path)


def test_ranks_score_a_share_each(policy, monkeypatch):
    whole = local(policy).score(GROUPS, 5)
    of_group = {id(g): part for g, part in zip(GROUPS, by_group(whole, GROUPS), strict=True)}
    asked: list[int] = []

    class Noting:
        def score(self, groups, k, _):
            asked.append(len(groups))
            return joined([of_group[id(g)] for g in groups], k)

        def close(self):
            asked.append(-1)

    engine = DividedScoringEngine(Noting())
    monkeypatch.setattr(ranks, "_count", 2)
    monkeypatch.setattr(ranks, "together", lambda work: [work()])
    parts = []
    for index in (0, 1):
        monkeypatch.setattr(ranks, "_index", index)
        parts.append(engine.score(GROUPS, 5))
    assert asked == [1, 3]
    for name, x in vars(whole).items():
        assert torch.equal(torch.cat([getattr(p, name) for p in parts]), x)
    assert len(engine.score([], 5).logp_N) == 0
    engine.close()
    assert asked == [1, 3, -1]
