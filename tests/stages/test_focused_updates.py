"""What a stage does with a choice among an update's actions."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from tiny_recipes import GRPO, base, metrics, run, weights

from rlpost.objectives.focus import top_entropy
from rlpost.policy.logprobs import PolicyOutput
from rlpost.stages.focus import focusing
from rlpost.train.experience import Experience
from rlpost.types import Completion, Group

SHORT = {**GRPO, "steps": 2, "prompts_per_step": 6, "num_minibatches": 2, "learning_rate": 1e-2}


@pytest.mark.slow
def test_all_actions_are_an_update_as_it_was(tmp_path):
    one, other = (
        weights(run(tmp_path, {"grpo": {**SHORT, **more}}, f"run={name}"))
        for name, more in (("with", {"focus": {"fn": "top_entropy", "args": {"share": 1.0}}}), ("without", {}))
    )
    assert all(torch.equal(w, other[name]) for name, w in one.items())


def test_no_action_is_no_update(tmp_path):
    (tmp_path / "mine.py").write_text("def nothing(logp_N, old_logp_N, advantage_N):\n    return 0 * logp_N\n")
    final = run(tmp_path, {"grpo": {**SHORT, "focus": {"fn": "mine.py:nothing"}}})
    assert [line["grad_norm"] for line in metrics(tmp_path, "grpo")] == [0.0, 0.0]
    before = weights(base(tmp_path))
    assert all(torch.equal(w, before[name]) for name, w in weights(final).items())


def test_the_choice_is_of_the_whole_update_however_it_is_cut(tmp_path):
    stage = {**SHORT, "steps": 1, "focus": {"fn": "top_entropy", "args": {"share": 0.3}}}
    whole, cut = (
        weights(run(tmp_path, {"grpo": {**stage, "max_tokens_per_microbatch": budget}}, f"run=r{budget}"))
        for budget in (4096, 8)
    )
    for name, w in whole.items():
        assert torch.allclose(w, cut[name], rtol=0, atol=2e-5)
    norms = [[line["grad_norm"] for line in metrics(tmp_path, "grpo", f"r{budget}")] for budget in (4096, 8)]
    assert min(norms[0]) > 0
    assert norms[0] == pytest.approx(norms[1], rel=1e-4)


def test_the_function_sees_all_actions_under_the_policy_as_it_is():
    said = tuple(Completion((5,) * n, (True,) * n) for n in (2, 1))
    update = Experience((Group((1,), said),), needed_S=(True, False)).with_actions(
        old_logp=torch.tensor([-1.0, -2.0, -3.0]), advantage=torch.tensor([2.0, 2.0, 0.0])
    )
    asked = []

    def evaluate_no_grad(read, experience, stats):
        asked.append((experience.needed_S, stats.temperature, stats.entropy))
        return read(PolicyOutput(torch.tensor([-1.5, -2.5, -3.5]), torch.tensor([0.5, 0.1, 0.9])), experience)

    def focused(function):
        context = SimpleNamespace(function=lambda *_: function, seed_for=lambda _, number: number)
        cfg = SimpleNamespace(focus=object(), old_kl=None, sampling=SimpleNamespace(temperature=0.7))
        learner = SimpleNamespace(evaluate_no_grad=evaluate_no_grad, updates=0)
        return focusing(context, cfg, learner)(update)["advantage"].tolist()

    class Bound:
        def __init__(self, call):
            self.call = call

        def __call__(self, **given):
            return self.call(**given)

    assert focused(Bound(lambda entropy_N: top_entropy(entropy_N, share=0.6))) == [2.0, 0.0, 0.0]
    halves = Bound(lambda logp_N, old_logp_N, advantage_N: (old_logp_N - logp_N) * (advantage_N > 0))
    assert focused(halves) == [1.0, 1.0, 0.0]
    assert asked == [(None, 0.7, True), (None, 0.7, False)]


@pytest.mark.slow
def test_a_choice_of_another_length_is_told_by_its_place(tmp_path):
    (tmp_path / "mine.py").write_text("def one(entropy_N):\n    return entropy_N.mean()[None]\n")
    with pytest.raises(Exception, match=r"stages\.grpo\.focus: one returned 1 numbers for"):
        run(tmp_path, {"grpo": {**SHORT, "focus": {"fn": "mine.py:one"}}})
