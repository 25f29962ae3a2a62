"""Episodes of several turns: what is an action, what is not, and where an episode ends."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from engines import local
from stubs import LETTERS, tiny_policy

from rlpost.engine.params import Sampling
from rlpost.environments.loop import collect_turns
from rlpost.errors import RewardError
from rlpost.objectives import Ragged
from rlpost.objectives.credit import gae, return_to_go, reward_on_last_action
from rlpost.policy.score import logprobs
from rlpost.train.experience import Experience
from rlpost.types import Group, completions
from rlpost.usercode.bound import Bound

CODEC = SimpleNamespace(ids=lambda text, reward_on_last_action: tuple(LETTERS.index(c) for c in text))
PROMPTS = [Group((1, 2, 3), (), {"n": 1}), Group((4, 5), (), {"n": 2})]


def echo(text, turns, example):
    """Twice "yz", then silence."""
    return "yz" if len(turns) < 3 else None


def episodes(environment=echo, n=4, turns=3, policy=None, budget=14, seed=5, prompts=PROMPTS, **more):
    policy = policy or tiny_policy(eos=0)
    engine = local(policy)
    sampling = Sampling(max_new_tokens=budget, stop=["a", "b", "c", "d", "e", "f"])
    settings = {"environment": Bound(environment, "environment"), "turns": turns, "max_positions": 64, **more}
    return collect_turns(engine, CODEC, prompts, n, sampling, seed, **settings), policy


def test_replies_are_read_and_are_no_actions():
    groups, _ = episodes()
    heard = 0
    for c in completions(groups):
        text = "".join("*" if acted else LETTERS[i] for i, acted in zip(c.ids, c.action, strict=True))
        assert set(text) <= {"*", "y", "z"}
        assert text.replace("*", "") in ("", "yz", "yzyz")
        assert len(c.logprobs) == c.actions
        heard += text.count("yz")
    assert heard > 5


def test_the_policy_gives_every_action_the_log_probability_it_was_sampled_with():
    groups, policy = episodes()
    sampled = [x for c in completions(groups) for x in c.logprobs]
    assert logprobs(policy, groups).tolist() == pytest.approx(sampled, abs=1e-5)


def test_an_episode_does_not_depend_on_those_beside_it():
    whole, policy = episodes(n=4)
    fewer, _ = episodes(n=2, policy=policy)
    alone, _ = episodes(n=4, policy=policy, prompts=PROMPTS[:1])
    assert [tuple(c.ids) for c in fewer[0].completions] == [tuple(c.ids) for c in whole[0].completions[:2]]
    assert [tuple(c.ids) for c in alone[0].completions] == [tuple(c.ids) for c in whole[0].completions]
    others, _ = episodes(n=4, policy=policy, seed=6)
    assert not any(a.same(b) for a, b in zip(others, whole, strict=True))


def test_turns_differ_from_one_another():
    """Were every turn drawn with the same numbers, a model that knows only its last token would repeat itself."""
    groups, _ = episodes(n=8)
    both = [turns for c in completions(groups) if len(turns := turns_of(c)) > 1]
    assert len(both) > 3
    assert any(first != second[: len(first)] for first, second, *_ in both)


def turns_of(completion):
    """The ids of each of the model's turns."""
    turns, speaking = [], False
    for i, acted in zip(completion.ids, completion.action, strict=True):
        if acted and not speaking:
            turns.append([])
        if acted:
            turns[-1].append(i)
        speaking = acted
    return turns


def test_the_end_is_the_environments_the_models_or_the_budgets():
    groups, policy = episodes(lambda text: None)
    assert {c.finish for c in completions(groups)} <= {"stop", "length"}
    assert all(all(c.action) for c in completions(groups))
    one_turn, _ = episodes(turns=1, policy=policy)
    assert all(all(c.action) for c in completions(one_turn))
    short, _ = episodes(budget=3, policy=policy)
    assert all(len(c.ids) <= 3 for c in completions(short))
    assert "length" in {c.finish for c in completions(short)}
    # Where a reply leaves no room for another turn, it is not said.
    told, _ = episodes(lambda text: "y" * 20, policy=policy)
    assert all(all(c.action) for c in completions(told))
    # The model's positions are a limit too: 3 of the prompt, 4 more.
    narrow, _ = episodes(policy=policy, max_positions=7)
    assert all(len(g.prompt) + len(c.ids) <= 7 for g in narrow for c in g.completions)


def test_the_environment_sees_its_turns_and_the_row():
    seen = []

    def watching(text, turns, example):
        seen.append((text, list(turns), example["n"]))
        return

    groups, _ = episodes(watching)
    stopped = [c for c in completions(groups) if c.finish == "stop"]
    assert len(seen) == len(stopped) > 0
    assert all(turns == [text] for text, turns, _ in seen)
    assert {n for *_, n in seen} == {1, 2}
    assert sorted(text for text, *_ in seen) == sorted(c.text for c in stopped)


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        (lambda text: 1 / 0, "environment: raised ZeroDivisionError: division by zero, on the turn"),
        (lambda text: 7, "environment: returned int; return text, or None to end the episode"),
    ],
)
def test_what_is_wrong_with_an_environment_is_told_in_a_line(environment, message):
    with pytest.raises(RewardError, match=message) as caught:
        episodes(environment)
    assert "\n" not in str(caught.value)


def test_credit_crosses_the_gap():
    """The last action of the first turn is followed by the first of the second: GAE(1, 1) + V is the return."""
    groups, _ = episodes()
    rows = Experience(tuple(groups)).rows
    assert rows.lengths_S.tolist() == [c.actions for c in completions(groups)]
    reward_N = reward_on_last_action(torch.arange(8.0, dtype=torch.float64), rows)
    value_N = torch.linspace(-1, 1, rows.actions, dtype=torch.float64)
    advantage_N, _ = gae(reward_N, value_N, rows, gamma=1.0, gae_lambda=1.0)
    assert torch.allclose(advantage_N + value_N, return_to_go(reward_N, rows))
    one = Ragged([4])
    delta, _ = gae(torch.tensor([0.0, 0, 0, 1]), torch.tensor([0.1, 0.2, 0.5, 0.7]), one, gamma=1.0, gae_lambda=0.0)
    assert delta.tolist() == pytest.approx([0.1, 0.3, 0.2, 0.3])
