"""Guiding by a value network that keeps what it has read of each row, against the same network asked anew each time."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from engines import asked, local
from families import tiny

from rlpost.engine.params import Sampling
from rlpost.errors import EngineError
from rlpost.goals.goal_set import GoalSet
from rlpost.goals.value_network import ValueNetwork, ValueSettings
from rlpost.policy import adapters
from rlpost.policy.attention import FLAT, use_attention
from rlpost.policy.params import Lora
from rlpost.policy.policy import Decoding, Policy
from rlpost.policy.value_head import ValueHeadModel

PROMPTS = [(5, 9, 3, 8, 30, 31, 2, 7, 7, 12, 1), (4,), (3, 1, 2, 7, 5, 6, 44, 9)]
PROMPT_OF_ROW = [0, 0, 1, 2, 2]
GOAL = (7, 11, 5)
SETTINGS = ValueSettings(condition="{goal}?", avoid=False, target="monte_carlo", truncated_counts=True)
BEGIN, END = 62, 63


class Numbers:
    """A token a character; texts begin with a token of their own."""

    bos_token_id, eos_token_id, chat_template = BEGIN, END, None
    unk_token_id = unk_token = None

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return [BEGIN] * add_special_tokens + [ord(c) % 60 for c in text]

    def decode(self, ids, **_) -> str:
        return " ".join(map(str, ids))


def randomised(model: torch.nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for name, p in model.named_parameters():
        if "lora_" in name and p.requires_grad:
            p.data = 0.3 * torch.randn(p.shape, generator=generator, dtype=p.dtype)


def policy_of(family: str, dtype: torch.dtype, *, lora: bool, seed: int = 0) -> Policy:
    model = tiny(family, dtype, seed=seed, scale=3.0)
    use_attention(model, FLAT)
    if lora:
        model = adapters.add_policy_adapter(model, Lora(r=2, alpha=4.0)).to(dtype)
        randomised(model, seed)
    return Policy(model, Numbers(), flat=True).eval()


def network_of(trunk: Policy, adapter: str = adapters.POLICY, settings: ValueSettings = SETTINGS) -> ValueNetwork:
    network = ValueHeadModel(trunk, adapter, trains_trunk=False)
    generator = torch.Generator().manual_seed(3)
    network.head.weight.data = torch.randn(
        network.head.weight.shape, generator=generator, dtype=network.head.weight.dtype
    )
    return ValueNetwork(network.requires_grad_(False).eval(), settings, GOAL)


def pair(
    kind: str, family: str = "mistral", settings: ValueSettings = SETTINGS, dtype: torch.dtype = torch.float32
) -> tuple[Policy, ValueNetwork]:
    """A policy, and a network that is an adapter on the same base or a model of its own."""
    policy = policy_of(family, dtype, lora=kind == "shared")
    if kind == "own":
        return policy, network_of(policy_of(family, dtype, lora=False, seed=1), settings=settings)
    state = {n: x + 0.2 for n, x in adapters.adapter_state(policy.model, adapters.POLICY).items()}
    adapters.add_adapter(policy.model, "value", state)
    policy.model.to(dtype)
    return policy, network_of(policy, "value", settings)


def by_whole_prefixes(guide):
    return replace(guide, follow=None)


KINDS = pytest.mark.parametrize("kind", ["own", "shared"])


@KINDS
@pytest.mark.parametrize("condition", [None, "{goal}?"])
@pytest.mark.parametrize("candidates", [6, 0])
def test_values_are_those_of_whole_prefixes(kind, condition, candidates):
    policy, network = pair(kind, settings=replace(SETTINGS, condition=condition), dtype=torch.float64)
    prompts = [(BEGIN, *p) for p in PROMPTS]
    guide = network.guide(GoalSet([GOAL]), policy.end_ids, candidates)
    followed, anew = (g.begin(prompts, PROMPT_OF_ROW, [12] * 5) for g in (guide, by_whole_prefixes(guide)))
    assert followed._values is not None
    assert anew._values is None
    generator = torch.Generator().manual_seed(0)
    rows, values = 5, set()
    for t in range(10):
        logits = 3 * torch.randn(rows, 64, generator=generator, dtype=torch.float64)
        going = torch.tensor([b != t % rows for b in range(rows)])
        weight, expected = (g.weigh(logits, going) for g in (followed, anew))
        assert torch.equal(weight.isfinite(), expected.isfinite())
        assert float((weight - expected).nan_to_num(0, 0, 0).abs().max()) < 1e-9
        assert weight[t % rows].tolist() == [0.0] * 64
        values |= set(weight[weight.isfinite()].tolist())
        for g in (followed, anew):
            g.append(logits.argmax(1))
        if t in (3, 6):
            stay = torch.tensor([0, 2, 3, 4] if t == 3 else [1, 3])
            rows = len(stay)
            for g in (followed, anew):
                g.keep(stay)
    assert max(values) - min(values) > 1, "a value that says something"


@KINDS
@pytest.mark.parametrize("avoid", [False, True])
@pytest.mark.parametrize("greedy", [False, True])
def test_samples_are_the_same(kind, avoid, greedy):
    policy, network = pair(kind, settings=replace(SETTINGS, avoid=avoid))
    guide = network.guide(GoalSet([(token,) for token in range(0, 64, 2 if avoid else 1)]), policy.end_ids, 8)
    sampling = Sampling(max_new_tokens=20, temperature=0.7)
    sampled = [
        local(policy, guide=g).generate(asked(PROMPTS, 6, sampling, [1, 2, 3], greedy))
        for g in (guide, by_whole_prefixes(guide), None)
    ]
    followed, anew, free = ([c for some in found for c in some] for found in sampled)
    ids = [[c.ids.tolist() for c in some] for some in (followed, anew, free)]
    assert ids[0] == ids[1] != ids[2]
    assert greedy or avoid or len({len(c.ids) for c in followed}) > 1, "rows should leave at different times"
    logprobs = [torch.tensor([x for c in some for x in c.logprobs]) for some in (followed, anew)]
    assert float((logprobs[0] - logprobs[1]).abs().max()) < 1e-5
    if kind == "shared":
        assert {m._active_adapter[0] for m in policy.model.modules() if hasattr(m, "lora_A")} == {adapters.POLICY}


@KINDS
def test_a_network_without_such_a_cache_is_asked_anew(kind):
    """And on flat rows, if it is scored on such, whatever attention the policy decodes with meanwhile."""
    policy, network = pair(kind)
    requests = asked(PROMPTS, 2, Sampling(max_new_tokens=12), [1, 2, 3])
    expected = local(policy, guide=network.guide(GoalSet([GOAL]), {END}, 8)).generate(requests)
    policy.decoding = network._model.trunk.decoding = Decoding.padded
    assert network.follow(PROMPTS, [0, 1, 2], 12) is None
    found = local(policy, guide=network.guide(GoalSet([GOAL]), {END}, 8)).generate(requests)
    assert [[c.ids.tolist() for c in some] for some in found] == [[c.ids.tolist() for c in some] for some in expected]


def test_bfloat16_values_are_read_in_float32():
    """The engine samples under autocast, where a head would say three digits."""
    policy, network = pair("own")
    for trunk in (policy, network._model.trunk):
        trunk.in_bfloat16 = True
    guide = network.guide(GoalSet([GOAL]), {END}, 6)
    logits, going = torch.randn(5, 64), torch.ones(5, dtype=torch.bool)
    for g in (guide, by_whole_prefixes(guide)):
        plain, under = (nullcontext(), torch.autocast("cpu", torch.bfloat16))
        said = []
        for context in (plain, under):
            with context, torch.no_grad():
                said.append(g.begin(PROMPTS, PROMPT_OF_ROW, [12] * 5).weigh(logits, going))
        assert torch.equal(*said)


def test_texts_that_the_network_cannot_read():
    policy, network = pair("own", "gpt2")
    guide = network.guide(GoalSet([GOAL]), policy.end_ids, 8)
    # 128 positions: a prompt of 11 tokens, three of the goal and a question mark.
    guide.begin(PROMPTS, [0, 1, 2], [113] * 3)
    with pytest.raises(
        EngineError, match="a text of 129 tokens, its goal among them, is beyond the 128 that the value"
    ):
        guide.begin(PROMPTS, [0, 1, 2], [114] * 3)
