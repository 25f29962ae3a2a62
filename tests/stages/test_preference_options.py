"""What a dpo stage may be told: every loss by name, rankings, losses that couple pairs, modifiers, added likelihood."""

from __future__ import annotations

import inspect
import math

import pytest
import torch
import torch.nn.functional as F
from families import EndTokenOnly, tiny
from moved import assert_only_the_policy_moved
from tiny_recipes import DPO, LORA, PREFERENCES, SFT, base, group, jsonl, metrics, policy, run
from torch import Tensor
from value_head_models import EVERYTHING

from rlpost.facts import fact
from rlpost.objectives import preference
from rlpost.objectives.preference import PairBatch, pairs_of
from rlpost.objectives.preference_modifiers import confidence, f_divergence, length_desensitised
from rlpost.policy import adapters
from rlpost.policy.attention import FLAT, use_attention
from rlpost.policy.load import remove_dropout
from rlpost.policy.params import Lora
from rlpost.policy.policy import Policy
from rlpost.policy.score import logprobs
from rlpost.stages.pairwise import PairObjective
from rlpost.train.experience import Experience
from rlpost.train.learner import Learner
from rlpost.types import Completion, Group
from rlpost.usercode.bound import Bound

LORA_OR_NOT = pytest.mark.parametrize("lora", [(), (LORA,)], ids=["full", "lora"])
ALL = {**DPO, "batch_size": len(PREFERENCES)}
"""Every update holds all pairs, so that numbers do not depend on their order."""
LOG_2 = math.log(2)
AT_THE_REFERENCE = {
    "dpo": LOG_2,
    "dpo_robust": LOG_2,
    "ipo": 25.0,  # (0 − 1/(2·0.1))²
    "hinge": 1.0,
    "length_normalised": LOG_2,
    "exo": -LOG_2 - (math.log(0.999) + math.log(0.001)) / 2,  # KL([½, ½] || [1 − ε, ε])
    "nca": 2 * LOG_2,
    "bco": 2 * LOG_2,
    "sppo": 50.0,
    "aot": LOG_2,
    "aot_unpaired": LOG_2,
    "apo_zero": 1.0,
    "apo_down": 1.0,
    "discopop": LOG_2 / 2 + 1 / 2,
}
"""What each loss of pairs with a reference is worth where the policy is at it."""
WITHOUT = ("simpo", "alphapo", "cpo", "orpo")
RANKED = [
    {"prompt": "1+2=", "completions": ["31", "3", "4", "99"], "scores": [3.0, 2.0, 1.0, 0.0]},
    {"prompt": "2+2=", "completions": ["42", "4"], "scores": [1.0, 0.0]},
    {"prompt": "3+2=", "completions": ["53", "5", "6"], "scores": [1.0, None, 0.0]},  # nobody scored the second
    {"prompt": "4+2=", "completions": ["64", "62", "7"], "scores": [1.0, 1.0, 0.0]},  # two are as good
]
RANK = {**ALL, "loss": {"fn": "dpo_plackett_luce"}, "data": {"ranked": {"path": "ranked.jsonl"}}, "batch_size": 4}


def sums(model: Policy) -> Tensor:
    """[P, 2] log-probabilities of the chosen and the rejected completions."""
    rows = [(r["prompt"], r["chosen"], r["rejected"]) for r in PREFERENCES]
    return torch.stack([torch.stack([logprobs(model, [group(model, p, c)]).sum() for c in both]) for p, *both in rows])


def test_every_loss_of_pairs_stands_here():
    own = [f for f in vars(preference).values() if inspect.isfunction(f) and f.__module__ == preference.__name__]
    losses = {f.__name__ for f in own if "pairs" in inspect.signature(f).parameters}
    assert losses == {*AT_THE_REFERENCE, *WITHOUT}


@pytest.mark.parametrize("loss", [*AT_THE_REFERENCE, *WITHOUT])
def test_every_loss_begins_with_its_value_at_the_reference_and_widens_the_margin(tmp_path, loss):
    lora = (LORA,) if fact(getattr(preference, loss), "couples_pairs") else ()
    run(tmp_path, {"dpo": {**ALL, "loss": {"fn": loss}, "steps": 10, "learning_rate": 1e-2}}, *lora)
    first, *_, last = metrics(tmp_path, "dpo")
    if loss in AT_THE_REFERENCE:
        expected = AT_THE_REFERENCE[loss]
    else:
        # Chosen answers are of 3 tokens and rejected ones of 2, their end tokens included.
        sum_P2 = sums(policy(base(tmp_path))).double()
        mean_P2 = sum_P2 / torch.tensor([3.0, 2.0])
        odds_P2 = mean_P2 - (1 - mean_P2.exp()).log()
        bent_P2 = (1 - (-mean_P2 / 4).exp()) * 4
        by_hand = {
            "alphapo": -F.logsigmoid(2 * (bent_P2[:, 0] - bent_P2[:, 1]) - 1),
            "simpo": -F.logsigmoid(2 * (mean_P2[:, 0] - mean_P2[:, 1]) - 1),
            "cpo": -F.logsigmoid(0.1 * (sum_P2[:, 0] - sum_P2[:, 1])) - mean_P2[:, 0],
            "orpo": -mean_P2[:, 0] - 0.1 * F.logsigmoid(odds_P2[:, 0] - odds_P2[:, 1]),
        }
        expected = float(by_hand[loss].mean())
    assert first["loss"] == pytest.approx(expected, rel=1e-4)
    assert last["loss"] < first["loss"]
    # The slope of discopop at h = 0 is β·(−¾ + (1 − log 2)/(4·0.05)) > 0: it has a maximum to the right of it.
    way = -1 if loss == "discopop" else 1
    assert way * last["margin"] > 1
    assert last["accuracy"] > 0.7 if way == 1 else last["accuracy"] < 0.3


@LORA_OR_NOT
def test_rankings_begin_at_the_number_of_orders_and_are_learned_whole(tmp_path, lora):
    jsonl(tmp_path / "ranked.jsonl", RANKED)
    run(tmp_path, {"dpo": {**RANK, "steps": 20, "learning_rate": 2e-2}}, *lora)
    first, *_, last = metrics(tmp_path, "dpo")
    # Whoever beats k others costs log(k + 1): 4·3·2 orders of the first, 2 of the second and third; in the last, both
    # that are as good beat one each.
    assert first["loss"] == pytest.approx((math.log(24) + LOG_2 + LOG_2 + 2 * LOG_2) / 4, abs=1e-5)
    assert last["loss"] < 0.9
    assert last["accuracy"] == 1.0
    assert_only_the_policy_moved(tmp_path, "dpo", bool(lora))
    after, before = policy(tmp_path / "runs/run/dpo/final"), policy(base(tmp_path))
    first_group = [[group(after, RANKED[0]["prompt"], c)] for c in RANKED[0]["completions"]]
    delta = [float((logprobs(after, one) - logprobs(before, one)).sum()) for one in first_group]
    assert delta == sorted(delta, reverse=True)


def test_the_cut_into_parts_changes_no_ranking(tmp_path):
    jsonl(tmp_path / "ranked.jsonl", RANKED)
    for name, budget in (("whole", 8192), ("cut", 1)):
        settings = {**RANK, "steps": 2, "reference": "base", "max_tokens_per_microbatch": budget}
        run(tmp_path, {"sft": SFT, "dpo": settings}, f"run={name}")
    whole, cut = (metrics(tmp_path, "dpo", name) for name in ("whole", "cut"))
    for one, other in zip(whole, cut, strict=True):
        assert other == pytest.approx(one, rel=1e-3, abs=1e-4)


def test_a_ranking_of_two_is_dpo(tmp_path):
    for loss in ("dpo", "dpo_plackett_luce"):
        run(tmp_path, {"dpo": {**DPO, "loss": {"fn": loss, "args": {"beta": 0.3}}}}, f"run={loss}")
    pairs, ranked = (metrics(tmp_path, "dpo", name) for name in ("dpo", "dpo_plackett_luce"))
    for one, other in zip(pairs, ranked, strict=True):
        for name in ("loss", "grad_norm"):
            assert other[name] == pytest.approx(one[name], rel=1e-5, abs=1e-6)
    assert [x["accuracy"] for x in pairs[1:]] == [x["accuracy"] for x in ranked[1:]]


def exact_policy(lora: bool) -> Policy:
    """In float64, on flat rows."""
    model = tiny("llama", torch.float64)
    remove_dropout(model)
    use_attention(model, FLAT)
    if lora:
        model = adapters.add_policy_adapter(model.requires_grad_(False), Lora(r=2, alpha=4.0)).double()
    return Policy(model, EndTokenOnly(), flat=True).eval()


def some_pairs() -> list[Group]:
    """Chosen and rejected completions of all kinds of lengths."""
    made = []
    for i in range(7):
        ids = [tuple(range(5 + 3 * i + k, 5 + 3 * i + k + 1 + (i * (k + 2)) % 4)) for k in range(2)]
        made.append(Group((5 + i, 6), tuple(Completion(x, (True,) * len(x)) for x in ids)))
    return made


@pytest.mark.parametrize(
    ("modifiers", "lora"),
    [([], False), ([length_desensitised, f_divergence, confidence], True)],
    ids=["plain", "modified-lora"],
)
@pytest.mark.parametrize("loss", ["aot", "aot_unpaired", "bco"])
def test_a_coupled_loss_has_the_gradient_of_the_whole_update_however_it_is_cut(loss, modifiers, lora):
    model, groups, function = exact_policy(lora), some_pairs(), getattr(preference, loss)
    reference_N = logprobs(model, groups)
    reference_N += torch.randn(reference_N.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    update = Experience(tuple(groups)).with_actions(reference=reference_N)
    # Without parts: all pairs in one pass.
    objective = PairObjective(Bound(function, loss), modifiers, nll=0.5, temperature=0.7)
    scores = model(model.batch(groups), objective.stats)
    logp_N, collision_N = scores.logp_N, scores.collision_N
    plain = pairs = pairs_of(logp_N, reference_N, update.rows, collision_N)
    for modify in modifiers:
        pairs = modify(pairs)
    chosen_N = update.rows.spread(torch.tensor([True, False]).repeat(len(groups)))
    expected = (function(pairs) * (1.0 if pairs.weight_P is None else pairs.weight_P)).mean()
    expected = expected - 0.5 * logp_N[chosen_N].mean()
    expected.backward()
    model.backward_done()
    wanted = torch.cat([p.grad.flatten() for p in model.trained().values()])
    assert float(wanted.norm()) > 1e-3
    for budget in (1, 20, EVERYTHING):
        learner = Learner(model, learning_rate=1.0, max_tokens_per_microbatch=budget, whole_groups=True)
        line = learner.gradient(objective.loss(), objective.prepared(update, learner), objective.stats)
        assert line["loss"] == pytest.approx(float(expected), abs=1e-9)
        assert float((learner.flat_gradient() - wanted).norm() / wanted.norm()) < 1e-9, budget
    alone = torch.cat([function(PairBatch.from_table(row[None])) for row in plain.table_PC])
    assert not torch.allclose(alone, function(plain), atol=1e-3), "it couples nothing"


MODIFIED = {
    "forward_kl": ([("f_divergence", {"kind": "forward_kl"})], lambda d, _: 1 - (-d).exp()),
    "jensen_shannon": ([("f_divergence", {"kind": "jensen_shannon"})], lambda d, _: (2 / (1 + (-d).exp())).log()),
    "alpha": ([("f_divergence", {"kind": "alpha", "alpha": 0.25})], lambda d, _: (1 - (-d / 4).exp()) * 4),
    "length": ([("length_desensitised", {"alpha": 0.5})], lambda d, excess: d - 0.5 * excess),
    "confidence": ([("confidence", {})], lambda d, _: d),
    "all": (
        [("length_desensitised", {"alpha": 0.0}), ("f_divergence", {"kind": "forward_kl"}), ("confidence", {})],
        lambda d, excess: 1 - (excess - d).exp(),
    ),
}
"""Modifiers, and what they make by hand of Δ, given also its part from the third action on."""


def agreed(model, groups) -> torch.Tensor:
    """Mean over the actions of the log-probability that two draws in their state are the same token."""
    logp_NV = model.distributions(model.batch(groups))(slice(None))
    return logp_NV.exp().square().sum(1).log().mean()


def test_modifiers_by_hand(tmp_path):
    """On the first update of stages that start away from their reference."""
    settings = {**ALL, "start": "sft", "steps": 1, "reference": "base", "loss": {"fn": "dpo", "args": {"beta": 0.3}}}
    stages = {
        name: {
            **settings,
            "modifiers": [{"fn": fn, "args": args} for fn, args in modifiers],
            "max_tokens_per_microbatch": 30,
        }
        for name, (modifiers, _) in MODIFIED.items()
    }
    run(tmp_path, {"sft": SFT, **stages})
    now, then = policy(tmp_path / "runs/run/sft/final"), policy(base(tmp_path))
    said = []
    for row in PREFERENCES:
        both = [[group(now, row["prompt"], row[side])] for side in ("chosen", "rejected")]
        said.append((both, [(logprobs(now, one), logprobs(then, one)) for one in both]))
    for name, (modifiers, changed) in MODIFIED.items():
        loss = []
        for both, ((chosen, chosen_then), (rejected, rejected_then)) in said:
            assert (len(chosen), len(rejected)) == (3, 2)
            better = changed((chosen - chosen_then).sum(), (chosen - chosen_then)[2])
            worse = changed((rejected - rejected_then).sum(), torch.tensor(0.0))
            weight = 1.0
            if modifiers[-1][0] == "confidence":
                likely = [x.mean() - agreed(now, one) for x, one in zip((chosen, rejected), both, strict=True)]
                weight = sum(likely).clamp(max=0).exp()
            loss.append(float(-F.logsigmoid(0.3 * (better - worse)) * weight))
        (line,) = metrics(tmp_path, name)
        assert line["preference_loss"] == pytest.approx(sum(loss) / len(loss), rel=1e-4), name
        assert line["loss"] == pytest.approx(line["preference_loss"], rel=1e-6)


@pytest.mark.parametrize("loss", ["dpo", "sppo"])
def test_modifiers_learn_with_any_loss(tmp_path, loss):
    modifiers = [{"fn": "length_desensitised"}, {"fn": "f_divergence", "args": {"kind": "jensen_shannon"}}]
    settings = {**ALL, "loss": {"fn": loss}, "modifiers": [*modifiers, {"fn": "confidence"}], "steps": 10}
    run(tmp_path, {"dpo": {**settings, "learning_rate": 1e-2}}, LORA)
    first, *_, last = metrics(tmp_path, "dpo")
    # Weighed by how likely both answers are against what the model would have said itself.
    assert 0 < first["loss"] < AT_THE_REFERENCE[loss]
    assert last["margin"] > 1
    assert last["accuracy"] > 0.8


def test_added_likelihood_is_a_token_mean_beside_a_coupled_loss_too(tmp_path):
    settings = {**ALL, "loss": {"fn": "aot"}, "nll_coef": 0.5, "steps": 1, "max_tokens_per_microbatch": 30}
    run(tmp_path, {"dpo": settings})
    model = policy(base(tmp_path))
    chosen_N = -logprobs(model, [group(model, r["prompt"], r["chosen"]) for r in PREFERENCES])
    (line,) = metrics(tmp_path, "dpo")
    assert line["preference_loss"] == pytest.approx(LOG_2, abs=1e-6)
    assert line["loss"] == pytest.approx(LOG_2 + 0.5 * float(chosen_N.mean()), rel=1e-5)


def test_a_users_own_loss_is_taken_over_whole_updates(tmp_path):
    """It may compare pairs with each other, which nobody can tell from outside."""
    (tmp_path / "mine.py").write_text(
        "def spread(pairs, *, times=1.0):\n    h = pairs.logp_P2[:, 0] - pairs.logp_P2[:, 1]\n"
        "    return times * (h - h.mean()) ** 2 + pairs.margin_P\n"
    )
    loss = {"fn": "mine.py:spread", "args": {"times": 3.0}}
    run(tmp_path, {"dpo": {**ALL, "loss": loss, "steps": 1, "max_tokens_per_microbatch": 1}})
    sum_P2 = sums(policy(base(tmp_path)))
    h_P = sum_P2[:, 0] - sum_P2[:, 1]
    (line,) = metrics(tmp_path, "dpo")
    assert line["loss"] == pytest.approx(3 * float(h_P.var(correction=0)), rel=1e-4)
