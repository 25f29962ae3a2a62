"""An update that does not fit into memory is repeated from its beginning in smaller passes, as if they had been asked
for: the same gradient and the same random numbers, bit for bit; on several ranks, see test_invariance.py.
"""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from exactness import sample_groups
from families import VOCABULARY
from test_balance import made
from test_learner import assert_same, make_learner, make_policy, snapshot
from tiny_recipes import SFT, metrics, prepared
from worlds import Memory

from rlpost.errors import OutOfMemoryError
from rlpost.pipeline import train
from rlpost.policy.adapters import POLICY
from rlpost.policy.balance import balance_of
from rlpost.policy.policy import Policy
from rlpost.policy.score import logprobs
from rlpost.policy.value_head import ValueHeadModel
from rlpost.train.experience import Experience
from rlpost.train.random_state import random_state
from rlpost.types import Group, completions

GPU = "CUDA out of memory. Tried to allocate 2.00 GiB."
CPU = "[enforce fail at alloc_cpu.cpp:127] data. DefaultCPUAllocator: not enough memory: you tried to allocate 8 bytes."
ERRORS = [torch.OutOfMemoryError(GPU), RuntimeError(CPU), MemoryError("attention: no memory for one prompt")]


def update() -> Experience:
    groups = tuple(sample_groups(VOCABULARY))
    experience = Experience(groups)
    return experience.with_actions(weight=torch.linspace(0.1, 1, experience.rows.actions, dtype=torch.float64))


def nll(scores, part):
    return -(scores.logp_N * part["weight"]).sum(), {"nll": -scores.logp_N}


def tokens_of(groups: Sequence[Group]) -> int:
    """With each prompt once."""
    return sum(len(g.prompt) for g in groups) + sum(len(c.ids) for c in completions(groups))


WHOLE = tokens_of(update().groups)
HALF = WHOLE // 2


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize("error", ERRORS, ids=["gpu", "cpu", "kernel"])
def test_an_update_is_repeated_as_if_it_had_begun_with_the_smaller_budget(backward, error, capsys):
    learners = []
    for budget, memory in ((HALF, WHOLE), (WHOLE, WHOLE - 1)):
        policy = make_policy("llama", torch.float32)
        limit = Memory(policy, memory, backward=backward, error=error)
        learner = make_learner(policy, max_tokens_per_microbatch=budget)
        learner.location = "sft: step 1"
        lines = [learner.update(nll, update()) for _ in range(3)]
        learners.append((learner, lines, limit))
    (expected, known, never), (found, lines, once) = learners
    assert (never.failed, once.failed) == (0, 1)  # the smaller budget stays
    assert lines == known
    assert_same(found.weights(), expected.weights())
    assert_same(found.optimizer_state(), expected.optimizer_state())
    said = capsys.readouterr().err.replace("\n", " ")
    assert said.count("out of memory") == 1
    assert f"sft: step 1, update 1: out of memory with max_tokens_per_microbatch={WHOLE}" in said
    assert f"goes on with max_tokens_per_microbatch={HALF}" in said


def test_dropout_draws_what_it_would_have_drawn():
    found = []
    for budget, memory in ((HALF, WHOLE), (WHOLE, WHOLE - 1)):
        policy = make_policy("llama", lora=True, dropout=0.3)
        with torch.no_grad():
            for name, p in policy.trained().items():
                p.add_(0.1 if "lora_B" in name else 0)
        limit = Memory(policy, memory, backward=True)
        learner = make_learner(policy, max_tokens_per_microbatch=budget)
        torch.manual_seed(1)
        line = learner.gradient(nll, update())
        found.append((line, learner.flat_gradient(), random_state()["cpu"], limit.failed))
    (known, expected, drawn, never), (line, gradient, state, failures) = found
    assert never == 0
    assert failures > 0
    assert line == known
    assert torch.equal(gradient, expected)
    assert torch.equal(state, drawn)


def test_what_is_computed_without_gradient_fits_as_well():
    policy = make_policy()
    limit = Memory(policy, WHOLE - 1)
    learner = make_learner(policy, max_tokens_per_microbatch=WHOLE)
    known = make_learner(make_policy(), max_tokens_per_microbatch=HALF)
    assert learner.measure(nll, update()) == known.measure(nll, update())
    again = make_learner(policy, max_tokens_per_microbatch=WHOLE)
    found, expected = (each.evaluate_no_grad(lambda output, _: output.logp_N, update()) for each in (again, known))
    assert torch.equal(found, expected)
    assert limit.failed == 2


def test_a_value_head_whose_forward_pass_failed_is_asked_again():
    def squares(values, part):
        return values.before_N.square().sum(), {}

    found = []
    for budget, memory in ((HALF, WHOLE), (WHOLE, WHOLE - 1)):
        torch.manual_seed(0)
        policy = make_policy()
        Memory(policy, memory)
        learner = make_learner(ValueHeadModel(policy, POLICY), max_tokens_per_microbatch=budget)
        learner.gradient(squares, update())
        found.append(learner.flat_gradient())
    assert torch.equal(*found)


def test_the_balance_of_experts_is_counted_over_the_smaller_parts():
    found = []
    for budget, memory in ((HALF, WHOLE), (WHOLE, WHOLE - 1)):
        policy = made("mixtral")
        Memory(policy, memory)
        learner = make_learner(policy, max_tokens_per_microbatch=budget, balance=balance_of(policy.causal_lm, 1.0))
        found.append((learner.update(nll, update()), learner.flat_gradient()))
    (known, expected), (line, gradient) = found
    assert line == known
    assert torch.equal(gradient, expected)


def test_a_completion_that_does_not_fit_alone_ends_the_run_in_one_line():
    policy = make_policy()
    learner = make_learner(policy, max_tokens_per_microbatch=WHOLE)
    learner.update(nll, update())
    before, state = snapshot(learner.weights()), snapshot(learner.optimizer_state())
    limit = Memory(policy, 1)
    with pytest.raises(OutOfMemoryError, match="in a pass of one completion with its prompt") as caught:
        learner.update(nll, update())
    assert "\n" not in str(caught.value)
    assert "max_length" in str(caught.value)
    assert 1 < limit.failed < 8
    assert learner.updates == 1
    assert_same(learner.weights(), before)
    assert_same(learner.optimizer_state(), state)


def test_groups_that_are_compared_stay_whole():
    policy = make_policy()
    Memory(policy, 3)
    learner = make_learner(policy, max_tokens_per_microbatch=WHOLE, whole_groups=True)
    with pytest.raises(OutOfMemoryError, match="in a pass of one group"):
        learner.update(nll, update())


def test_another_error_is_not_taken_for_one_of_memory():
    policy = make_policy()
    Memory(policy, WHOLE - 1, error=RuntimeError("the sizes do not match"))
    with pytest.raises(RuntimeError, match="sizes do not match"):
        make_learner(policy, max_tokens_per_microbatch=WHOLE).update(nll, update())


# --- Without a learner


def test_scoring_halves_what_does_not_fit():
    policy, groups = make_policy(), update().groups
    expected = logprobs(policy, groups)
    longest = max(len(g.prompt) + len(c.ids) for g in groups for c in g.completions)
    limit = Memory(policy, longest)
    assert torch.allclose(logprobs(policy, groups), expected, rtol=0, atol=1e-12)
    assert limit.failed > 2
    limit = Memory(policy, longest - 1)
    with pytest.raises(OutOfMemoryError, match=r"one completion of .* tokens was scored; lower max_length"):
        logprobs(policy, groups)


# --- Through the front door


def test_a_stage_goes_on(tmp_path, monkeypatch, capsys):
    train(prepared(tmp_path, {"sft": SFT}, "run=whole", "stages.sft.max_tokens_per_microbatch=32"))
    plain = Policy._hidden

    def hidden(self, batch):
        if sum(p.ids_BT.numel() for p in batch.passes) > 40 and self.training:
            raise torch.OutOfMemoryError(GPU)
        return plain(self, batch)

    monkeypatch.setattr(Policy, "_hidden", hidden)
    train(prepared(tmp_path, {"sft": SFT}, "stages.sft.max_tokens_per_microbatch=64"))
    assert metrics(tmp_path, "sft") == metrics(tmp_path, "sft", "whole")
    assert "goes on with max_tokens_per_microbatch=32" in capsys.readouterr().err
