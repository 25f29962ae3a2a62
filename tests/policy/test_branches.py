"""Candidates tried out on a cached prefix, against whole prefixes run from their beginning."""

from __future__ import annotations

import pytest
import torch
from families import FAMILIES, EndTokenOnly, tiny

from rlpost.policy import branches
from rlpost.policy.attention import FLAT, use_attention
from rlpost.policy.branches import BranchDecoder, branches_well
from rlpost.policy.policy import Decoding, Policy
from rlpost.types import Completion, Group

PROMPTS = [(5, 9, 3, 8, 30, 31, 2, 7, 7, 12, 1), (4,), (3, 1, 2, 7, 5, 6, 44, 9)]
PROMPT_OF_ROW = [0, 0, 0, 1, 2, 2]
LEAVE = {1: [0, 2, 3, 4, 5], 3: [0, 2, 3], 4: [1]}
"""After so many tokens, the rows that go on; in the end neither the first nor the last prompt is left."""


def trunk(family: str) -> Policy:
    model = tiny(family, torch.float64)
    use_attention(model, FLAT)
    return Policy(model, EndTokenOnly(), flat=True).eval()


@torch.no_grad()
def whole(policy: Policy, texts: list[tuple[int, ...]], candidate_BK: torch.Tensor) -> torch.Tensor:
    """[B, K, D] the states after each text with each candidate, by passes over all of their tokens."""
    found = []
    for text, candidates in zip(texts, candidate_BK.tolist(), strict=True):
        batch = policy.batch([Group(text, tuple(Completion((token,), (True,)) for token in candidates))])
        found.append(policy.states(batch)[batch.after_N])
    return torch.stack(found)


def tried(decoder: BranchDecoder, candidate_BK: torch.Tensor) -> torch.Tensor:
    return torch.cat(list(decoder.branch(candidate_BK)), 1)


@torch.no_grad()
def differences(policy: Policy, steps: int = 12, candidates: int = 5) -> list[float]:
    """Of every step, while rows leave on the way."""
    generator = torch.Generator().manual_seed(0)
    decoder = BranchDecoder(policy, PROMPTS, PROMPT_OF_ROW, steps)
    texts = [PROMPTS[p] for p in PROMPT_OF_ROW]
    found = []
    for t in range(steps):
        candidate_BK = torch.randint(0, 64, (len(texts), candidates), generator=generator)
        found.append(float((tried(decoder, candidate_BK) - whole(policy, texts, candidate_BK)).abs().max()))
        chosen = candidate_BK[:, t % candidates]
        decoder.take(chosen)
        texts = [(*text, token) for text, token in zip(texts, chosen.tolist(), strict=True)]
        if stay := LEAVE.get(t):
            decoder.keep(torch.tensor(stay))
            texts = [texts[b] for b in stay]
    return found


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_candidates_see_what_whole_prefixes_do(family):
    """Windows of 6 to 8 tokens, soft caps and sinks among them; the last row is longer than every window."""
    assert max(differences(trunk(family))) < 1e-9


def test_however_few_run_at_once(monkeypatch):
    monkeypatch.setattr(branches, "CANDIDATES_AT_ONCE", 7)
    assert max(differences(trunk("gemma2"))) < 1e-9


def test_room_grows_with_the_rows(monkeypatch):
    monkeypatch.setattr("rlpost.policy.cache.FIRST_ROOM", 2)
    assert max(differences(trunk("llama"))) < 1e-9


@torch.no_grad()
def test_tokens_may_be_taken_without_a_look_at_what_may_follow():
    policy = trunk("llama")
    decoder = BranchDecoder(policy, [PROMPTS[0]], [0, 0], 4)
    for token in (3, 4, 5):
        decoder.take(torch.tensor([token, token + 1]))
    candidate_BK = torch.tensor([[7, 8], [9, 1]])
    texts = [(*PROMPTS[0], 3, 4, 5), (*PROMPTS[0], 4, 5, 6)]
    assert float((tried(decoder, candidate_BK) - whole(policy, texts, candidate_BK)).abs().max()) < 1e-9


def test_other_ways_of_decoding_are_told_apart():
    policy = trunk("llama")
    assert branches_well(policy, 40, 3)
    for decoding in (Decoding.padded, Decoding.recomputed):
        policy.decoding = decoding
        assert not branches_well(policy, 40, 3)
    policy.decoding, policy.switch = Decoding.flat, 20
    assert branches_well(policy, 20, 3)
    assert branches_well(policy, 40, 21)
    assert not branches_well(policy, 21, 20)
