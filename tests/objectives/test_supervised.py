"""Supervised losses by hand."""

import math

import pytest
import torch

from rlpost.objectives import dynamic_fine_tuning, nll


def test_nll_by_hand():
    logp = torch.tensor([0.25, 1.0]).log().requires_grad_()
    assert nll(logp).tolist() == pytest.approx([math.log(4), 0.0])
    nll(logp).sum().backward()
    assert logp.grad.tolist() == [-1.0, -1.0]


def test_dynamic_fine_tuning_weighs_by_the_tokens_own_probability():
    logp = torch.tensor([0.25, 0.5], dtype=torch.float64).log().requires_grad_()
    loss = dynamic_fine_tuning(logp)
    assert loss.tolist() == pytest.approx([0.25 * math.log(4), 0.5 * math.log(2)])
    loss.sum().backward()
    assert logp.grad.tolist() == pytest.approx([-0.25, -0.5])


def test_its_gradient_raises_the_probability_itself():
    """−p·∇log p = −∇p: the loss descends on 1 − p."""
    logits = torch.tensor([0.3, -0.8, 1.1], dtype=torch.float64, requires_grad=True)
    found = torch.autograd.grad(dynamic_fine_tuning(logits.log_softmax(0)[:1]).sum(), logits)[0]
    expected = torch.autograd.grad(-logits.softmax(0)[0], logits)[0]
    assert torch.allclose(found, expected, rtol=0, atol=1e-15)


@pytest.mark.parametrize("loss", [nll, dynamic_fine_tuning])
def test_formats_and_nothing_at_all(loss):
    assert loss(torch.zeros(0)).shape == (0,)
    assert loss(torch.zeros(2, dtype=torch.float64)).dtype == torch.float64
    assert loss(torch.zeros(2, dtype=torch.bfloat16)).dtype == torch.float32
