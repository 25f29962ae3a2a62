"""The head on tiles of hidden states gives the model's own logits, or is not used."""

import pytest
import torch
from exactness import alone_logp
from families import FAMILIES, EndTokenOnly, tiny

from rlpost.policy.check import check_exactness
from rlpost.policy.heads import reproduced_head
from rlpost.policy.policy import Policy

IDS = torch.tensor([[5, 9, 2, 40, 7, 7, 61]])


@pytest.mark.parametrize("family", FAMILIES)
def test_the_reproduced_head_gives_the_models_own_logits(family):
    model = tiny(family, torch.float64)
    with torch.no_grad():
        hidden = model.base_model(IDS).last_hidden_state[0]
        expected = model(IDS).logits[0]
    assert (reproduced_head(model)(hidden) - expected).abs().max() <= 1e-12 * expected.abs().max()


@pytest.mark.parametrize(("family", "bare"), [("gemma2", 3.0), ("granite", 4.0), ("cohere", 4.0)])
def test_the_bare_output_layer_would_not_do(family, bare):
    model = tiny(family, torch.float64)
    with torch.no_grad():
        raw = model.get_output_embeddings()(model.base_model(IDS).last_hidden_state[0])
        expected = model(IDS).logits[0]
    assert not torch.allclose(raw, expected)
    by_hand = bare * torch.tanh(raw / bare) if family == "gemma2" else raw / bare
    assert torch.allclose(by_hand, expected, rtol=0, atol=1e-12)


def test_a_head_with_something_of_its_own_is_left_to_the_model(groups):
    """A bias on the logits that no configuration names."""
    model = tiny("llama")
    plain, bias = model.forward, torch.linspace(-2, 2, 64)

    def biased(*args, **kwargs):
        output = plain(*args, **kwargs)
        output.logits = output.logits + bias
        return output

    model.forward = biased
    exact = check_exactness(model, EndTokenOnly())
    assert (exact.flat, exact.tiled) == (True, False)
    policy = Policy(model, EndTokenOnly(), flat=True, tiled=False)
    found = policy(policy.batch(groups)).logp_N
    model.set_attn_implementation("eager")
    assert (found - alone_logp(model, groups)).abs().max() <= 1e-5
    tiled = Policy(model, EndTokenOnly(), flat=False, tiled=True)
    assert (tiled(tiled.batch(groups)).logp_N - found).abs().max() > 0.1


def test_a_trunk_that_is_not_where_it_usually_is_is_left_to_the_model():
    model = tiny("llama")
    type(model).base_model_prefix, kept = "elsewhere", type(model).base_model_prefix
    try:
        assert check_exactness(model, EndTokenOnly()).tiled is False
    finally:
        type(model).base_model_prefix = kept
