"""Stages whose advantage reads probabilities, columns of the rows and running means by role; and A*-PO as a whole."""

from __future__ import annotations

import json
import math

import pytest
import torch
from moved import assert_same_result, fail_after
from tiny_recipes import GRPO, PAIRS, SFT, base, jsonl, metrics, policy, prepared, rollouts, run

from rlpost.errors import DataError, RecipeError
from rlpost.objectives.baselines import optimal_token_baseline
from rlpost.objectives.ragged import Ragged
from rlpost.pipeline import train
from rlpost.policy.logprobs import LogitStats
from rlpost.policy.score import logprobs
from rlpost.recipe.specs.pairs import Pairs
from rlpost.stages.pairs import must_have_pairs, valued_row
from rlpost.stages.params import PairChoice
from rlpost.stages.role_means import RoleMeans
from rlpost.types import Completion, Group

STAGE = {**GRPO, "steps": 1, "loss": {"fn": "policy_gradient"}, "weight": "sequence_sum"}
VALUES = {**PAIRS, "choice": "valued", "beta": 0.5, "prompts": 12}
REGRESSION = {
    **GRPO,
    "data": {"valued": {"stage": "values"}},
    "steps": 2,
    "prompts_per_step": 6,
    "group_size": 1,
    "advantage": {"fn": "column_baseline", "args": {"column": "optimal_value"}},
    "loss": {"fn": "advantage_regression", "args": {"beta": 0.1}},
    "weight": "sequence_mean",
    "learning_rate": 1e-2,
}


def groups_of(rows: list[dict]) -> list[Group]:
    return [
        Group(tuple(row["prompt"]), tuple(Completion(c["ids"], (True,) * len(c["ids"])) for c in row["completions"]))
        for row in rows
    ]


def test_a_stage_weighs_rewards_by_what_its_policy_says_of_its_actions(tmp_path):
    stage = {**STAGE, "advantage": {"fn": "optimal_token_baseline"}, "sampling": {"max_new_tokens": 5}}
    run(tmp_path, {"grpo": {**stage, "sampling": {"max_new_tokens": 5, "temperature": 1.5}}})
    rows = rollouts(tmp_path, "grpo", 1)
    start = policy(base(tmp_path))
    logp_N, norm_N = [], []
    for group in groups_of(rows):
        with torch.no_grad():
            found = start(start.batch([group]), LogitStats(1.5, distribution=True))
        own_NV = found.distribution_NV.exp()
        target_N = torch.cat([torch.tensor(c.ids).long() for c in group.completions])
        score_NV = torch.nn.functional.one_hot(target_N, own_NV.shape[1]) - own_NV
        norm_N.append(score_NV.square().sum(1))
        logp_N.append(found.logp_N)
    lengths = [len(c["ids"]) for row in rows for c in row["completions"]]
    reward_PG = torch.tensor([[c["reward"] for c in row["completions"]] for row in rows])
    # Norms of their own: with p = ½ what is left of 1 − 2p + Σp² is Σp².
    half_N = torch.full((sum(lengths),), math.log(0.5))
    advantage_N = optimal_token_baseline(reward_PG, half_N, torch.cat(norm_N).log(), Ragged(lengths))
    loss = -(advantage_N * torch.cat(logp_N)).sum().item() / len(lengths)
    line = metrics(tmp_path, "grpo")[0]
    assert line["loss"] == pytest.approx(loss, rel=1e-4)
    assert len(set(lengths)) > 1
    assert line["grad_norm"] > 0


def test_each_role_has_a_running_mean_of_the_steps_before(tmp_path):
    advantage = {"fn": "role_baseline", "args": {"by": "carry", "decay": 0.6}}
    run(tmp_path, {"grpo": {**STAGE, "steps": 3, "prompts_per_step": 8, "advantage": advantage}})
    means: dict[bool, float] = {}
    for step, line in enumerate(metrics(tmp_path, "grpo"), 1):
        rows = rollouts(tmp_path, "grpo", step)
        roles = [row["example"]["carry"] for row in rows]
        assert len(set(roles)) == 2
        terms = [
            -(c["reward"] - means.get(role, 0.0)) * sum(c["logprobs"])
            for role, row in zip(roles, rows, strict=True)
            for c in row["completions"]
        ]
        assert line["loss"] == pytest.approx(sum(terms) / len(terms), rel=1e-4)
        for role in set(roles):
            own = [
                c["reward"] for other, row in zip(roles, rows, strict=True) if other == role for c in row["completions"]
            ]
            now = sum(own) / len(own)
            means[role] = now if role not in means else 0.6 * means[role] + 0.4 * now


@pytest.mark.slow
def test_the_means_of_roles_go_on_after_a_stop(tmp_path, monkeypatch):
    stage = {**STAGE, "steps": 6, "checkpoint_every": 2}
    stages = {"grpo": {**stage, "advantage": {"fn": "role_baseline", "args": {"by": "carry"}}}}
    run(tmp_path, stages, "run=whole")
    with monkeypatch.context() as patched:
        fail_after(3, patched)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path, stages)
    run(tmp_path, stages)
    assert_same_result(tmp_path, "grpo", lora=False)


def seats(*values: object) -> list[Group]:
    return [Group((1,), (), example={"seat": value}) for value in values]


def test_roles_are_kept_apart_and_saved():
    means = RoleMeans("stages.x.advantage", {"by": "seat", "decay": 0.5})
    groups = seats(1, True, "1", 1)
    assert means.of(groups).tolist() == [0.0] * 4
    means.move(groups, torch.tensor([[1.0, 3.0], [5.0, 5.0], [float("nan")] * 2, [4.0, 4.0]]))
    assert means.of(groups).tolist() == [3.0, 5.0, 0.0, 3.0]
    again = RoleMeans("stages.x.advantage", {"by": "seat"})
    again.load(json.loads(json.dumps(means.state())))
    again.move(seats(True), torch.tensor([[1.0]]))
    assert again.of(groups).tolist() == pytest.approx([3.0, 0.95 * 5 + 0.05, 0.0, 3.0])
    with pytest.raises(DataError, match=r"stages.x.advantage.args.by: a row has no column 'seat'"):
        means.of([Group((1,), (), example={"sead": 1})])


ROWS = [{"prompt": "1+1=", "worth": 0.5}, {"prompt": "1+2=", "worth": 2}]


@pytest.mark.parametrize(
    ("rows", "advantage", "message"),
    [
        (ROWS, ("role_baseline", "by", "wort"), r"rows\.jsonl.*advantage.args.by: a row has no column 'wort'.*'worth'"),
        (ROWS, ("column_baseline", "column", "value"), r"args.column: a row has no column 'value'"),
        (
            [*ROWS, {"prompt": "2+2=", "worth": "much"}],
            ("column_baseline", "column", "worth"),
            r"rows\.jsonl.*3.*args.column: 'worth' is 'much' in a row - give a number",
        ),
        ([{"prompt": "2=", "worth": True}], ("column_baseline", "column", "worth"), "'worth' is True in a row"),
    ],
    ids=["no role", "no number", "text", "a truth"],
)
def test_a_column_that_cannot_be_read_is_refused_with_its_row(tmp_path, rows, advantage, message):
    jsonl(tmp_path / "rows.jsonl", rows)
    fn, argument, column = advantage
    stage = {**STAGE, "data": {"own": {"path": "rows.jsonl"}}, "advantage": {"fn": fn, "args": {argument: column}}}
    with pytest.raises(DataError, match=message):
        train(prepared(tmp_path, {"grpo": stage}))


def test_a_column_is_read_of_rows_that_a_stage_wrote_when_they_are_drawn(tmp_path):
    with pytest.raises(DataError, match=r"stages\.rl\.advantage\.args\.column: a row has no column 'optimal'"):
        run(tmp_path, {"values": VALUES, "rl": {**REGRESSION, "advantage": named("column_baseline", column="optimal")}})


def named(fn: str, **args: object) -> dict:
    return {"fn": fn, "args": args}


OWN = "def mine(reward_PG, running_mean_P):\n    return reward_PG\n"


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        ({"values": {**VALUES, "beta": None}}, r"stages.values.beta: missing - choice=valued"),
        ({"values": {**VALUES, "choice": "all"}}, r"stages.values.beta: is for choice=valued, not for all - remove it"),
        ({"values": {**PAIRS, "solved_above": 0.0}}, r"values.solved_above: is for choice=valued, not for one"),
        ({"values": {**VALUES, "min_gap": 0.1}}, r"values.min_gap: choice=valued compares no completions - remove it"),
        ({"rl": {**STAGE, "advantage": {"fn": "role_baseline"}}}, r"rl.advantage.args.by: missing"),
        (
            {"rl": {**STAGE, "advantage": {"fn": "mine.py:mine"}}},
            r"rl.advantage.args.by: missing - mine reads",
        ),
        (
            {"rl": {**REGRESSION, "data": SFT["data"], "weight": "token_mean"}},
            r"weight: advantage_regression is one",
        ),
        (
            {"rl": {**REGRESSION, "data": SFT["data"], "kl": {"beta": 0.1}}},
            r"stages.rl.kl.beta: advantage_regression holds to the reference by itself",
        ),
        (
            {"rl": {**STAGE, "kind": "ppo", "loss": REGRESSION["loss"]}},
            r"stages.rl.loss.fn: advantage_regression fits one advantage a completion",
        ),
    ],
)
def test_what_cannot_be_right_is_refused_at_its_key(tmp_path, stages, message):
    (tmp_path / "mine.py").write_text(OWN, "utf-8")
    with pytest.raises(RecipeError, match=message):
        prepared(tmp_path, {"sft": SFT, **stages})


def sampled(*texts: tuple[str, str]) -> Group:
    completions = tuple(Completion((5,), (True,), text, finish) for text, finish in texts)
    return Group((1,), completions, example={"prompt": "1+1=", "answer": "2"})


def test_a_prompts_value_counts_every_scored_sample():
    """Two are the same, one is cut off, one has no reward."""
    group = sampled(("2", "stop"), ("2", "stop"), ("33", "length"), ("4", "stop"))
    (row,) = valued_row(group, [1.0, 1.0, 0.0, None], 0.5, None)
    value = 0.5 * math.log((2 * math.exp(2) + 1) / 3)
    assert row == {"prompt": "1+1=", "answer": "2", "optimal_value": pytest.approx(value)}
    assert list(valued_row(group, [1.0, 0.0, 0.0, 0.0], 0.5, 0.0))
    assert not list(valued_row(group, [0.0] * 4, 0.5, 0.0))
    assert list(valued_row(group, [0.0] * 4, 0.5, None))
    assert not list(valued_row(group, [None] * 4, 0.5, None))


def test_values_of_no_prompt_are_an_error():
    cfg = Pairs(choice=PairChoice.valued, beta=0.5, solved_above=1.0)
    with pytest.raises(DataError, match=r"stages.values: no prompt has a reward above 1; raise group_size"):
        must_have_pairs([], [], cfg, "values")
    must_have_pairs([{}], [], cfg, "values")


def test_a_star_po_fits_the_log_ratio_to_the_reference(tmp_path, capfd):
    run(tmp_path, {"values": VALUES, "rl": REGRESSION})
    valued = (tmp_path / "runs/run/values/final/rows.jsonl").read_text("utf-8").splitlines()
    known = {row["prompt"]: row["optimal_value"] for row in map(json.loads, valued)}
    assert len(known) == 12
    start = policy(base(tmp_path))
    losses = []
    for step in (1, 2):
        rows, terms = rollouts(tmp_path, "rl", step), []
        for row, group in zip(rows, groups_of(rows), strict=True):
            (c,) = row["completions"]
            apart = sum(c["logprobs"]) - logprobs(start, [group]).sum().item()
            assert row["example"]["optimal_value"] == known[row["example"]["prompt"]]
            terms.append((0.1 * apart - (c["reward"] - known[row["example"]["prompt"]])) ** 2 / 0.2)
        losses.append(sum(terms) / len(terms))
    lines = metrics(tmp_path, "rl")
    assert [line["loss"] for line in lines] == pytest.approx(losses, rel=1e-3)
    assert abs(lines[0]["sequence_kl"]) < 1e-4 < lines[1]["grad_norm"]
    # One sample a prompt is no lack of a signal.
    assert "tell completions apart" not in capfd.readouterr().err
