"""How much an expert's rows weigh, step by step."""

from __future__ import annotations

import pytest

from rlpost.objectives.mixing import expert_weight


def test_it_rises_along_a_line_and_falls_along_a_cosine():
    found = [expert_weight(t, peak=0.8, valley=0.2, warmup_steps=2, decay_steps=4) for t in range(9)]
    assert found[:3] == pytest.approx([0.0, 0.4, 0.8])
    assert found[3:6] == pytest.approx([0.5 + 0.3 * 0.5**0.5, 0.5, 0.5 - 0.3 * 0.5**0.5])
    assert found[6:] == [0.2] * 3


def test_by_default_it_is_constant():
    assert [expert_weight(t, peak=0.3) for t in (0, 5)] == [0.3, 0.3]
    assert [expert_weight(t, peak=0.3, warmup_steps=1) for t in (0, 1, 2)] == [0.0, 0.3, 0.3]
    assert expert_weight(0, peak=0.3, valley=0.1) == 0.1  # it has fallen at once


def test_the_ends_are_met_exactly():
    assert expert_weight(0, peak=0.0, valley=0.0, decay_steps=3) == 0.0
    assert expert_weight(0, peak=1.0, valley=0.0, decay_steps=3) == 1.0
    assert expert_weight(3, peak=1.0, valley=0.0, decay_steps=3) == 0.0


@pytest.mark.parametrize(
    ("given", "about"),
    [
        ({"peak": 1.1}, "peak=1.1"),
        ({"peak": -0.1}, "peak=-0.1"),
        ({"peak": 0.1, "valley": 0.2}, "valley=0.2"),
        ({"peak": 0.1, "valley": -0.2}, "valley=-0.2"),
        ({"peak": 0.1, "warmup_steps": -1}, "warmup_steps=-1"),
        ({"peak": 0.1, "decay_steps": -1}, "decay_steps=-1"),
    ],
)
def test_what_cannot_be_is_refused(given, about):
    with pytest.raises(ValueError, match=about):
        expert_weight(0, **given)
