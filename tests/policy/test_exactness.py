"""Flat rows with shared prompts give what each completion gives alone, in every family that is said to be exact."""

import pytest
import torch
from exactness import alone_logp, measure, sample_groups
from families import FALLBACK, FAMILIES, VOCABULARY, EndTokenOnly, tiny

from rlpost.errors import ModelError
from rlpost.policy.attention import FLAT, use_attention
from rlpost.policy.check import Exactness, check_exactness
from rlpost.policy.layout import FlatLayout
from rlpost.policy.load import choose_rows
from rlpost.policy.params import Attention
from rlpost.policy.policy import Policy
from rlpost.types import Completion, Group, completions

FAILED = Exactness(False, True, 0.2, "flat rows differ from plain rows by 2.0e-01")


@pytest.mark.parametrize("family", FAMILIES)
def test_float32(family):
    gap = measure(family, torch.float32)
    assert (gap.exact.flat, gap.exact.tiled, gap.exact.reason) == (True, True, "")
    assert gap.logp <= 1e-5
    assert gap.gradient <= 1e-5


@pytest.mark.parametrize("family", FAMILIES)
def test_float64(family):
    gap = measure(family, torch.float64)
    assert gap.logp <= 1e-6
    assert gap.gradient <= 1e-6
    if family == "gpt2":  # nothing in it computes in float32 on its own
        assert max(gap.logp, gap.gradient) <= 1e-12


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_without_sharing_prompts(family):
    gap = measure(family, torch.float64, share=False)
    assert max(gap.logp, gap.gradient) <= 1e-6


def test_the_sample_has_every_shape_that_matters():
    groups = sample_groups(VOCABULARY)
    every = completions(groups)
    assert {len(g.completions) for g in groups} >= {1, 2, 4}
    assert any(not len(c.ids) for c in every)
    assert any(False in c.action[1:-1] and c.action[0] and c.action[-1] for c in every)
    windows = [c.get("sliding_window", 0) for c in FAMILIES.values()]
    assert max(len(g.prompt) for g in groups) > 2 * max(windows)
    assert max(len(c.ids) for c in every) > 2 * max(windows)


@pytest.mark.parametrize("family", ["mistral", "gemma2", "gemma3_text", "gpt_oss"])
def test_a_forgotten_window_is_found_even_if_it_is_longer_than_the_check(family, monkeypatch):
    """Models come with windows of thousands of tokens; the check shortens them while it looks."""
    model = tiny(family)
    for owner in (model.config, *model.modules()):
        if isinstance(getattr(owner, "sliding_window", None), int):
            owner.sliding_window = 4096
    honest = FlatLayout._mask
    monkeypatch.setattr(FlatLayout, "_mask", lambda self, number, _: honest(self, number, None))
    assert not check_exactness(model, EndTokenOnly()).flat
    assert model.config.sliding_window == 4096  # and it leaves the model as it was


@pytest.mark.parametrize("family", FALLBACK)
def test_families_beyond_flat_rows_run_on_padded_rows(family, groups):
    model = tiny(family)
    exact = check_exactness(model, EndTokenOnly())
    assert not exact.flat
    assert exact.gap > 0.01
    assert "differ" in exact.reason
    if not choose_rows(exact, Attention.auto, family):
        use_attention(model, "eager")
    policy = Policy(model, EndTokenOnly(), flat=False, tiled=exact.tiled)
    expected = alone_logp(model, groups)
    assert (policy(policy.batch(groups)).logp_N - expected).abs().max() <= 1e-5


def test_padded_rows_are_there_for_every_family(groups):
    model = tiny("llama")
    policy = Policy(model, EndTokenOnly(), flat=False)
    assert (policy(policy.batch(groups)).logp_N - alone_logp(model, groups)).abs().max() <= 1e-5


def test_doing_without_flat_rows_is_said_aloud(capsys):
    assert choose_rows(FAILED, Attention.auto, "Bloom") is False
    said = capsys.readouterr().err
    assert "Bloom runs on padded rows" in said
    assert "2.0e-01" in said


def test_insisting_on_flat_rows_is_refused_with_the_reason():
    with pytest.raises(ModelError, match=r"model.attention=flat.*Bloom.*2.0e-01.*model.attention=auto"):
        choose_rows(FAILED, Attention.flat, "Bloom")


def test_padded_can_be_chosen(capsys):
    assert choose_rows(Exactness(True, True, 0.0, ""), Attention.padded, "Llama") is False
    assert choose_rows(Exactness(True, True, 0.0, ""), Attention.auto, "Llama") is True
    assert capsys.readouterr().err == ""


def test_a_family_that_takes_no_layout_falls_back():
    model = tiny("llama")
    plain = model.model.forward

    def without_layout(*args, **kwargs):
        if "layout" in kwargs:
            raise TypeError("unexpected keyword argument 'layout'")
        return plain(*args, **kwargs)

    model.model.forward = without_layout
    exact = check_exactness(model, EndTokenOnly())
    assert (exact.flat, exact.gap, exact.reason) == (False, float("inf"), "it does not run on flat rows (TypeError)")


def test_the_check_selects_the_attention_it_found_and_restores_training_mode():
    model = tiny("llama").train()
    check_exactness(model, EndTokenOnly())
    assert model.training
    assert model.config._attn_implementation == FLAT


def test_one_more_completion_does_not_change_the_others():
    """Completions of one prompt do not see each other."""
    model = tiny("llama", torch.float64)
    use_attention(model, FLAT)
    policy = Policy(model, EndTokenOnly(), flat=True)
    a, b, c = (Completion((i, i + 1, i + 2), (True,) * 3) for i in (5, 20, 40))
    few = policy(policy.batch([Group((1, 2, 3), (a, b))])).logp_N
    many = policy(policy.batch([Group((1, 2, 3), (a, b, c)), Group((9,), (c,))])).logp_N
    assert (many[:6] - few).abs().max() < 1e-9
