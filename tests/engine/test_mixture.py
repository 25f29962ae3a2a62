"""Sampling from a mixture of policy and reference: each token by its distribution, as the two models compute it."""

from __future__ import annotations

import pytest
import torch
from engines import asked, local
from stubs import tiny_policy

from rlpost.engine.mixture import ReferenceMixture
from rlpost.engine.params import Sampling
from rlpost.policy import adapters
from rlpost.policy.params import Lora
from rlpost.policy.policy import Policy
from rlpost.policy.reference import Reference
from rlpost.types import Group

PROMPTS = [[5, 9, 3, 8], [4], [11, 12, 13, 60]]
SEEDS = [101, 102, 103]
SAMPLING = Sampling(max_new_tokens=12, temperature=0.8)


def with_adapter(policy: Policy) -> Policy:
    """The policy with a LoRA that has been trained, so that its base is another model."""
    made = policy.around(adapters.add_policy_adapter(policy.model, Lora(r=2)), bfloat16=False)
    with torch.no_grad():
        for p in made.trained().values():
            p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(1)) * 0.3)
    return made.eval()


def two(kind: str) -> tuple[Policy, Reference]:
    if kind == "lora":
        policy = with_adapter(tiny_policy("llama", eos=3))
        return policy, Reference(policy, None)
    return tiny_policy("llama", eos=3), Reference(tiny_policy("llama", eos=3, seed=7), None)


def distributions(reference: Reference, groups: list[Group]) -> torch.Tensor:
    """[N, V] logits over the temperature, at every action."""
    with reference.acting():
        policy = reference.policy
        return policy.distributions(policy.batch(groups))(slice(None)) / SAMPLING.temperature


@pytest.mark.parametrize("kind", ["full", "lora"])
@pytest.mark.parametrize("share", [0.3, 1.0])
def test_tokens_are_drawn_from_the_mixture_in_each_state(kind, share):
    policy, reference = two(kind)
    own = Reference(policy, adapters.POLICY if kind == "lora" else None)
    engine = local(policy, guide=ReferenceMixture(reference, share, SAMPLING.temperature))
    requests = asked(PROMPTS, 4, SAMPLING, SEEDS)
    found = engine.generate(requests)
    groups = [Group(tuple(p), c) for p, c in zip(PROMPTS, found, strict=True)]
    ids = torch.tensor([i for g in groups for c in g.completions for i in c.ids])
    sampled = torch.tensor([x for g in groups for c in g.completions for x in c.logprobs])
    policy_NV, reference_NV = distributions(own, groups), distributions(reference, groups)
    mixed_NV = ((1 - share) * policy_NV + share * reference_NV).log_softmax(1)
    assert torch.allclose(sampled, mixed_NV.gather(1, ids[:, None])[:, 0], atol=2e-5)
    assert len({len(c.ids) for g in groups for c in g.completions}) > 1, "rows leave at different times"
    assert (policy_NV.log_softmax(1) - mixed_NV).abs().max() > 0.1, "the two differ"


def test_at_a_share_of_1_completions_are_the_references():
    policy, reference = two("full")
    guided = local(policy, guide=ReferenceMixture(reference, 1.0, SAMPLING.temperature))
    plain = local(reference.policy)
    requests = asked(PROMPTS, 2, SAMPLING, SEEDS)
    for one, other in zip(guided.generate(requests), plain.generate(requests), strict=True):
        assert [tuple(c.ids) for c in one] == [tuple(c.ids) for c in other]
