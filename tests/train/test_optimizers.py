"""Optimisers by name: which weights each one steps, by which step, and that a resumed one goes on bit for bit."""

from __future__ import annotations

import importlib.util

import pytest
import torch
from exactness import sample_groups
from families import VOCABULARY
from test_learner import assert_resumes, make_learner, make_policy, simple, snapshot, weighted_nll
from tiny_recipes import SFT, write

from rlpost.errors import RecipeError
from rlpost.pipeline import preflight
from rlpost.policy.adapters import POLICY
from rlpost.policy.value_head import ValueHeadModel
from rlpost.recipe.resolve import resolve
from rlpost.train.experience import Experience
from rlpost.train.params import OptimizerName

ADAMW, ADAMW_8BIT, MUON = OptimizerName
FLOAT = torch.float32
LARGE_RANK = 64
"""Of adapters with moments of 8 bits, which matrices of 4096 numbers have."""


# --- Which weights


@pytest.mark.parametrize(
    ("family", "layers"),
    [
        ("llama", {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}),
        ("gpt2", {"c_attn", "c_proj", "c_fc"}),  # Conv1D, and two embeddings, one of them the head
    ],
)
def test_the_matrices_of_layers_are_those_of_their_linear_modules(family, layers):
    policy = make_policy(family)
    found = policy.layer_matrices()
    assert {name.split(".")[-2] for name in found} == layers
    everything = {n for n, p in policy.trained().items() if p.ndim == 2}
    assert {name.split(".")[-2] for name in everything - found} <= {"embed_tokens", "lm_head", "wte", "wpe"}
    assert everything - found


def test_low_rank_factors_are_matrices_of_layers():
    policy = make_policy("llama", FLOAT, lora=True)
    assert policy.layer_matrices() == policy.trained().keys()


def test_a_value_head_and_the_unused_output_head_are_none():
    model = ValueHeadModel(make_policy("llama", FLOAT), POLICY)
    found = model.layer_matrices()
    assert found == make_policy("llama", FLOAT).layer_matrices()
    assert {"head.weight", "head.bias"} <= model.trained().keys() - found


def test_a_value_head_alone_has_adamw():
    model = ValueHeadModel(make_policy("llama", FLOAT), POLICY, trains_trunk=False)
    learner = make_learner(model, learning_rate=0.01, optimizer=MUON)

    def squares(values, part):
        return (values.before_N - 1).square().sum(), {}

    learner.update(squares, Experience(tuple(sample_groups(VOCABULARY)[:1])))
    assert {key.rsplit("/")[1] for key in learner.optimizer_state()} == {"step", "exp_avg", "exp_avg_sq"}


# --- The step


def stepped(policy, optimizer: OptimizerName, updates: int = 3):
    """Weights before, gradients of every update, and the learner after them."""
    learner = make_learner(policy, learning_rate=0.01, weight_decay=0.5, betas=(0.8, 0.9), optimizer=optimizer)
    before, gradients = snapshot(learner.weights()), []
    for number in range(updates):
        learner.update(weighted_nll, simple(policy, seed=number))
        gradients.append({name: p.grad.clone() for name, p in policy.trained().items()})
    return before, gradients, learner


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_muon_steps_matrices_of_layers_as_torch_does_and_adamw_all_else(lora):
    policy = make_policy("llama", FLOAT, lora=lora)
    before, gradients, learner = stepped(policy, MUON)
    layers = policy.layer_matrices()
    for name, after in learner.weights().items():
        p = torch.nn.Parameter(before[name].clone())
        decay = 0.5 if p.ndim >= 2 else 0.0
        reference = (
            torch.optim.Muon([p], lr=0.01, weight_decay=decay, momentum=0.95, adjust_lr_fn="match_rms_adamw")
            if name in layers
            else torch.optim.AdamW([p], lr=0.01, weight_decay=decay, betas=(0.8, 0.9), fused=True)
        )
        for gradient in gradients:
            p.grad = gradient[name]
            reference.step()
        assert torch.equal(after, p), name


def test_a_step_of_muon_turns_all_directions_by_the_length_that_adamw_has():
    """By hand: all singular values of the step are about equal, and a number of it is about 0.2 · learning rate."""
    policy = make_policy("llama", FLOAT)
    learner = make_learner(policy, learning_rate=0.01, optimizer=MUON)
    before = snapshot(learner.weights())
    learner.update(weighted_nll, simple(policy))
    for name in policy.layer_matrices():
        step = learner.weights()[name] - before[name]
        gradient = torch.linalg.svdvals(policy.trained()[name].grad)
        directions = int((gradient > 1e-3 * gradient[0]).sum())
        lengths = torch.linalg.svdvals(step)[:directions] / (0.01 * 0.2 * max(step.shape) ** 0.5)
        # The iteration leaves them between 0.5 and 1.5, and the smallest ones of all below.
        assert lengths.max() < 1.3, name
        assert lengths.median() > 0.6, name


@pytest.mark.extras
@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_adamw_of_8_bits_stays_near_that_of_32(lora):
    """The first step is AdamW's; after three, what rounding moments has added is a few percent of the way."""

    def policy():
        return make_policy("llama", FLOAT, lora=lora, wide=True, r=LARGE_RANK)

    first, rounded_first = (stepped(policy(), name, updates=1)[2].weights() for name in (ADAMW, ADAMW_8BIT))
    for name, known in first.items():
        assert torch.allclose(rounded_first[name], known, rtol=1e-5, atol=1e-7), name
    (before, _, exact), (_, _, rounded) = (stepped(policy(), name) for name in (ADAMW, ADAMW_8BIT))
    # Smaller ones keep moments of 32 bits, as bitsandbytes has it.
    large = [name for name in policy().layer_matrices() if before[name].numel() >= 4096]
    gaps = {
        name: float((rounded.weights()[name] - known).norm() / (known - before[name]).norm())
        for name, known in exact.weights().items()
    }
    assert all(1e-4 < gaps[name] < 0.1 for name in large), gaps
    assert large

    def size(learner) -> int:
        return sum(x.nbytes for key, x in learner.optimizer_state().items() if key.rsplit("/")[0] in large)

    numbers = sum(before[name].numel() for name in large)
    # Two moments: of 4 bytes each; of one byte, with a scale for every 256, beside two tables of 256 and the count.
    assert size(exact) == 8 * numbers + 4 * len(large)
    assert size(rounded) == 2 * numbers + 2 * 4 * numbers // 256 + (2 * 4 * 256 + 8) * len(large)


# --- Resuming


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("optimizer", [MUON, pytest.param(ADAMW_8BIT, marks=pytest.mark.extras)])
def test_a_learner_that_was_saved_and_loaded_goes_on_bit_for_bit(optimizer, lora):
    assert_resumes(
        lambda: make_policy("llama", FLOAT, lora=lora, wide=True, r=LARGE_RANK),
        [weighted_nll] * 4,
        at=2,
        settings={"optimizer": optimizer},
    )


def test_without_the_package_one_line_says_what_installs_it(tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    recipe = write(tmp_path, {"sft": {**SFT, "optimizer": "adamw_8bit"}})
    with pytest.raises(RecipeError, match=r"^stages\.sft\.optimizer: adamw_8bit needs .* pip install 'rlpost\[bnb\]'"):
        preflight(resolve(str(recipe)))
