"""Comparison with another policy: who is preferred, what exploration is of, and what makes a mixture of logits."""

from __future__ import annotations

import pytest
import torch

from rlpost.objectives import exploration, preferred, towards_reference

NAN = float("nan")


def test_a_completion_is_compared_with_all_of_the_other_policys():
    reward_PG = torch.tensor([[1.0, 0.0], [2.0, NAN]], dtype=torch.float64)
    other_PO = torch.tensor([[0.0, 1.0, 1.0], [2.0, NAN, 0.0]], dtype=torch.float64)
    won = preferred(reward_PG, other_PO, preference="step")
    assert won[0].tolist() == pytest.approx([2 / 3, 1 / 6])
    assert won[1, 0].item() == 0.75
    assert won[1, 1].isnan()
    likely = preferred(reward_PG, other_PO, scale=0.5)
    up = torch.tensor(2.0, dtype=torch.float64).sigmoid().item()
    assert likely[0].tolist() == pytest.approx([(up + 1) / 3, (0.5 + 2 * (1 - up)) / 3])
    assert preferred(torch.ones(1, 1), torch.full((1, 2), NAN)).isnan().all()


def test_exploration_is_of_what_the_other_policy_did():
    logp_N = torch.tensor([-1.0, -2.0, -3.0], dtype=torch.bfloat16, requires_grad=True)
    found = exploration(logp_N, torch.tensor([True, False, True]))
    assert found.tolist() == [-1.0, 0.0, -3.0]
    assert found.dtype == torch.float32
    found.sum().backward()
    assert logp_N.grad.tolist() == [1.0, 0.0, 1.0]


@pytest.mark.parametrize("share", [0.0, 0.25, 1.0])
def test_logits_become_those_of_the_mixture(share):
    own, reference = torch.tensor([[2.0, 0.0, -1.0]]), torch.tensor([[0.0, 1.0, 1.0]])
    mixed = (own + towards_reference(own, reference, share=share)).softmax(1)
    wanted = own.softmax(1) ** (1 - share) * reference.softmax(1) ** share
    assert torch.allclose(mixed, wanted / wanted.sum())


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: preferred(torch.ones(1, 1), torch.ones(1, 1), preference="better"), "preference='better': rewards"),
        (lambda: preferred(torch.ones(1, 1), torch.ones(1, 1), scale=0.0), "scale=0.0: the scale of differences"),
        (lambda: towards_reference(torch.ones(1, 2), torch.ones(1, 2), share=1.1), "share=1.1: the reference's share"),
        (lambda: towards_reference(torch.ones(1, 2), torch.ones(1, 2), share=-0.1), "share=-0.1: the reference's"),
    ],
)
def test_what_cannot_be_is_refused(call, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        call()
