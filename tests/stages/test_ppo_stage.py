"""PPO with a critic: what moves, what the first step is by hand, and how policy and critic go on together."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from moved import assert_only_the_policy_moved, assert_same_result, fail_after, keep_references
from tiny_recipes import (
    LORA,
    MODEL,
    PPO,
    PREFERENCES,
    SFT,
    base,
    group,
    jsonl,
    metrics,
    policy,
    rollouts,
    run,
    sha256,
    weights,
)
from torch import Tensor
from value_head_models import saved

from rlpost.policy.attention import use_attention
from rlpost.policy.policy import Policy
from rlpost.policy.score import logprobs
from rlpost.policy.value_head import ValueHeadModel, Values
from rlpost.recipe.specs.ppo import Ppo
from rlpost.stages import ppo
from rlpost.stages.params import Critic
from rlpost.train.experience import Experience
from rlpost.train.learner import Learner
from rlpost.types import Completion, Group

LORA_OR_NOT = pytest.mark.parametrize("lora", [(), (LORA,)], ids=["full", "lora"])
OF_THE_PROMPT = '''\
def small(completion, example):
    """Known before the first token of the completion."""
    return 2.0 * (example["prompt"] < "5")
'''


class Beginning(NamedTuple):
    """A stage's models before its first step."""

    policy: Policy
    critic: ValueHeadModel
    weights: dict[str, Tensor]
    """Copies."""

    def now(self) -> dict[str, Tensor]:
        """All weights of both, by what they belong to; a trunk that they share is the policy's."""
        named = {f"policy {n}": p for n, p in self.policy.causal_lm.named_parameters()}
        if self.critic.trunk is not self.policy:
            named |= {f"critic {n}": p for n, p in self.critic.trunk.causal_lm.named_parameters()}
        return named | {f"head {n}": p for n, p in self.critic.head.named_parameters()}

    def moved(self) -> set[str]:
        now = self.now()
        return {n for n, w in self.weights.items() if not torch.equal(w, now[n])}


@pytest.fixture
def beginnings(monkeypatch) -> list[Beginning]:
    """The models of every ppo stage from now on."""
    kept: list[Beginning] = []
    make = ppo.make_critic

    def record(policy: Policy, *args, **options) -> ValueHeadModel:
        critic = make(policy, *args, **options)
        kept.append(Beginning(policy, critic, {}))
        kept[-1].weights.update({n: p.detach().clone() for n, p in kept[-1].now().items()})
        return critic

    monkeypatch.setattr(ppo, "make_critic", record)
    return kept


@pytest.fixture
def experiences(monkeypatch) -> list[Experience]:
    """What every step from now on learns from."""
    kept: list[Experience] = []
    make = ppo.assemble

    def record(*args) -> Experience:
        kept.append(make(*args))
        return kept[-1]

    monkeypatch.setattr(ppo, "assemble", record)
    return kept


@LORA_OR_NOT
def test_the_reward_rises(tmp_path, lora):
    run(tmp_path, {"ppo": {**PPO, "steps": 12, "learning_rate": 2e-2, "table_every": 0}}, *lora)
    rewards = [line["reward"] for line in metrics(tmp_path, "ppo")]
    assert rewards[0] < 0.5
    assert sum(rewards[-3:]) / 3 > 3


@LORA_OR_NOT
@pytest.mark.parametrize("trunk", ["own", "frozen"])
def test_policy_and_critic_move_and_nothing_else(tmp_path, trunk, lora, beginnings, monkeypatch):
    references = keep_references(monkeypatch)
    stage = {**PPO, "steps": 2, "kl": {"beta": 0.01}, "critic": {**PPO["critic"], "trunk": trunk}}
    final = run(tmp_path, {"ppo": stage}, *lora)
    (begin,) = beginnings
    expected = {"head weight", "head bias"}
    if lora:
        acting = {"policy", "critic"} if trunk == "own" else {"policy"}
        expected |= {n for n in begin.weights if any(f".{name}.weight" in n for name in acting)}
        assert sum(".critic.weight" in n for n in begin.weights) == sum(".policy.weight" in n for n in begin.weights)
    else:
        expected |= {n for n in begin.weights if n.startswith("policy")}
        if trunk == "own":
            expected |= {n for n in begin.weights if n.startswith("critic")} - {"critic lm_head.weight"}
    assert begin.moved() == expected
    assert_only_the_policy_moved(tmp_path, "ppo", bool(lora))
    assert not any("critic" in name or "head.bias" in name for name in weights(final))
    start = policy(base(tmp_path))
    pairs = [group(start, r["prompt"], r["chosen"], r["rejected"]) for r in PREFERENCES]
    assert torch.allclose(references[0].logprobs(pairs), logprobs(start, pairs), atol=1e-6)


class Scored(NamedTuple):
    """One sampled completion as text files and plain forward passes have it."""

    reward: list[float]
    """Of each action, its KL included."""
    value: list[float]
    """Of the state before each action."""
    after: float
    """Of the state after the last token."""
    cut: bool
    gaps: int
    """Tokens that are no actions."""


def scored_by_hand(folder: Path, start: Path, head: Mapping[str, Tensor], beta: float) -> list[Scored]:
    """The first step's completions that have a reward, each computed alone by transformers' own forward."""
    plain, reference = (policy(p).causal_lm for p in (start, base(folder)))
    for model in (plain, reference):
        use_attention(model, "eager")
    found = []
    for row in rollouts(folder, "ppo", 1):
        for c in row["completions"]:
            if c["reward"] is None:
                continue
            ids = torch.tensor([[*row["prompt"], *c["ids"]]])
            with torch.no_grad():
                value = plain.base_model(ids).last_hidden_state[0] @ head["head weight"][0] + head["head bias"]
                logp = reference(ids).logits[0].log_softmax(-1)
            at = [len(row["prompt"]) + i for i, acted in enumerate(c["action"]) if acted]
            kl = [x - float(logp[i - 1, ids[0, i]]) for x, i in zip(c["logprobs"], at, strict=True)]
            reward = [-beta * x for x in kl]
            reward[-1] += c["reward"]
            values = [float(value[i - 1]) for i in at]
            gaps = len(c["ids"]) - len(at)
            found.append(Scored(reward, values, float(value[-1]), c["finish"] == "length", gaps))
    return found


def advantages_by_hand(c: Scored, gamma: float, gae_lambda: float, bootstrap: bool) -> list[float]:
    following = [*c.value[1:], c.after if bootstrap and c.cut else 0.0]
    delta = [r + gamma * after - v for r, after, v in zip(c.reward, following, c.value, strict=True)]
    return [sum((gamma * gae_lambda) ** k * d for k, d in enumerate(delta[t:])) for t in range(len(delta))]


CASES: dict[str, dict[str, Any]] = {
    "terminate": {"on_truncation": "terminate", "rewards": [{"fn": "rewards.py:some_unscored"}]},
    "bootstrap": {
        "on_truncation": "bootstrap",
        "environment": {"fn": "calculator.reply"},
        "data": {"problems": {"task": {"fn": "calculator.train"}, "limit": 64}},
        "sampling": {"max_new_tokens": 7, "stop": ["1", "2", "3", "4", "5", "="]},
        "max_length": 24,
    },
}
CALCULATOR = {**MODEL, "tokenizer": {"kind": "characters", "alphabet": "0123456789+=?;"}}


@LORA_OR_NOT
@pytest.mark.parametrize("case", CASES)
def test_the_first_step_is_what_the_rollouts_say_by_hand(tmp_path, case, lora, beginnings, experiences):
    """Once with completions that have no reward, once with two turns and what a calculator says in between."""
    stage = {**PPO, "steps": 1, "gamma": 0.9, "gae_lambda": 0.8, "whiten": False, "sampling": {"max_new_tokens": 3}}
    stage |= {"kl": {"beta": 0.5}, "reference": "base", "max_tokens_per_microbatch": 40, **CASES[case]}
    run(tmp_path, {"sft": SFT, "ppo": stage}, *lora, model=CALCULATOR)
    (begin,), (experience,), (line,) = beginnings, experiences, metrics(tmp_path, "ppo")
    found = scored_by_hand(tmp_path, tmp_path / "runs/run/sft/final", begin.weights, 0.5)
    assert {c.cut for c in found} == {True, False}
    assert any(c.gaps for c in found) is (case == "bootstrap")
    assert (len(found) < 32) is (case == "terminate")

    value = [v for c in found for v in c.value]
    advantage = [a for c in found for a in advantages_by_hand(c, 0.9, 0.8, case == "bootstrap")]
    returns = [a + v for a, v in zip(advantage, value, strict=True)]
    assert experience["old_value"].tolist() == pytest.approx(value, abs=1e-4)
    assert experience["advantage"].tolist() == pytest.approx(advantage, abs=1e-4)
    assert experience["returns"].tolist() == pytest.approx(returns, abs=1e-4)
    # The rewards differ by the KL at every action, or the test would not see it.
    assert min(abs(r) for c in found for r in c.reward[:-1]) > 1e-5

    n = len(value)
    assert line["loss"] == pytest.approx(-sum(advantage) / n, abs=1e-4)
    assert line["value_loss"] == pytest.approx(sum(a * a for a in advantage) / n / 2, rel=1e-4)
    assert line["value"] == pytest.approx(sum(value) / n, abs=1e-4)
    unexplained = torch.tensor(advantage).var() / torch.tensor(returns).var()
    assert line["explained_variance"] == pytest.approx(1 - float(unexplained), abs=1e-3)
    assert line["ratio"] == pytest.approx(1, abs=1e-5)


def test_advantages_are_whitened_over_all_actions_of_a_step(tmp_path, experiences):
    run(tmp_path, {"ppo": {**PPO, "steps": 1, "whiten": False}})
    run(tmp_path, {"ppo": {**PPO, "steps": 1}}, "run=white")
    plain, white = (e["advantage"].double() for e in experiences)
    assert torch.allclose(white, (plain - plain.mean()) / plain.std(correction=0), atol=1e-5)
    assert torch.equal(*(e["returns"] for e in experiences))


def test_no_reward_at_all_changes_nothing(tmp_path, beginnings):
    run(tmp_path, {"ppo": {**PPO, "steps": 1, "rewards": [{"fn": "rewards.py:none"}]}})
    assert [(line["unscored"], line["grad_norm"]) for line in metrics(tmp_path, "ppo")] == [(32, 0.0)]
    assert beginnings[0].moved() == set()


@LORA_OR_NOT
def test_in_the_warm_up_the_critic_learns_and_the_policy_stays(tmp_path, lora, beginnings):
    """The return is known from the prompt: a critic can explain all of its variance."""
    (tmp_path / "small.py").write_text(OF_THE_PROMPT, "utf-8")
    jsonl(tmp_path / "digits.jsonl", [{"prompt": str(d)} for d in range(10)])
    stage = {**PPO, "data": {"digits": {"path": "digits.jsonl"}}, "rewards": [{"fn": "small.py:small"}]}
    stage |= {
        "gae_lambda": 1.0,
        "prompts_per_step": 10,
        "group_size": 2,
        "steps": 10,
        "num_iterations": 4,
        "table_every": 0,
    }
    stage |= {"sampling": {"max_new_tokens": 2}, "critic": {"clip": None, "warmup_steps": 10, "learning_rate": 1e-2}}
    final = run(tmp_path, {"ppo": stage}, *lora)
    lines = metrics(tmp_path, "ppo")
    explained = [line["explained_variance"] for line in lines]
    assert explained[0] < 0.2
    assert min(explained[-3:]) > 0.8
    assert lines[-1]["value_loss"] < 0.3 * lines[0]["value_loss"]
    assert {name.split()[0] for name in beginnings[0].moved() if ".critic." not in name} <= {"critic", "head"}
    if not lora:
        assert all(torch.equal(w, weights(base(tmp_path))[name]) for name, w in weights(final).items())


def test_after_the_warm_up_the_policy_learns_too(tmp_path):
    run(tmp_path, {"ppo": {**PPO, "steps": 2, "critic": {"learning_rate": 1e-2, "warmup_steps": 1}}})
    lines = metrics(tmp_path, "ppo")
    assert ["grad_norm" in line for line in lines] == [False, True]
    assert all(line["critic_grad_norm"] > 0 for line in lines)


def test_a_clipped_value_by_hand():
    values = Values(torch.tensor([1.0, 0.1, -1.0], dtype=torch.float64), torch.zeros(3), torch.zeros(1))
    numbers = {"returns": [2.0, 2.0, 2.0], "old_value": [0.0, 0.0, 0.0], "weight": [1 / 3, 1 / 3, 1 / 3]}
    update = Group((1,), (Completion((2, 3, 4), (True,) * 3),))
    part = Experience((update,), {k: torch.tensor(v, dtype=torch.float64) for k, v in numbers.items()})
    # Towards the return at most 0.2 counts: 1.0 is taken for 0.2; away from it, -1.0 for what it is.
    for clip, squares in ((0.2, [1.8**2, 1.9**2, 3.0**2]), (None, [1.0, 1.9**2, 3.0**2])):
        loss, line = ppo.critic_loss_of(Ppo(learning_rate=1.0, critic=Critic(clip=clip)))(values, part)
        assert float(loss) == pytest.approx(sum(squares) / 6)
        assert line["value"].tolist() == [1.0, 0.1, -1.0]


def test_values_that_have_moved_as_far_as_the_clip_get_no_gradient(tmp_path):
    """All returns lie far above: after the first pass every value has moved too far, and the second adds nothing."""
    norms = {}
    for name, passes, clip in (("once", 1, 1e-6), ("clipped", 2, 1e-6), ("free", 2, None)):
        stage = {
            **PPO,
            "steps": 1,
            "num_iterations": passes,
            "gae_lambda": 1.0,
            "critic": {"learning_rate": 1e-2, "clip": clip},
        }
        stage |= {"rewards": [{"fn": "rewards.py:always", "args": {"value": 50.0}}]}
        run(tmp_path, {"ppo": stage}, f"run={name}")
        (line,) = metrics(tmp_path, "ppo", name)
        norms[name] = line["critic_grad_norm"]
    assert norms["once"] > 1
    assert norms["clipped"] == pytest.approx(norms["once"] / 2, rel=1e-6)
    assert norms["free"] > 0.7 * norms["once"]


def test_every_update_of_a_step_takes_its_share_for_both(tmp_path, monkeypatch):
    taken: list[tuple[str, list[tuple[int, ...]], float]] = []
    update = Learner.update

    def record(self, loss, experience, stats=None):
        ids = [tuple(c.ids) for g in experience.groups for c in g.completions]
        taken.append((type(self.model).__name__, ids, float(experience["weight"].sum())))
        return update(self, loss, experience, stats)

    monkeypatch.setattr(Learner, "update", record)
    run(tmp_path, {"ppo": {**PPO, "steps": 2, "num_minibatches": 2, "num_iterations": 2, "schedule": "linear"}})
    assert [model for model, *_ in taken] == 8 * ["ValueHeadModel", "Policy"]
    assert [ids for _, ids, _ in taken[::2]] == [ids for _, ids, _ in taken[1::2]]
    # Weights are counted over each update by itself.
    assert [total for *_, total in taken] == pytest.approx(16 * [1.0])
    for step in (1, 2):
        drawn = sorted(tuple(c["ids"]) for row in rollouts(tmp_path, "ppo", step) for c in row["completions"])
        own = [ids for _, ids, _ in taken[8 * step - 8 : 8 * step : 2]]
        assert [len(ids) for ids in own] == 4 * [16]
        assert sorted(own[0] + own[1]) == sorted(own[2] + own[3]) == drawn
    lines = metrics(tmp_path, "ppo")
    # Eight updates on a line down to 0; a step logs the mean of its four.
    assert [line["learning_rate"] for line in lines] == pytest.approx([3e-3 * (8 - n) / 8 for n in (1.5, 5.5)])
    assert [line["critic_learning_rate"] for line in lines] == pytest.approx([1e-2 * (8 - n) / 8 for n in (1.5, 5.5)])
    assert all(abs(line["ratio"] - 1) > 1e-5 and line["sampler_gap"] < 1e-5 for line in lines)


ADAPTING = {"beta": 0.1, "target": 0.5, "horizon": 100}


def test_the_coefficient_of_the_kl_moves_towards_its_target(tmp_path):
    run(tmp_path, {"sft": SFT, "ppo": {**PPO, "steps": 3, "kl": ADAPTING, "reference": "base"}})
    lines = metrics(tmp_path, "ppo")
    beta = 0.1
    for line in lines:
        assert line["beta"] == pytest.approx(beta)
        beta *= 1 + min(max(line["sequence_kl"] / 0.5 - 1, -0.2), 0.2) * 32 / 100
    assert lines[-1]["beta"] > 0.105  # the first steps are further from the base than 0.5 nats
    sampled = [c for row in rollouts(tmp_path, "ppo", 1) for c in row["completions"]]
    groups = [
        Group(tuple(row["prompt"]), (Completion(tuple(c["ids"]), (True,) * len(c["ids"])),))
        for row in rollouts(tmp_path, "ppo", 1)
        for c in row["completions"]
    ]
    kl = sum(sum(c["logprobs"]) for c in sampled) - float(logprobs(policy(base(tmp_path)), groups).sum())
    assert lines[0]["sequence_kl"] == pytest.approx(kl / 32, abs=1e-4)


@LORA_OR_NOT
def test_killed_in_the_middle_it_ends_as_if_it_had_gone_through(tmp_path, lora, monkeypatch):
    stage = {**PPO, "steps": 5, "num_minibatches": 2, "checkpoint_every": 2, "kl": ADAPTING, "reference": "base"}
    stages = {"sft": SFT, "ppo": {**stage, "critic": {"learning_rate": 1e-2, "warmup_steps": 1}}}
    run(tmp_path, stages, *lora, "run=whole")
    with monkeypatch.context() as patched:
        fail_after(7, patched)  # updates of the critic: in step 4, before the policy's second
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path, stages, *lora)
    assert len(metrics(tmp_path, "ppo")) == 3
    run(tmp_path, stages, *lora)
    assert_same_result(tmp_path, "ppo", lora=bool(lora))
    one, other = (tmp_path / "runs" / name / "ppo/checkpoints/step-000004" for name in ("run", "whole"))
    names = {f.name for f in other.glob("*.safetensors")}
    learners = {"weights", "optimizer", "critic_weights", "critic_optimizer"}
    assert {f"{name}.safetensors" for name in learners} < names
    assert {name: sha256(one / name) for name in names} == {name: sha256(other / name) for name in names}
    assert metrics(tmp_path, "ppo")[-1]["beta"] != ADAPTING["beta"]


@LORA_OR_NOT
@pytest.mark.parametrize("trunk", ["own", "frozen"])
def test_a_critic_can_begin_as_a_reward_model(tmp_path, trunk, lora, beginnings, experiences):
    reward = {
        "kind": "reward_model",
        "data": {"pairs": {"path": "pairs.jsonl"}},
        "steps": 8,
        "batch_size": 8,
        "learning_rate": 1e-2,
        "max_length": 16,
    }
    stage = {**PPO, "steps": 2, "critic": {**PPO["critic"], "start": "reward", "trunk": trunk}}
    run(tmp_path, {"reward": reward, "ppo": stage}, *lora)
    judge = saved(tmp_path / "runs/run/reward/final")
    value_N = judge.score(experiences[0].groups).before_N
    assert float(value_N.std()) > 0.1  # it has learned to tell answers apart
    assert torch.allclose(experiences[0]["old_value"], value_N, atol=1e-5)
    assert any(n.startswith("head") for n in beginnings[0].moved())
    assert any("critic" in n for n in beginnings[0].moved()) is (trunk == "own")
    assert_only_the_policy_moved(tmp_path, "ppo", bool(lora))


def test_what_is_logged(tmp_path):
    run(tmp_path, {"ppo": {**PPO, "steps": 1, "kl": {"beta": 0.1}, "entropy_coef": 0.01}})
    names = {
        *("step", "reward", "reward/digits", "unscored", "zero_signal", "truncated", "length", "entropy"),
        *("sequence_kl", "beta", "loss", "ratio", "sampler_gap", "clipped_low", "clipped_high", "kl"),
        *("exact_entropy", "grad_norm", "learning_rate"),
        *("value", "value_loss", "explained_variance", "critic_grad_norm", "critic_learning_rate"),
    }
    assert [set(line) for line in metrics(tmp_path, "ppo")] == [names]
