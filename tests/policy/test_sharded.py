"""Weights in shards: the same gradients, steps and samples as whole ones, less memory, and what cannot be sharded."""

from __future__ import annotations

from functools import partial

import peft
import pytest
import torch
from families import tiny
from invariance import gap, in_shards, on_processes, whole
from sharding import bytes_kept, gradients, names_of_gradients, steps
from stage_updates import CASES
from stubs import tiny_policy
from worlds import World

from rlpost import ranks
from rlpost.engine.divided import DividedEngine
from rlpost.engine.local import LocalEngine
from rlpost.engine.params import Sampling
from rlpost.errors import ModelError
from rlpost.policy.attention import FLAT, use_attention
from rlpost.policy.policy import Policy
from rlpost.policy.sharded import blocks_of, is_sharded, like, whole_state
from rlpost.policy.sharded import whole as gathered
from rlpost.train.learner import Learner
from rlpost.types import Request

EXACT = {"gpt2": 1e-12}
"""Others compute norms and rotations in float32, whatever the weights are."""
COARSE = 1e-6
QUICK = ["sft nll", "dpo aot", "reward_model pairs", "grpo whiten", "ppo critic", "trpo gradient"]
REQUESTS = [Request((1, 2, 3, n % 7 + 1), 1 + n % 3, Sampling(max_new_tokens=3 + 4 * (n % 4)), n) for n in range(7)]
"""Of several lengths, so that ranks sample different numbers of tokens."""


def works() -> dict[str, object]:
    """Everything that the quick tests ask of a rank, in one start of the processes."""
    return {
        "gradients": gradients(QUICK),
        "steps": steps("gpt2", torch.float64, 5),
        "samples": samples(),
        "lora": lora(),
        "bytes": bytes_kept(),
        "state": {name: x.clone() for name, x in whole_state(in_shards(world().policy()).model).items()},
        "like": shards_again(),
        "checkpointing": checkpointing(),
        "bfloat16": bfloat16(),
    }


def world() -> World:
    return World("llama", torch.float64)


def samples(*, sharded: bool = True) -> list[tuple[list[int], list[float]]]:
    policy = tiny_policy(dtype=torch.float64)
    engine = LocalEngine(in_shards(policy) if sharded else policy)
    engine.update_weights(policy, 0)
    found = DividedEngine(engine).generate(REQUESTS) if sharded else engine.generate(REQUESTS)
    return [(c.ids.tolist(), c.logprobs.tolist()) for some in found for c in some]


def with_adapter() -> Policy:
    torch.manual_seed(0)
    config = peft.LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)
    policy = world().policy()
    return policy.around(peft.get_peft_model(policy.model, config, adapter_name="policy"), bfloat16=False)


def lora(*, sharded: bool = True) -> dict[str, object]:
    policy = with_adapter()
    if sharded:
        in_shards(policy)
    learner = Learner(policy, learning_rate=1e-2, max_tokens_per_microbatch=30)
    case = CASES["sft nll"](world())
    update = case.prepare(list(range(len(case.groups))), learner)
    for _ in range(3):
        metrics = learner.update(update.loss, update.experience)
    return {
        "weights": learner.flat_weights(),
        "metrics": metrics,
        "whole": [name for name, p in policy.named_parameters() if not is_sharded(p)],
    }


def shards_again() -> bool:
    """A tensor that is made whole and sharded again is the same part of it."""
    policy = in_shards(world().policy())
    return all(torch.equal(like(gathered(p.detach()), p).to_local(), p.to_local()) for p in policy.parameters())


def sft_gradient(policy: Policy) -> torch.Tensor:
    learner = Learner(policy, learning_rate=1e-2, max_tokens_per_microbatch=30)
    case = CASES["sft nll"](world())
    update = case.prepare(list(range(len(case.groups))), learner)
    learner.gradient(update.loss, update.experience)
    return torch.cat([gathered(p.grad).flatten() for p in policy.trained().values()])


def checkpointing(*, sharded: bool = True) -> dict[str, object]:
    """With blocks computed again in the backward pass: the gradient, and forward passes of a block for one backward."""
    policy = world().policy()
    passes = [0, 0]

    def forward(*_: object) -> None:
        passes[0] += 1

    def backward(*_: object) -> None:
        passes[1] += 1

    layer = policy.causal_lm.model.layers[0].mlp
    layer.register_forward_pre_hook(forward)
    layer.register_full_backward_hook(backward)
    policy.causal_lm.gradient_checkpointing_enable({"use_reentrant": False})
    gradient = sft_gradient(in_shards(policy) if sharded else policy)
    return {"gradient": gradient, "again": passes[0] / passes[1]}


def bfloat16(*, sharded: bool = True) -> dict[str, object]:
    """Under autocast: the gradient, its type, and the type that a block's weights are gathered in."""
    model = World("llama", torch.float32).policy().around(tiny("llama"), bfloat16=True)
    use_attention(model.causal_lm, FLAT)
    seen = set()
    layer = model.causal_lm.model.layers[0].mlp.up_proj
    layer.register_forward_pre_hook(lambda module, _: seen.add(module.weight.dtype))
    gradient = sft_gradient(in_shards(model) if sharded else model)
    return {"gradient": gradient, "types": {gradient.dtype, *seen}}


@pytest.fixture(scope="module")
def found():
    """What each of two ranks finds."""
    return on_processes(2, works)


def test_gradients_are_those_of_whole_weights(found):
    for rank in found:
        for (family, name), measured in rank["gradients"].items():
            own = World(family, torch.float64)
            assert max(gap(measured, whole(CASES[name](own), own))) <= EXACT.get(family, COARSE), (family, name)


def test_steps_are_those_of_whole_weights(found):
    expected = steps("gpt2", torch.float64, 5, sharded=False)
    assert expected[1]["grad_norm/0"] > 0.1, "nothing was clipped"
    for rank in found:
        assert max(gap(rank["steps"], expected)) <= EXACT["gpt2"]


def test_samples_are_those_of_whole_weights(found):
    expected = samples(sharded=False)
    assert len({len(ids) for ids, _ in expected}) > 2, "all rows are of one length"
    for rank in found:
        assert [ids for ids, _ in rank["samples"]] == [ids for ids, _ in expected]
        for (_, own), (_, known) in zip(rank["samples"], expected, strict=True):
            assert own == pytest.approx(known, abs=1e-6)


def test_adapters_stay_whole_and_learn_as_ever(found):
    expected = lora(sharded=False)
    for rank in found:
        own = rank["lora"]
        assert all("lora_" in name for name in own["whole"])
        assert len(own["whole"]) == 2 * 7 * 2
        assert torch.allclose(own["weights"], expected["weights"], rtol=0, atol=1e-6)
        assert own["metrics"] == pytest.approx(expected["metrics"], rel=1e-5)


def test_blocks_may_be_computed_again(found):
    expected = checkpointing(sharded=False)["gradient"]
    for rank in found:
        assert torch.allclose(rank["checkpointing"]["gradient"], expected, rtol=0, atol=1e-6)
        assert rank["checkpointing"]["again"] == 2


def test_in_bfloat16_blocks_are_gathered_in_it_and_gradients_summed_in_float32(found):
    expected = bfloat16(sharded=False)["gradient"]
    exact = sft_gradient(World("llama", torch.float32).policy())
    rounding = float((expected - exact).norm() / exact.norm())
    for rank in found:
        own = rank["bfloat16"]
        assert own["types"] == {torch.float32, torch.bfloat16}
        assert float((own["gradient"] - expected).norm() / expected.norm()) < 2 * rounding


def test_each_rank_keeps_its_share(found):
    # With one rank of two, nothing is left over but what cannot be divided evenly.
    parameters = 8 * (6 * 256 * (2 * 256 + 2 * 128 + 3 * 4 * 256) + 2 * 64 * 256)
    for rank in found:
        kept = rank["bytes"]
        assert kept["gradients"] == kept["weights"]
        assert kept["weights"] == pytest.approx(parameters / 4, rel=0.01)
        assert kept["optimiser"] == pytest.approx(2 * kept["weights"], rel=0.01)


def test_whole_weights_are_in_the_first_ranks_memory(found):
    expected = world().policy().model.state_dict()
    first, second = (rank["state"] for rank in found)
    assert first.keys() == second.keys() == expected.keys()
    assert all(torch.equal(first[name], x) for name, x in expected.items())
    assert all(x.numel() == 0 for x in second.values())
    assert all(rank["like"] for rank in found)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("count", [2, 3, 6])
def test_every_stage_on_more_ranks(count):
    for rank in on_processes(count, partial(gradients, names_of_gradients())):
        for (family, name), measured in rank.items():
            own = World(family, torch.float64)
            assert max(gap(measured, whole(CASES[name](own), own))) <= EXACT.get(family, COARSE), (family, name)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_other_families():
    """Tied and untied heads, soft caps, experts, biases, windows."""
    families = ["qwen2", "qwen3", "gemma2", "gpt_neox", "granite", "cohere", "gpt_oss"]
    for rank in on_processes(2, partial(gradients, ["sft nll", "reward_model pairs"], families)):
        for (family, name), measured in rank.items():
            own = World(family, torch.float64)
            assert max(gap(measured, whole(CASES[name](own), own))) <= COARSE, (family, name)


def test_a_model_that_names_no_blocks_is_refused():
    model = tiny("llama")
    model._no_split_modules = None
    with pytest.raises(ModelError, match=r"does not say what its blocks are: use parallel.strategy=ddp"):
        blocks_of(model)


def test_ranks_that_are_alone_agree_with_themselves():
    assert ranks.anyone(True)
    assert not ranks.anyone(False)
