"""LoRA adapters of many shapes, made by peft: loaded, moved, merged and saved, each says what peft alone says."""

from __future__ import annotations

from collections.abc import Callable
from itertools import permutations
from pathlib import Path
from typing import Any

import pytest
from adapters_made import (
    EVERYTHING,
    GROUPS,
    LORA,
    alone,
    base_model,
    gap,
    lora,
    peft_alone,
    save_adapter,
    shaken,
    transformers_alone,
)
from safetensors.torch import load_file

from rlpost.policy.adapters import belongs, trained_now
from rlpost.policy.load import load_policy
from rlpost.policy.reference import Reference, reference_policy
from rlpost.policy.saved import save_policy
from rlpost.policy.score import logprobs

SHAPES: dict[str, dict[str, Any]] = {
    "attention": {"target_modules": ["q_proj", "v_proj"]},
    "all linear": {"target_modules": "all-linear"},
    "a pattern": {"target_modules": r".*layers\.1\.mlp\.(up|down)_proj"},
    "one layer": {"target_modules": ["q_proj"], "layers_to_transform": [1]},
    "without one": {"target_modules": ["q_proj", "k_proj"], "exclude_modules": ["k_proj"]},
    "ranks": {"target_modules": ["q_proj", "v_proj"], "rank_pattern": {"v_proj": 2}, "alpha_pattern": {"v_proj": 3}},
    "rank-stabilised": {"target_modules": ["q_proj"], "use_rslora": True},
    "dora": {"target_modules": ["q_proj", "down_proj"], "use_dora": True},
    "head": {"target_modules": ["q_proj", "lm_head"]},
    "embedding": {"target_modules": ["q_proj", "embed_tokens"]},
    "both ends": {"target_modules": ["embed_tokens", "lm_head"]},
    "saved head": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    "saved embedding": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
    "saved norm": {"target_modules": ["q_proj"], "modules_to_save": ["norm"]},
    "tokens": {"target_modules": ["q_proj"], "trainable_token_indices": [*GROUPS[0].prompt.tolist(), 258]},
}
QUICK = ("ranks", "dora", "head", "both ends", "saved head", "saved embedding", "tokens")
"""Tied, in every test run; the others when there is time."""
WORLDS = [
    pytest.param(
        shape, tied, id=f"{shape}{', tied' * tied}", marks=[] if tied and shape in QUICK else [pytest.mark.slow]
    )
    for shape in SHAPES
    for tied in (False, True)
]


@pytest.mark.parametrize(("shape", "tied"), WORLDS)
def test_right_from_loading_to_saving(here: Path, tally: Callable[..., None], shape: str, tied: bool) -> None:
    base = base_model(here, tied)
    folder = save_adapter(here / "adapter", base, lora(**SHAPES[shape]))
    wanted, bare = alone(peft_alone(base, folder)), alone(transformers_alone(base))
    assert gap(wanted, bare) > 0.05, "the adapter does nothing"

    policy = load_policy(folder, LORA)
    start, first = (reference_policy(policy, checkpoint, folder, LORA) for checkpoint in (folder, base))
    assert gap(logprobs(policy, GROUPS), wanted) < 1e-4
    shaken(list(policy.trained().values()), 6)
    moved = logprobs(policy, GROUPS)
    assert gap(moved, wanted) > 0.05
    assert gap(start.logprobs(GROUPS), wanted) < 1e-4, "the reference followed the policy"
    assert gap(first.logprobs(GROUPS), bare) < 1e-4, "the base followed the policy"

    save_policy(policy, here / "moved")
    assert gap(alone(peft_alone(base, here / "moved")), moved) < 1e-4
    assert gap(logprobs(load_policy(here / "moved", LORA), GROUPS), moved) < 1e-4

    full = load_policy(folder, EVERYTHING)
    assert gap(logprobs(full, GROUPS), wanted) < 1e-3
    shaken([p for p in full.parameters() if p.ndim > 1], 7, 0.02)
    save_policy(full, here / "full")
    assert gap(alone(transformers_alone(here / "full")), logprobs(full, GROUPS)) < 1e-3
    tally("adapter shapes", right=1)


PAIRS = [("ranks", "dora"), ("tokens", "head"), ("saved head", "attention")]
OTHER_PAIRS = [pair for pair in permutations(("attention", *QUICK), 2) if pair not in PAIRS]


@pytest.mark.parametrize(
    ("of_policy", "of_reference"), [*PAIRS, *(pytest.param(*pair, marks=pytest.mark.slow) for pair in OTHER_PAIRS)]
)
def test_a_reference_of_another_shape(
    here: Path, tally: Callable[..., None], of_policy: str, of_reference: str
) -> None:
    """Beside the policy's adapter where it can stand there, and a model of its own where it cannot."""
    base = base_model(here, tied=True)
    one, other = (save_adapter(here / n, base, lora(**SHAPES[n])) for n in (of_policy, of_reference))
    policy = load_policy(one, LORA)
    trains = trained_now(policy.model)
    reference = reference_policy(policy, other, one, LORA)
    now = trained_now(policy.model)
    assert all(now.get(name, flag) == flag for name, flag in trains.items())
    assert all(belongs(name, "policy") for name, flag in now.items() if flag)
    wanted = alone(peft_alone(base, other))
    for seed in (1, 2):
        assert gap(reference.logprobs(GROUPS), wanted) < 1e-4
        assert gap(Reference(policy, None).logprobs(GROUPS), alone(transformers_alone(base))) < 1e-4
        if seed == 1:
            assert gap(logprobs(policy, GROUPS), alone(peft_alone(base, one))) < 1e-4
        shaken(list(policy.trained().values()), seed)
    tally("adapter shapes", right=1)


@pytest.mark.parametrize("shape", ["embedding", "saved head", "tokens", "dora"])
def test_everything_of_it_trains(here: Path, shape: str) -> None:
    """What the adapter's file holds is what `trained` names, and all of it gets a gradient."""
    base = base_model(here)
    folder = save_adapter(here / "adapter", base, lora(**SHAPES[shape]))
    policy = load_policy(folder, LORA)
    file = load_file(folder / "adapter_model.safetensors")
    own = [name for name in file if "base_layer" not in name]
    assert len(policy.trained()) == len(own)
    policy(policy.batch(GROUPS)).logp_N.sum().backward()
    policy.backward_done()
    assert all(p.grad is not None and bool(p.grad.any()) for p in policy.trained().values())
    assert not any(p.grad is not None for n, p in policy.named_parameters() if not belongs(n, "policy"))
