"""On-policy distillation: the student's samples, and what a teacher makes of every token."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from moved import assert_only_the_policy_moved, assert_same_result, fail_after
from tiny_recipes import GRPO, LORA, MODEL, SFT, base, jsonl, metrics, policy, prepared, run
from torch import Tensor

from rlpost.errors import DataError, ModelError, RecipeError
from rlpost.objectives.distillation import divergence_to_go, fold, top_tokens
from rlpost.objectives.kl import kl_in_reward
from rlpost.objectives.supervised import forward_kl, jensen_shannon, reverse_kl
from rlpost.policy.policy import Policy
from rlpost.stages import distill as stage
from rlpost.train.experience import Experience
from rlpost.train.learner import Learner
from rlpost.types import Completion, Group, completions

LORA_OR_NOT = pytest.mark.parametrize("lora", [(), (LORA,)], ids=["full", "lora"])
DISTILL = {k: v for k, v in GRPO.items() if k != "rewards"}
DISTILL |= {"kind": "distill", "start": "base", "schedule": "constant", "learning_rate": 5e-3}
SHOWN = "{answer}={prompt}"
URL = {"urls": ["http://localhost:8000"]}
LONG = [{"fn": "rewards.py:cut_off"}]


@pytest.fixture(scope="module")
def sft(tmp_path_factory) -> Path:
    """A teacher: the base model of these recipes, trained a little."""
    return run(tmp_path_factory.mktemp("teacher"), {"sft": SFT})


def taught(folder, teacher, settings, *overrides, **top):
    """A student that starts from the base; the folder of its result."""
    return run(folder, {"student": {**DISTILL, "teacher": str(teacher), **settings}}, *overrides, **top)


@pytest.fixture
def updates(monkeypatch) -> list[Experience]:
    """What the students' updates learn from."""
    kept: list[Experience] = []
    update = Learner.update

    def record(self, loss, experience, stats=None):
        if callable(stats):
            kept.append(experience)
        return update(self, loss, experience, stats)

    monkeypatch.setattr(Learner, "update", record)
    return kept


def logp_of(of: Policy, groups: tuple[Group, ...], temperature: float = 1.0) -> Tensor:
    """[N, V] of every action."""
    logp_NV = of.distributions(of.batch(groups))(slice(None)).double()
    return (logp_NV / temperature).log_softmax(-1)


def said(logp_NV: Tensor, groups: tuple[Group, ...]) -> Tensor:
    ids = [int(i) for g in groups for c in g.completions for i in c.ids]
    return logp_NV.gather(1, torch.tensor(ids)[:, None])[:, 0]


@pytest.mark.parametrize(
    ("divergence", "lora"), [(forward_kl, ()), (reverse_kl, (LORA,)), (jensen_shannon, ())], ids=["fkl", "rkl", "js"]
)
def test_the_divergence_of_the_students_states_by_hand(tmp_path, sft, lora, divergence, updates):
    hot = {"sampling": {"max_new_tokens": 5, "temperature": 1.5}, "max_tokens_per_microbatch": 40}
    taught(tmp_path, sft, {"steps": 1, "loss": {"fn": divergence.__name__}, **hot}, *lora)
    (line,), (update,) = metrics(tmp_path, "student"), updates
    student, teacher = (logp_of(policy(folder), update.groups, 1.5) for folder in (base(tmp_path), sft))
    assert line["divergence"] == pytest.approx(float(divergence(student, teacher).mean()), rel=1e-4)
    assert line["loss"] == pytest.approx(line["divergence"])
    assert line["teacher_logp"] == pytest.approx(float(said(teacher, update.groups).mean()), rel=1e-4)
    assert line["sampler_gap"] < 1e-5
    assert not {"reward", "zero_signal", "ratio", "sequence_kl"} & set(line)


@pytest.mark.parametrize("lora", [(LORA,), pytest.param((), marks=pytest.mark.slow)], ids=["lora", "full"])
def test_the_student_comes_near_its_teacher_and_nothing_else_moves(tmp_path, sft, lora):
    taught(tmp_path, sft, {"steps": 12}, *lora)
    first, *_, last = metrics(tmp_path, "student")
    assert last["divergence"] < 0.5 * first["divergence"]
    assert_only_the_policy_moved(tmp_path, "student", bool(lora))


@pytest.mark.parametrize(
    ("teacher", "lora"),
    [
        pytest.param("base", (LORA,), marks=pytest.mark.slow),
        ("start", (LORA,)),
        ("sft", (LORA,)),
        pytest.param("start", (), marks=pytest.mark.slow),
    ],
    ids=["base", "start", "stage", "full"],
)
def test_with_lora_the_teacher_is_an_adapter_on_the_students_base(tmp_path, teacher, lora, monkeypatch):
    """Of the start a copy, of an earlier stage its own, of the base none; and each says what it says alone."""
    found = []
    make = stage.lessons_of

    def record(context, cfg, student):
        found.append((make(context, cfg, student), student))
        return found[-1][0]

    monkeypatch.setattr(stage, "lessons_of", record)
    settings = {"steps": 1, **({"privileged": SHOWN} if teacher == "start" else {})}
    more = {**DISTILL, "start": "other", "teacher": teacher, "max_length": 24, **settings}
    trained = {**SFT, "steps": 2}
    run(tmp_path, {"sft": trained, "other": {**trained, "start": "base", "learning_rate": 0.1}, "student": more}, *lora)
    ((lessons, student),) = found
    reference = lessons._teacher
    assert (reference.policy is student) == bool(lora)
    stages = {"start": "other", "sft": "sft"}
    alone = policy(base(tmp_path) if teacher == "base" else tmp_path / f"runs/run/{stages[teacher]}/final")
    prompt = student.tokenizer.encode("1+2=")
    groups = [Group(prompt, [completion(4, 5), completion(6, 3, 3)]), Group(prompt[:2], [completion(3)])]
    found_NV = reference.distributions(groups)(slice(None))
    assert torch.allclose(found_NV.double(), logp_of(alone, tuple(groups)), atol=1e-5)


def completion(*ids: int) -> Completion:
    return Completion(ids, (True,) * len(ids))


def test_over_the_likeliest_tokens_by_hand(tmp_path, sft, updates):
    taught(tmp_path, sft, {"steps": 1, "top_k": 3, "loss": {"fn": "forward_kl"}})
    (line,), (update,) = metrics(tmp_path, "student"), updates
    student, teacher = (logp_of(policy(f), update.groups) for f in (base(tmp_path), sft))
    ids, _ = top_tokens(teacher, 3)
    by_hand = forward_kl(fold(student, ids), fold(teacher, ids)).mean()
    assert line["divergence"] == pytest.approx(float(by_hand), rel=1e-4)
    assert float(by_hand) < 0.95 * float(forward_kl(student, teacher).mean())
    assert line["teacher_logp"] == pytest.approx(float(said(teacher, update.groups).mean()), rel=1e-4)


def test_more_tokens_than_there_are_is_one_line(tmp_path, sft):
    with pytest.raises(RecipeError, match=r"student\.top_k: 16 of a vocabulary of 16 leaves no other token"):
        taught(tmp_path, sft, {"steps": 1, "top_k": 16})


def test_what_an_action_leads_to_is_its_advantage(tmp_path, sft, updates):
    taught(tmp_path, sft, {"steps": 1, "credit": "completion", "weight": "sequence_sum"})
    (update,) = updates
    student, teacher = (logp_of(policy(f), update.groups) for f in (base(tmp_path), sft))
    by_hand = -divergence_to_go(reverse_kl(student, teacher), update.rows, 4)
    assert torch.allclose(update["advantage"].double(), by_hand, atol=1e-4)
    assert by_hand.abs().max() > 0.1


@pytest.mark.parametrize("credit", ["state", "completion"])
def test_sampled_tokens_alone(tmp_path, sft, credit, updates):
    taught(tmp_path, sft, {"steps": 1, "estimate": "sampled", "credit": credit})
    (update,), (line,) = updates, metrics(tmp_path, "student")
    student, teacher = (said(logp_of(policy(f), update.groups), update.groups) for f in (base(tmp_path), sft))
    cost = student - teacher if credit == "state" else kl_in_reward(student, teacher, update.rows, 4)
    assert torch.allclose(update["advantage"].double(), -cost, atol=1e-4)
    assert line["divergence"] == pytest.approx(float((student - teacher).mean()), abs=1e-4)
    assert line["teacher_logp"] == pytest.approx(float(teacher.mean()), abs=1e-4)


def test_rewards_count_beside_the_divergence(tmp_path, sft, updates):
    rewards = {"rewards": LONG, "advantage": {"fn": "leave_one_out"}}
    taught(tmp_path, sft, {"steps": 1, "reward_coef": 0.5, **rewards})
    (update,), (line,) = updates, metrics(tmp_path, "student")
    reward_PG = torch.tensor([[c.reward for c in g.completions] for g in update.groups], dtype=torch.float64)
    by_hand = 0.5 * 4 / 3 * (reward_PG - reward_PG.mean(1, keepdim=True))
    assert torch.allclose(update["advantage"].double(), update.rows.spread(by_hand.flatten()), atol=1e-6)
    assert line["loss"] == pytest.approx(line["divergence"] - float(update["advantage"].mean()), abs=1e-5)
    assert line["reward/cut_off"] == line["reward"] > 0


def test_rewards_that_do_not_count_are_logged(tmp_path, sft, updates):
    taught(tmp_path, sft, {"steps": 1, "rewards": LONG})
    assert metrics(tmp_path, "student")[0]["reward/cut_off"] > 0
    assert "advantage" not in updates[0].per_action


@pytest.mark.parametrize("masked", [False, True])
def test_rewards_that_do_not_count_leave_nothing_out(tmp_path, sft, updates, capsys, masked):
    taught(tmp_path, sft, {"steps": 1, "rewards": [{"fn": "rewards.py:none"}], "mask_truncated": masked})
    (line,), (update,) = metrics(tmp_path, "student"), updates
    assert line["unscored"] == 16
    assert line["divergence"] > 0
    for c in completions(update.groups):
        assert c.actions == (0 if masked and c.finish == "length" else len(c.ids))
    assert "warning" not in capsys.readouterr().err


MOE = {"num_local_experts": 4, "num_experts_per_tok": 2, "model_type": "mixtral", "intermediate_size": 16}


@pytest.mark.parametrize("lora", [(), ("model.lora={r: 4, target_modules: [q_proj]}",)], ids=["full", "lora"])
def test_a_teacher_of_the_students_experts_is_no_load_of_the_update(tmp_path, lora):
    model = {**MODEL, "config": {**MODEL["config"], **MOE}}
    asks = {"max_length": 24, "steps": 1, "aux_loss_coef": 0.1}
    own = {"teacher": "self", "privileged": SHOWN}
    taught(tmp_path, "self", {**asks, **own}, *lora, model=model)
    taught(tmp_path, "self", {**asks, **own, "max_tokens_per_microbatch": 30}, *lora, "run=cut", model=model)
    alone = {**GRPO, "start": "base", **asks, "entropy_coef": 0.1}  # nothing is left out for want of an advantage
    run(tmp_path, {"student": alone}, *lora, "run=alone", model=model)
    found = [metrics(tmp_path, "student", name)[0]["router_balance"] for name in ("run", "cut", "alone")]
    assert found == pytest.approx([found[0]] * 3, rel=1e-4)


@LORA_OR_NOT
def test_a_model_that_is_shown_more_teaches_itself(tmp_path, lora, updates):
    taught(tmp_path, "self", {"privileged": SHOWN, "max_length": 24, "steps": 2}, *lora)
    line, update = metrics(tmp_path, "student")[0], updates[0]
    start = policy(base(tmp_path))
    more = tuple(
        Group(start.tokenizer.encode(f"{g.example['answer']}={g.example['prompt']}"), g.completions)
        for g in update.groups
    )
    divergence = reverse_kl(logp_of(start, update.groups), logp_of(start, more))
    assert line["divergence"] == pytest.approx(float(divergence.mean()), rel=1e-3)
    assert line["divergence"] > 1e-3


@pytest.mark.parametrize(
    ("credit", "estimate", "lora"),
    [
        ("completion", "distribution", ()),
        pytest.param("state", "distribution", (LORA,), marks=pytest.mark.slow),
        pytest.param("completion", "sampled", (), marks=pytest.mark.slow),
    ],
    ids=["completion", "lora", "sampled"],
)
def test_killed_in_the_middle_it_ends_as_if_it_had_gone_through(tmp_path, sft, lora, credit, estimate, monkeypatch):
    settings = {"steps": 4, "checkpoint_every": 2, "credit": credit, "estimate": estimate, "num_minibatches": 2}
    stages = {"student": {**DISTILL, "teacher": str(sft), **settings}}
    run(tmp_path, stages, *lora, "run=whole")
    with monkeypatch.context() as patched:
        fail_after(5, patched)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path, stages, *lora)
    run(tmp_path, stages, *lora)
    assert_same_result(tmp_path, "student", lora=bool(lora))


def test_a_row_without_the_teachers_column_is_refused_with_its_line(tmp_path):
    rows = [{"prompt": "1+1=", "hint": "2"}, {"prompt": "1+2="}]
    file = jsonl(tmp_path / "rows.jsonl", rows)
    asks = {"data": {"rows": {"path": str(file)}}, "privileged": "{hint}={prompt}"}
    with pytest.raises(DataError, match=r"stages\.student\.privileged: .*rows\.jsonl:2.* has no 'hint'"):
        taught(tmp_path, "self", asks)


def test_prompts_too_long_for_the_teacher_are_refused_or_not_learned_from(tmp_path, sft, capsys, updates):
    rows = [{"prompt": "1+1=", "hint": "2"}, {"prompt": "1+2=", "hint": "3" * 10}]
    file = jsonl(tmp_path / "rows.jsonl", rows)
    asks = {"data": {"rows": {"path": str(file)}}, "privileged": "{hint}={prompt}", "prompts_per_step": 2, "steps": 1}
    with pytest.raises(DataError, match=r"rows\.jsonl:2\) has a prompt of 15 tokens for the teacher, the limit is 11"):
        taught(tmp_path, sft, asks)
    taught(tmp_path, sft, {**asks, "too_long": "drop"})
    assert "nothing is learned from 1 rows" in capsys.readouterr().err
    (update,) = updates
    actions = {g.example["hint"]: sum(c.actions for c in g.completions) for g in update.groups}
    assert actions["2"] > 0
    assert actions["3" * 10] == 0
    with pytest.raises(DataError, match=r"privileged: none of 2 prompts for the teacher fits 11 tokens: raise max_len"):
        taught(tmp_path, sft, {**asks, "too_long": "drop", "privileged": "{prompt}{hint}{prompt}{prompt}"}, "run=none")


CHAT = "{% for m in messages %}{{ m['content'] }}{% if m['role'] == 'assistant' %}<eos>{% endif %}{% endfor %}"


def test_of_a_conversation_the_last_message_is_replaced(tmp_path, sft, updates):
    (tmp_path / "chat.jinja").write_text(CHAT)
    asked = [{"role": "system", "content": "0"}, {"role": "user", "content": "1+1="}]
    file = jsonl(tmp_path / "rows.jsonl", [{"prompt": asked, "hint": "2"}])
    asks = {"data": {"rows": {"path": str(file)}}, "privileged": "{hint}={prompt}", "steps": 1}
    taught(tmp_path, sft, asks, model={**MODEL, "chat_template": str(tmp_path / "chat.jinja")})
    (update,), (line,) = updates, metrics(tmp_path, "student")
    teacher = policy(sft)
    shown = tuple(Group(teacher.tokenizer.encode("02=1+1="), g.completions) for g in update.groups)
    expected = said(logp_of(teacher, shown), shown).mean()
    assert line["teacher_logp"] == pytest.approx(float(expected), rel=1e-4)


def test_a_teacher_of_another_vocabulary_or_of_fewer_positions_is_refused(tmp_path):
    other = {**MODEL, "tokenizer": {"kind": "characters", "alphabet": "0123456789=+"}}
    folder = run(tmp_path, {"sft": {**SFT, "steps": 1}}, "run=other", model=other)
    with pytest.raises(ModelError, match="another vocabulary"):
        taught(tmp_path, sft, {"teacher": str(folder)})
    short = {**MODEL, "config": {**MODEL["config"], "max_position_embeddings": 15}}
    folder = run(tmp_path, {"sft": {**SFT, "max_length": 15, "steps": 1}}, "run=short", model=short)
    with pytest.raises(ModelError, match="has 15 positions, and rows have up to 16 tokens: lower max_length"):
        taught(tmp_path, sft, {"teacher": str(folder)})


TEACHER = """
from pathlib import Path

from rlpost.engine.door import frozen_scoring_engine
from rlpost.policy.load import load_policy
from rlpost.policy.params import Model


def teacher(policy, *, folder):
    return frozen_scoring_engine(load_policy(Path(folder), Model(), trainable=False))
"""


@pytest.mark.parametrize("settings", [{"top_k": 3, "credit": "completion"}, {"estimate": "sampled"}], ids=str)
def test_a_teacher_behind_an_engine_teaches_as_one_that_is_loaded(tmp_path, sft, settings, updates):
    (tmp_path / "teacher.py").write_text(TEACHER)
    settings = {**settings, "steps": 2, "num_minibatches": 2, "max_tokens_per_microbatch": 60}
    taught(tmp_path, sft, settings, "run=loaded")
    engine = {"engine": "teacher.py:teacher", "args": {"folder": str(sft)}}
    run(tmp_path, {"student": {**DISTILL, **settings, "teacher_engine": engine}}, "run=engine")
    loaded, told = (metrics(tmp_path, "student", name) for name in ("loaded", "engine"))
    for one, other in zip(loaded, told, strict=True):
        assert one.keys() == other.keys()
        for name in ("divergence", "teacher_logp", "loss", "grad_norm"):
            assert other[name] == pytest.approx(one[name], rel=1e-3, abs=1e-5), name


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"teacher": None}, "teacher: missing - name a stage"),
        ({"teacher": "self"}, "privileged: missing - self is the student itself"),
        ({"teacher": "start"}, "privileged: missing - start is the student itself"),
        ({"teacher": "student"}, "teacher: 'student' is this stage itself"),
        ({"teacher": "rows"}, "teacher: 'rows' is of kind pairs"),
        ({"reward_coef": 1.0}, "rewards: missing"),
        ({"recorded": True}, "recorded: distill learns from samples of its own"),
        ({"kl": {"beta": 0.1}}, "kl.beta: distill holds to its teacher"),
        ({"top_k": 4, "estimate": "sampled"}, "top_k: with estimate=sampled"),
        ({"loss": {"fn": "forward_kl"}, "estimate": "sampled"}, "loss.fn: the sampled tokens alone estimate"),
        ({"loss": {"fn": "nll"}}, "loss.fn: "),
        ({"whiten": True}, "whiten: is about rewards"),
        ({"dynamic_sampling_rounds": 2}, "dynamic_sampling_rounds: is about rewards"),
        ({"advantage": {"fn": "leave_one_out"}}, "advantage: is about rewards"),
        ({"surrogate": {"fn": "policy_gradient"}}, "surrogate: there are no advantages"),
        (
            {"surrogate": {"fn": "geometric_mean"}, "credit": "completion"},
            "weight: geometric_mean is one value a completion",
        ),
        ({"privileged": "look"}, "privileged: names no column of the rows"),
        ({"privileged": "{a.b}{prompt}"}, "privileged: '{a.b}{prompt}' may hold plain column names"),
        ({"teacher_engine": URL}, "teacher: the teacher stands behind teacher_engine already"),
        ({"teacher_engine": URL, "teacher": None}, "top_k: missing - an engine tells the likeliest tokens only"),
        (
            {
                "teacher_engine": URL,
                "teacher": None,
                "top_k": 4,
                "sampling": {**DISTILL["sampling"], "temperature": 0.5},
            },
            "sampling.temperature: vLLM scores given tokens at temperature 1",
        ),
        ({"top_k": 0}, "top_k: expected at least 1"),
        ({"reward_coef": -1.0}, "reward_coef: expected at least 0"),
    ],
)
def test_what_cannot_be_right_is_refused_with_its_key(tmp_path, settings, message):
    rows = {"kind": "pairs", "data": SFT["data"], "prompts": 4, "rewards": GRPO["rewards"], "group_size": 2}
    with pytest.raises(RecipeError) as caught:
        prepared(tmp_path, {"sft": SFT, "rows": rows, "student": {**DISTILL, "teacher": "sft", **settings}})
    assert str(caught.value).startswith(f"stages.student.{message}"), str(caught.value)
    assert "\n" not in str(caught.value)
