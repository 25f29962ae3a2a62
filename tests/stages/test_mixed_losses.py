"""A `dpo` stage with several losses, or with a gold completion beside each pair."""

from __future__ import annotations

import math
import re

import pytest
import torch.nn.functional as F
from tiny_recipes import DPO, GRPO, LORA, PREFERENCES, base, group, jsonl, metrics, policy, prepared, run

from rlpost.errors import DataError, RecipeError
from rlpost.policy.score import logprobs

ALL = {**DPO, "batch_size": len(PREFERENCES)}
SUM = [
    {"fn": "dpo", "weight": 0.8, "args": {"beta": 0.5}},
    {"fn": "bco", "weight": 0.2},
    {"fn": "simpo", "weight": 0.5},
]
TRIPLES = [{**row, "reference": row["chosen"] + "1"} for row in PREFERENCES]
GOLD = {**ALL, "data": {"own": {"path": "triples.jsonl"}}, "gold_coef": 0.5}
LOG_2 = math.log(2)


def test_a_sum_is_minimised_and_each_of_its_losses_logged(tmp_path):
    settings = {**ALL, "losses": SUM, "nll_coef": 1.0, "steps": 3, "max_tokens_per_microbatch": 30}
    run(tmp_path, {"dpo": {**settings, "learning_rate": 1e-2}}, LORA)
    first, *_, last = metrics(tmp_path, "dpo")
    model = policy(base(tmp_path))
    sides = [[logprobs(model, [group(model, r["prompt"], r[s])]) for s in ("chosen", "rejected")] for r in PREFERENCES]
    leads = [float(chosen.mean() - rejected.mean()) for chosen, rejected in sides]
    simpo = sum(math.log1p(math.exp(1 - 2 * lead)) for lead in leads) / len(leads)
    assert first["preference_loss/dpo"] == pytest.approx(LOG_2, abs=1e-6)
    assert first["preference_loss/bco"] == pytest.approx(2 * LOG_2, abs=1e-6)
    assert first["preference_loss/simpo"] == pytest.approx(simpo, rel=1e-4)
    assert first["preference_loss"] == pytest.approx(1.2 * LOG_2 + 0.5 * simpo, rel=1e-4)
    assert first["loss"] == pytest.approx(first["preference_loss"] + first["chosen_nll"], rel=1e-5)
    assert last["preference_loss"] < first["preference_loss"]


def test_a_sum_of_losses_of_single_pairs(tmp_path):
    losses = [{"fn": "dpo"}, {"fn": "ipo", "weight": 0.01}]
    run(tmp_path, {"dpo": {**ALL, "losses": losses, "steps": 1, "modifiers": [{"fn": "confidence"}]}})
    (line,) = metrics(tmp_path, "dpo")
    assert line["preference_loss/ipo"] == pytest.approx(25 / LOG_2 * line["preference_loss/dpo"], rel=1e-4)
    assert line["loss"] == pytest.approx(line["preference_loss/dpo"] + 0.01 * line["preference_loss/ipo"], rel=1e-5)


def test_samples_take_a_sum_too(tmp_path):
    online = {**GRPO, "kind": "online_dpo", "losses": SUM[:2], "steps": 1}
    del online["table_every"]
    run(tmp_path, {"online": online})
    (line,) = metrics(tmp_path, "online")
    both = 0.8 * line["preference_loss/dpo"] + 0.2 * line["preference_loss/bco"]
    assert line["preference_loss"] == pytest.approx(both, rel=1e-5)


def test_a_step_without_a_pair_changes_nothing_whatever_the_loss(tmp_path):
    online = {**GRPO, "kind": "online_dpo", "losses": SUM[:2], "steps": 1, "rewards": [{"fn": "rewards.py:always"}]}
    run(tmp_path, {"online": online})
    (line,) = metrics(tmp_path, "online")
    assert (line["pairs"], line["loss"], line["grad_norm"]) == (0, 0, 0)


def test_gold_completions_are_learned_beside_pairs_by_a_token_mean(tmp_path):
    jsonl(tmp_path / "triples.jsonl", TRIPLES)
    settings = {**GOLD, "loss": {"fn": "cpo", "args": {"alpha": 0.0}}, "eval_every": 4, "steps": 4}
    settings |= {"eval_data": GOLD["data"], "max_tokens_per_microbatch": 1, "learning_rate": 1e-2, "nll_coef": 0.25}
    run(tmp_path, {"dpo": settings})
    first, *_, last = metrics(tmp_path, "dpo")
    model = policy(base(tmp_path))

    def of(column):
        return [logprobs(model, [group(model, row["prompt"], row[column])]) for row in TRIPLES]

    chosen, rejected, gold = of("chosen"), of("rejected"), of("reference")
    pair = [-F.logsigmoid(0.1 * (a.sum() - b.sum())) for a, b in zip(chosen, rejected, strict=True)]
    nll = [-sum(float(x.sum()) for x in side) / sum(map(len, side)) for side in (chosen, gold)]
    assert first["preference_loss"] == pytest.approx(float(sum(pair)) / len(pair), rel=1e-4)
    assert first["gold_nll"] == pytest.approx(nll[1], rel=1e-4)  # all are as long
    assert first["loss"] == pytest.approx(first["preference_loss"] + 0.25 * nll[0] + 0.5 * nll[1], rel=1e-4)
    assert last["gold_nll"] < first["gold_nll"]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"reference": 7}, "triples.jsonl:2): 'reference' is int (7), not text or messages"),
        ({}, "triples.jsonl:2) has no 'reference'"),
    ],
)
def test_a_mistake_in_the_gold_column_is_refused_by_its_line(tmp_path, row, message):
    jsonl(tmp_path / "triples.jsonl", [TRIPLES[0], {**PREFERENCES[1], **row}])
    with pytest.raises(DataError, match=re.escape(message)):
        run(tmp_path, {"dpo": {**GOLD, "steps": 1}})


def test_rows_without_a_gold_column_are_refused(tmp_path):
    jsonl(tmp_path / "triples.jsonl", PREFERENCES)
    with pytest.raises(DataError, match=r"needed are \(chosen, rejected, reference\): name them with columns"):
        run(tmp_path, {"dpo": GOLD})


def test_a_gold_column_that_is_not_read_is_told(tmp_path, capsys):
    jsonl(tmp_path / "triples.jsonl", TRIPLES)
    run(tmp_path, {"dpo": {**GOLD, "gold_coef": 0.0, "steps": 1}})
    assert "read as prompt, chosen, rejected; its column 'reference' is not read" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"losses": SUM, "loss": {"fn": "ipo"}}, "stages.dpo.loss: ipo is given beside stages.dpo.losses - keep one"),
        ({"loss": None}, "stages.dpo.loss: missing - give one loss, like {fn: dpo}, or several as stages.dpo.losses"),
        ({"losses": [{"fn": "dpo", "weight": 0}]}, "stages.dpo.losses: all weights are 0, so there is nothing to"),
        ({"losses": [{"fn": "dpo"}, {"fn": "ipo", "weight": -1}]}, "stages.dpo.losses[1].weight: expected at least 0"),
        ({"losses": [SUM[0], SUM[1], SUM[0]]}, "stages.dpo.losses[2].fn: 'dpo' is in the sum already - give it once"),
        (
            {"losses": [{"fn": "dpo_plackett_luce"}, {"fn": "dpo"}]},
            "stages.dpo.losses[0].fn: 'dpo_plackett_luce' takes (delta_PK, reward_PK) from the program, which gives",
        ),
        ({"losses": [{"fn": "dpoo"}]}, "stages.dpo.losses[0].fn: no function 'dpoo' in rlpost.objectives.preference"),
        ({"losses": [{"fn": "dpo", "args": {"gamma": 1}}]}, "stages.dpo.losses[0].args.gamma: 'dpo' has no argument"),
        ({"gold_coef": -1}, "stages.dpo.gold_coef: expected at least 0"),
        (
            {"loss": {"fn": "dpo_plackett_luce"}, "gold_coef": 1},
            "stages.dpo.gold_coef: dpo_plackett_luce compares whole groups, of which none is the gold one - use 0",
        ),
        (
            {"losses": [{"fn": "simpo"}, {"fn": "cpo"}], "refresh": {}},
            "stages.dpo.refresh: simpo and cpo have no reference that could follow",
        ),
    ],
)
def test_what_cannot_be_summed_is_refused(tmp_path, settings, message):
    with pytest.raises(RecipeError) as caught:
        prepared(tmp_path, {"dpo": {**ALL, **settings}})
    assert str(caught.value).startswith(message)


def test_a_reference_is_there_if_one_loss_of_a_sum_has_it(tmp_path):
    settings = {**ALL, "losses": [{"fn": "simpo"}, {"fn": "dpo"}], "modifiers": [{"fn": "f_divergence"}]}
    resolved = prepared(tmp_path, {"dpo": {**settings, "refresh": {"every": 10}}})
    again = prepared(tmp_path, {"dpo": resolved.config.stages["dpo"].model_dump(mode="json")})
    assert again.config.stages["dpo"] == resolved.config.stages["dpo"]
    assert again.config.stages["dpo"].loss is None
