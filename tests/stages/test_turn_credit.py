"""Credit over turns in grpo and ppo, against what the saved rollouts say by hand."""

from __future__ import annotations

from itertools import groupby
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_recipes import GRPO, MODEL, PPO, SFT, base, metrics, policy, rollouts, run

from rlpost.data.step_split import split_steps, step_texts
from rlpost.policy.value_head import Values
from rlpost.recipe.specs.ppo import Ppo
from rlpost.stages import ppo
from rlpost.stages.advantage import anchors, steps_in
from rlpost.stages.params import Critic
from rlpost.train.experience import Experience
from rlpost.types import Completion, Group

OWN = '''\
"""Rewards by step, and of the whole."""


def worth(completion, steps):
    return [sum(0.5 if c < "5" else -0.3 for c in step if c.isdigit()) for step in steps]


def ones(completion):
    return completion.text.count("1")


def short(completion):
    return float(len(completion.text) < 5)
'''
TREE = {"fn": "gate", "of": [{"fn": "own.py:short"}, {"fn": "sum", "of": [{"fn": "own.py:worth", "weight": 2.0}]}]}
REWARDS = {
    "flat": [{"fn": "own.py:worth"}, {"fn": "own.py:ones", "weight": 0.5}],
    "tree": [TREE, {"fn": "own.py:ones", "weight": 0.5}],
}
"""By step twice: from the list, and through nodes."""
TURNS: dict[str, Any] = {
    "environment": {"fn": "calculator.reply"},
    "data": {"problems": {"task": {"fn": "calculator.train"}, "limit": 64}},
    "sampling": {"max_new_tokens": 12, "stop": ["1", "2", "3", "4", "="]},
    "max_length": 24,
    "rewards": [{"fn": "rewards.py:digits", "args": {"digit": "0"}}],
}
CALCULATOR = {**MODEL, "tokenizer": {"kind": "characters", "alphabet": "0123456789+=?;"}}
OFF: dict[str, Any] = {"steps": 1, "whiten": False, "gamma": 0.9, "gae_lambda": 0.8}


@pytest.fixture
def experiences(monkeypatch) -> list[Experience]:
    """What every step of ppo from now on learns from."""
    kept: list[Experience] = []
    make = ppo.assemble

    def record(*args) -> Experience:
        kept.append(make(*args))
        return kept[-1]

    monkeypatch.setattr(ppo, "assemble", record)
    return kept


def steps_of(folder: Path, stage: str, end: str) -> list[tuple[list[int], list[float]]]:
    """Actions and rewards of each step of the first step's completions."""
    tokenizer = policy(base(folder)).tokenizer
    ends = (tokenizer.eos_token_id,)
    found = []
    for row in rollouts(folder, stage, 1):
        plain = tuple(Completion(c["ids"], c["action"], c["text"]) for c in row["completions"])
        for c in split_steps(Group(row["prompt"], plain), tokenizer, end, ends).completions:
            reward = [
                sum(0.5 if x < "5" else -0.3 for x in text if x.isdigit()) for text in step_texts(c, tokenizer, ends)
            ]
            reward[-1] += 0.5 * c.text.count("1")
            found.append((c.steps.tolist(), reward))
    return found


def turns_of(folder: Path, stage: str) -> list[tuple[list[int], list[float], str]]:
    """Actions and rewards of each turn of the first step's episodes, and how they ended."""
    found = []
    for row in rollouts(folder, stage, 1):
        for c in row["completions"]:
            sizes = [len(list(run)) for acted, run in groupby(c["action"]) if acted]
            found.append((sizes, [0.0] * (len(sizes) - 1) + [c["reward"]], c["finish"]))
    return found


def gae_by_hand(reward: list[float], value: list[float], after: float = 0.0) -> list[float]:
    delta = [r + 0.9 * b - a for r, a, b in zip(reward, value, [*value[1:], after], strict=True)]
    return [sum((0.9 * 0.8) ** k * d for k, d in enumerate(delta[t:])) for t in range(len(delta))]


def starts_of(sizes: list[int]) -> list[int]:
    return [sum(sizes[:k]) for k in range(len(sizes))]


@pytest.mark.parametrize("credit", ["token", "turn"])
def test_ppo_places_rewards_at_the_ends_of_steps(tmp_path, credit, experiences):
    (tmp_path / "own.py").write_text(OWN, "utf-8")
    stage = {**PPO, **OFF, "credit": credit, "step_end": "4", "rewards": REWARDS["flat"]}
    run(tmp_path, {"ppo": stage})
    (experience,), (line,) = experiences, metrics(tmp_path, "ppo")
    found = steps_of(tmp_path, "ppo", "4")
    assert any(len(sizes) > 1 and max(sizes) > 1 for sizes, _ in found)
    value = torch.split(experience["old_value"], [sum(sizes) for sizes, _ in found])
    advantage, squares = [], []
    for (sizes, reward), own in zip(found, (v.tolist() for v in value), strict=True):
        if credit == "token":
            placed = [x for n, r in zip(sizes, reward, strict=True) for x in [0.0] * (n - 1) + [r]]
            each = gae_by_hand(placed, own)
            squares += [a * a for a in each]
            advantage += each
        else:
            each = gae_by_hand(reward, [own[at] for at in starts_of(sizes)])
            squares += [a * a for a in each]
            advantage += [a for n, a in zip(sizes, each, strict=True) for _ in range(n)]
    assert experience["advantage"].tolist() == pytest.approx(advantage, abs=1e-5)
    returns = (experience["old_value"] + torch.tensor(advantage)).tolist()
    assert experience["returns"].tolist() == pytest.approx(returns, abs=1e-5)
    assert line["loss"] == pytest.approx(-sum(advantage) / len(advantage), abs=1e-5)
    assert line["value_loss"] == pytest.approx(sum(squares) / len(squares) / 2, rel=1e-4)


def test_a_turn_pays_for_its_kl_and_is_bootstrapped_where_it_was_cut(tmp_path, experiences, monkeypatch):
    values = []
    score = ppo.ValueHeadModel.score

    def recorded(self, *args):
        values.append(score(self, *args))
        return values[-1]

    monkeypatch.setattr(ppo.ValueHeadModel, "score", recorded)
    stage = {**PPO, **OFF, **TURNS, "credit": "turn", "kl": {"beta": 0.5}, "reference": "base"}
    run(tmp_path, {"sft": SFT, "ppo": {**stage, "on_truncation": "bootstrap"}}, model=CALCULATOR)
    (experience,), (line,), (value,) = experiences, metrics(tmp_path, "ppo"), values
    found = turns_of(tmp_path, "ppo")
    assert {end for *_, end in found} == {"stop", "length"}
    assert all(len(sizes) == 2 for sizes, *_ in found)
    lengths = [sum(sizes) for sizes, *_ in found]
    kl = torch.split(0.5 * (experience["old_logp"] - experience["reference"]), lengths)
    before = torch.split(value.before_N, lengths)
    advantage, starting = [], []
    for (sizes, reward, end), k, v, after in zip(found, kl, before, value.final_S.tolist(), strict=True):
        starts = starts_of(sizes)
        paid = [r - float(k[at : at + n].sum()) for r, n, at in zip(reward, sizes, starts, strict=True)]
        each = gae_by_hand(paid, [float(v[at]) for at in starts], after if end == "length" else 0.0)
        advantage += [a for n, a in zip(sizes, each, strict=True) for _ in range(n)]
        starting += [x for n, at in zip(sizes, starts, strict=True) for x in [float(v[at])] * n]
    assert experience["advantage"].tolist() == pytest.approx(advantage, abs=1e-5)
    assert experience["old_value"].tolist() == pytest.approx(starting, abs=1e-6)
    assert experience["turn_start"].sum() == sum(len(sizes) for sizes, *_ in found)
    assert line["value"] == pytest.approx(sum(starting) / len(starting), abs=1e-5)
    assert max(float(k.abs().max()) for k in kl) > 0.1


def test_the_critic_learns_where_turns_begin_and_nowhere_else():
    """Turns of 2 and 1 actions, and one of 2; each counts the same."""
    pair = Group((1,), (Completion((2, 3, 4), (True,) * 3), Completion((5, 6), (True,) * 2)))
    numbers = {"returns": [5, 5, 1, 3, 3], "old_value": [0, 0, 0, 0, 0], "turn_start": [1, 0, 1, 1, 0]}
    given = {name: torch.tensor(x, dtype=torch.float64) for name, x in numbers.items()}
    update = ppo.valued(Experience((pair,), given))
    assert update["weight"].tolist() == [1 / 3, 0, 1 / 3, 1 / 3, 0]
    value_N = torch.tensor([2.0, 70.0, 4.0, 6.0, 80.0], dtype=torch.float64, requires_grad=True)
    loss, line = ppo.critic_loss_of(Ppo(learning_rate=1.0, critic=Critic(clip=None)))(
        Values(value_N, torch.zeros(5), torch.zeros(2)), update
    )
    assert float(loss.detach()) == pytest.approx((3**2 + 3**2 + 3**2) / 6)
    loss.backward()
    assert value_N.grad.tolist() == pytest.approx([-1, 0, 1, 1, 0])
    assert line["value"].tolist() == [2, 2, 4, 6, 6]
    assert ppo.valued(Experience((pair,))).per_action == {}


def test_a_step_is_what_says_so_or_a_run_of_actions():
    told = Completion((1,) * 5, (True, True, False, True, True), steps=(1, 2, 1))
    runs = Completion((1,) * 5, (True, True, False, True, False))
    group = Group((1,), (told, Completion((1, 1), (False, False)), runs))
    found = steps_in([group])
    assert found.rows.lengths_S.tolist() == [4, 0, 3]
    assert found.rows_K.lengths_S.tolist() == [1, 2, 1, 2, 1]
    assert found.completion_K.tolist() == [0, 0, 0, 2, 2]


def test_states_are_alike_where_the_environment_wrote_the_same():
    def episode(*turns: tuple[int, ...], told: tuple[int, ...]) -> Completion:
        ids = [*turns[0], *told, *turns[1]]
        return Completion(ids, [True] * len(turns[0]) + [False] * len(told) + [True] * len(turns[1]))

    first = Group((1,), (episode((5,), (6,), told=(7, 8)), episode((9, 5), (6,), told=(7, 8))))
    second = Group((1,), (episode((5,), (6,), told=(7, 9)), episode((5,), (5, 6), told=(7,))))
    assert anchors([first, second]).tolist() == [0, 1, 0, 1, 0, 1, 0, 2]
    # Within a turn nothing is written: there only what came before can be the same.
    split = [Completion(ids, (True,) * 3, steps=(2, 1)) for ids in ((5, 6, 7), (5, 6, 8), (5, 7, 7))]
    assert anchors([Group((1,), split)]).tolist() == [0, 1, 0, 1, 0, 2]
    assert anchors([Group((1,), (Completion((), ()),))]).tolist() == []


@pytest.mark.slow
def test_a_completion_without_steps_is_one_turn(tmp_path, experiences):
    """Whose value is the prompt's."""
    run(tmp_path, {"ppo": {**PPO, **OFF, "credit": "turn", "gae_lambda": 0.3}})
    (experience,) = experiences
    starts = experience.rows.start_S
    assert experience["turn_start"].nonzero()[:, 0].tolist() == starts.tolist()
    reward = [c["reward"] for row in rollouts(tmp_path, "ppo", 1) for c in row["completions"]]
    assert experience["returns"][starts].tolist() == pytest.approx(reward, abs=1e-6)


def credited(folder: Path, credit: list[list[float]]) -> None:
    """The first step of grpo had these advantages, one a step; each is weighed with its own log-probabilities."""
    (line,) = metrics(folder, "grpo")
    assert line["loss"] == pytest.approx(-sum(sum(own) for own in credit) / len(credit), rel=1e-4)
    assert abs(line["loss"]) > 0.01


def by_step(folder: Path, sizes: list[list[int]]) -> list[list[float]]:
    """Summed log-probability of each step's actions."""
    every = [c for row in rollouts(folder, "grpo", 1) for c in row["completions"]]
    return [
        [sum(c["logprobs"][at : at + n]) for n, at in zip(own, starts_of(own), strict=True)]
        for c, own in zip(every, sizes, strict=True)
    ]


SUMMED: dict[str, Any] = {
    **GRPO,
    "steps": 1,
    "loss": {"fn": "policy_gradient"},
    "weight": "sequence_sum",
    "advantage": {"fn": "turn_leave_one_out"},
}


@pytest.mark.parametrize("rewards", ["tree", pytest.param("flat", marks=pytest.mark.slow)])
def test_a_turns_return_is_compared_with_the_others_from_the_same_turn_on(tmp_path, rewards):
    (tmp_path / "own.py").write_text(OWN, "utf-8")
    run(tmp_path, {"grpo": {**SUMMED, "step_end": "4", "rewards": REWARDS[rewards]}})
    found = steps_of(tmp_path, "grpo", "4")
    if rewards == "tree":
        texts = [c["text"] for row in rollouts(tmp_path, "grpo", 1) for c in row["completions"]]
        assert {len(text) < 5 for text in texts} == {True, False}
        for (_, reward), text in zip(found, texts, strict=True):
            last = 0.5 * text.count("1")
            reward[-1] -= last
            reward[:] = [2 * (len(text) < 5) * r for r in reward]
            reward[-1] += last
    to_go = [[sum(reward[t:]) for t in range(len(reward))] for _, reward in found]
    logp = by_step(tmp_path, [sizes for sizes, _ in found])
    credit = []
    for s, own in enumerate(to_go):
        group = to_go[s // 4 * 4 : s // 4 * 4 + 4]
        credit.append([])
        for t, x in enumerate(own):
            same = [other[t] for other in group if len(other) > t]
            credit[-1].append((x - (sum(same) - x) / max(len(same) - 1, 1)) * logp[s][t])
    assert len({len(own) for own in to_go}) > 1
    credited(tmp_path, credit)


@pytest.mark.slow
def test_the_state_of_a_turn_is_what_the_calculator_said(tmp_path):
    advantage = {"fn": "gigpo", "args": {"omega": 0.5, "std": False}}
    run(tmp_path, {"grpo": {**SUMMED, **TURNS, "prompts_per_step": 8, "advantage": advantage}}, model=CALCULATOR)
    rows = rollouts(tmp_path, "grpo", 1)
    found = turns_of(tmp_path, "grpo")
    logp = by_step(tmp_path, [sizes for sizes, *_ in found])
    credit, shared = [], 0
    for row in rows:
        total = [c["reward"] for c in row["completions"]]
        said = [[None] for _ in row["completions"]]
        for c, states in zip(row["completions"], said, strict=True):
            told = [i for i, acted in enumerate(c["action"]) if not acted]
            states += [tuple(c["ids"][i] for i in told)] if told else []
        for r, states in zip(total, said, strict=True):
            mean = sum(total) / len(total)
            credit.append([])
            for state in states:
                # The reward comes at the end, so an episode's return is the same from every turn on.
                same = [x for x, some in zip(total, said, strict=True) for other in some if other == state]
                shared += len(same) > 1 and state is not None
                credit[-1].append(r - mean + 0.5 * (r - sum(same) / len(same)))
    assert shared
    credited(tmp_path, [[a * x for a, x in zip(own, of, strict=True)] for own, of in zip(credit, logp, strict=True)])
