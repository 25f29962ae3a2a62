"""What stages do to hold the entropy: a bonus that adapts, a KL to the old policy, and what is drawn by chance."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from moved import assert_same_result, fail_after
from tiny_recipes import GRPO, PPO, metrics, prepared, run

from rlpost.errors import RecipeError
from rlpost.objectives.surrogates import policy_gradient
from rlpost.policy.logprobs import PolicyOutput
from rlpost.recipe.grouped import OldKl
from rlpost.stages.entropy import EntropyBonus
from rlpost.stages.focus import focusing
from rlpost.stages.grpo import surrogate_loss
from rlpost.stages.on_policy import KlPenalty
from rlpost.stages.params import AdaptiveEntropy, Kl
from rlpost.train.experience import Experience
from rlpost.types import Completion, Group

SHORT = {**GRPO, "num_minibatches": 2, "learning_rate": 1e-2, "checkpoint_every": 2}
COVARIANCE = {"fn": "clip_covariance", "args": {"share": 0.2, "low": 0.0, "high": 9.0}}
HELD = {"beta": 4.0, "focus": {"fn": "top_covariance", "args": {"share": 0.5}}}


def sampled(entropy: float) -> SimpleNamespace:
    return SimpleNamespace(metrics={"entropy": entropy})


def adapting(coef: float = 0.0, **settings: float) -> EntropyBonus:
    return EntropyBonus(SimpleNamespace(entropy_coef=coef, adaptive_entropy=AdaptiveEntropy(target=0.5, **settings)))


def update_of(*lengths: int) -> Experience:
    said = tuple(Completion((5,) * n, (True,) * n) for n in lengths)
    ones = torch.ones(sum(lengths))
    return Experience((Group((1,), said),)).with_actions(advantage=ones, old_logp=-ones, sampled_logp=-ones)


def test_the_weight_of_the_bonus_follows_the_entropy_of_the_samples():
    bonus, weights = adapting(delta=0.25, largest=0.5), []
    assert bonus.wanted
    for entropy in (0.9, 0.4, 0.4, 0.4, 0.4, 0.6, 0.4):
        bonus.measure(sampled(entropy))
        weights.append(bonus.weight)
        assert bonus.metrics == {"entropy_coef": bonus.weight}
    assert weights == [0.0, 0.0, 0.25, 0.5, 0.5, 0.0, 0.25]


def test_the_bonus_goes_on_where_it_was_unless_the_recipe_says_otherwise():
    bonus = adapting(delta=0.25)
    bonus.measure(sampled(0.4))
    again, changed = adapting(delta=0.25), adapting(0.75, delta=0.25)
    for other in (again, changed):
        other.states["entropy"].load(bonus.state())
        other.measure(sampled(0.4))
    assert (again.weight, changed.weight) == (0.25, 0.75)


def test_the_bonus_goes_on_below_a_largest_weight_that_was_lowered():
    bonus, lowered = adapting(delta=0.25), adapting(delta=0.25, largest=0.125)
    bonus.measure(sampled(0.4))
    lowered.load(bonus.state())
    lowered.measure(sampled(0.4))
    assert lowered.weight == 0.125


def test_a_fixed_bonus_leaves_no_trace():
    for coef in (0.0, 0.1):
        bonus = EntropyBonus(SimpleNamespace(entropy_coef=coef, adaptive_entropy=None))
        bonus.measure(sampled(0.1))
        assert (bonus.weight, bonus.metrics, bonus.states, bonus.wanted) == (coef, {}, {}, coef > 0)


def test_what_is_drawn_goes_by_the_number_of_the_update():
    drawn = []

    class Keep:
        def call(self, logp_N, uniform_N):
            drawn.append(uniform_N)
            return torch.ones_like(logp_N)

        def __call__(self, **given):
            return self.call(**given)

    def evaluate_no_grad(read, experience, stats):
        return read(PolicyOutput(torch.zeros(experience.rows.actions)), experience)

    cfg = SimpleNamespace(focus=object(), old_kl=None, sampling=SimpleNamespace(temperature=1.0))
    context = SimpleNamespace(function=lambda *_: Keep(), seed_for=lambda purpose, n: {"focus": 100}[purpose] + n)
    for number in (0, 1, 0):
        learner = SimpleNamespace(evaluate_no_grad=evaluate_no_grad, updates=number)
        focusing(context, cfg, learner)(update_of(2, 3))
    assert torch.equal(drawn[0], drawn[2])
    assert not torch.equal(drawn[0], drawn[1])
    assert drawn[0].shape == (5,)
    assert bool(((drawn[0] >= 0) & (drawn[0] < 1)).all())


def test_without_a_function_all_actions_are_held():
    cfg = SimpleNamespace(focus=None, old_kl=OldKl(beta=0.5), sampling=SimpleNamespace(temperature=1.0))
    ready = focusing(SimpleNamespace(name="grpo"), cfg, SimpleNamespace(updates=0))
    assert ready(update_of(2))["old_kl"].tolist() == [0.5, 0.5]
    assert ready(update_of(2))["advantage"].tolist() == [1.0, 1.0]
    assert ready(update_of(0))["old_kl"].shape == (0,)
    # What another engine sampled counts by how much likelier the old policy was to say it.
    corrected = ready(update_of(2).with_actions(correction=torch.tensor([1.0, 0.25])))
    assert corrected["old_kl"].tolist() == [0.5, 0.125]
    assert corrected["advantage"].tolist() == [1.0, 1.0]


def test_the_kl_to_the_old_policy_is_weighed():
    """½·(r − 1 − log r) of the second action, r = e; the surrogate of advantage 0 is 0."""
    cfg = SimpleNamespace(
        loss=SimpleNamespace(fn="policy_gradient", args={}),
        old_kl=OldKl(),
        entropy_coef=0.0,
        adaptive_entropy=None,
    )
    part = update_of(2).with_actions(
        advantage=torch.zeros(2),
        old_kl=torch.tensor([0.0, 0.5]),
        weight=torch.ones(2),
    )
    loss = surrogate_loss(policy_gradient, cfg, KlPenalty(Kl(), None), EntropyBonus(cfg))
    total, line = loss(PolicyOutput(torch.tensor([3.0, 0.0])), part)
    e = 2.718281828
    assert float(total) == pytest.approx(0.5 * (e - 2))
    assert line["old_kl"].tolist() == pytest.approx([e**4 - 5, e - 2])


def test_killed_in_the_middle_it_ends_as_if_it_had_gone_through(tmp_path, monkeypatch):
    stage = {**SHORT, "steps": 3, "checkpoint_every": 1, "focus": COVARIANCE, "old_kl": HELD}
    stages = {"grpo": {**stage, "adaptive_entropy": {"target": 9.0, "delta": 0.1}}}
    run(tmp_path, stages, "run=whole")
    with monkeypatch.context() as patched:
        fail_after(5, patched)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path, stages)
    run(tmp_path, stages)
    assert_same_result(tmp_path, "grpo", lora=False)
    lines = metrics(tmp_path, "grpo")
    assert [line["entropy_coef"] for line in lines] == pytest.approx([0.0, 0.1, 0.2])
    assert min(line["old_kl"] for line in lines) > 0  # of a step's second update


def test_a_bonus_of_ppo_waits_for_the_warm_up(tmp_path):
    stage = {**PPO, "steps": 3, "prompts_per_step": 2, "critic": {"learning_rate": 1e-2, "warmup_steps": 1}}
    run(tmp_path, {"ppo": {**stage, "entropy_coef": 0.1, "adaptive_entropy": {"target": 9.0, "delta": 0.2}}})
    lines = metrics(tmp_path, "ppo")
    assert [line["entropy_coef"] for line in lines] == pytest.approx([0.1, 0.1, 0.3])
    for line in lines[1:]:
        assert line["exact_entropy"] > 0


@pytest.mark.slow
def test_the_kl_holds_the_policy_where_it_was(tmp_path):
    stage = {**GRPO, "num_iterations": 6, "loss": {"fn": "policy_gradient"}}
    moved = []
    for name, beta in (("free", 1e-6), ("held", 5.0)):
        run(tmp_path, {"grpo": {**stage, "old_kl": {"beta": beta}}}, f"run={name}")
        moved.append(sum(line["old_kl"] for line in metrics(tmp_path, "grpo", name)))
    assert moved[1] < 0.5 * moved[0]


@pytest.mark.slow
def test_a_choice_is_of_the_whole_update_however_it_is_cut(tmp_path):
    stage = {**SHORT, "steps": 1, "focus": COVARIANCE, "old_kl": HELD}
    norms = []
    for budget in (4096, 8):
        run(tmp_path, {"grpo": {**stage, "max_tokens_per_microbatch": budget}}, f"run=r{budget}")
        norms.append([line["grad_norm"] for line in metrics(tmp_path, "grpo", f"r{budget}")])
    assert norms[0] == pytest.approx(norms[1], rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("correction", [{}, {"correction": {"mode": "none"}}])
def test_second_moments_of_several_updates(tmp_path, correction):
    stage = {**SHORT, "num_minibatches": 4, "focus": {"fn": "second_moment", "args": {"limit": 0.0}}, **correction}
    run(tmp_path, {"grpo": stage})
    assert all(line["grad_norm"] > 0 for line in metrics(tmp_path, "grpo"))


def refused(tmp_path, stages, message):
    with pytest.raises(RecipeError, match=message):
        prepared(tmp_path, stages)


def test_what_cannot_be_is_refused(tmp_path):
    adaptive = {"target": 0.5, "largest": 0.1}
    for kind, stage in (("grpo", GRPO), ("ppo", PPO)):
        where = rf"stages\.{kind}\."
        wrong = {**stage, "entropy_coef": 0.2, "adaptive_entropy": adaptive}
        refused(tmp_path, {kind: wrong}, where + r"entropy_coef: 0\.2 is where the weight begins, and beyond")
        for key, value in (("target", 0.0), ("delta", 0.0), ("largest", -1.0)):
            refused(
                tmp_path,
                {kind: {**stage, "adaptive_entropy": {"target": 0.5, key: value}}},
                where + f"adaptive_entropy.{key}",
            )
        refused(tmp_path, {kind: {**stage, "adaptive_entropy": {}}}, where + r"adaptive_entropy\.target")
    recorded = {"data": {"mine": {"path": "pairs.jsonl"}}, "recorded": True, "adaptive_entropy": {"target": 0.5}}
    refused(tmp_path, {"grpo": {**GRPO, **recorded}}, r"stages\.grpo\.adaptive_entropy: it goes by the entropy")
    refused(tmp_path, {"grpo": {**GRPO, "old_kl": {"beta": 0.0}}}, r"stages\.grpo\.old_kl\.beta")
    refused(
        tmp_path, {"grpo": {**GRPO, "old_kl": {"focus": {"fn": "top_covariances"}}}}, "did you mean 'top_covariance'"
    )
    refused(tmp_path, {"ppo": {**PPO, "old_kl": {}}}, r"stages\.ppo\.old_kl")
    loss = {"fn": "squared_log_ratio", "args": {"tau": 0.1}}
    refused(
        tmp_path,
        {"grpo": {**GRPO, "focus": COVARIANCE, "loss": loss}},
        r"stages\.grpo\.focus: squared_log_ratio learns",
    )
