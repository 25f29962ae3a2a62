"""Warnings while training: told once, when they last, and never of noise."""

from __future__ import annotations

import random
import re
from pathlib import Path

import pytest

from rlpost.train.symptoms import LASTS, SYMPTOMS, Watch, symptoms

HEALTHY = {
    "reward": 0.5,
    "reward/right": 0.4,
    "reward/short": 0.1,
    "zero_signal": 0.4,
    "truncated": 0.1,
    "entropy": 1.0,
    "clipped_low": 0.02,
    "clipped_high": 0.03,
    "sequence_kl": 2.0,
}
DOCS = Path(__file__).parents[2] / "docs/troubleshooting.md"


def noisy(steps: int, seed: int, **trends) -> list[dict[str, float]]:
    """Healthy lines with 20 % noise; a trend is a function of the step that replaces a metric's mean."""
    draw = random.Random(seed)
    lines = []
    for step in range(steps):
        means = HEALTHY | {name: trend(step) for name, trend in trends.items()}
        lines.append({name: mean * draw.uniform(0.8, 1.2) for name, mean in means.items()})
    return lines


def told(lines) -> set[str]:
    """Symptoms that any step shows."""
    return {name for n in range(len(lines)) for name in symptoms(lines[:LASTS], lines[: n + 1][-2 * LASTS :])}


SICK = {
    "zero-signal": {"zero_signal": lambda step: 0.97 if step > 5 else 0.4},
    "truncated": {"truncated": lambda step: 0.8},
    "clipped": {"clipped_low": lambda step: 0.25, "clipped_high": lambda step: 0.25},
    "entropy-collapse": {"entropy": lambda step: 0.8**step},
    "kl-running-away": {"sequence_kl": lambda step: 1.2**step},
    "rewards-that-cancel": {
        "reward/right": lambda step: 0.1 + 0.05 * step,
        "reward/short": lambda step: 2.1 - 0.05 * step,
    },
}


@pytest.mark.parametrize("name", [symptom.name for symptom in SYMPTOMS])
def test_each_symptom_is_told_and_no_other(name):
    for seed in range(5):
        lines = noisy(40, seed, **SICK[name])
        if name == "rewards-that-cancel":
            lines = [line | {"reward": 2.2 + 0.01 * (step % 3)} for step, line in enumerate(lines)]
        assert told(lines) == {name}


def test_noise_and_a_passing_trouble_raise_nothing():
    for seed in range(100):
        assert told(noisy(60, seed)) == set()
    short = noisy(60, 0, zero_signal=lambda s: 1.0 if 20 <= s < 26 else 0.4, truncated=lambda s: float(s % 3 == 0))
    assert told(short) == set()


def test_stages_without_these_metrics_are_left_alone():
    assert told([{"step": n, "loss": 1.0 / n} for n in range(1, 50)]) == set()


def test_one_line_once_a_stage_and_not_again_after_a_resume(capsys):
    lines = noisy(30, 0, truncated=lambda step: 0.9)
    whole = Watch("grpo")
    for step, line in enumerate(lines, 1):
        whole.see(step, line)
    (warning,) = capsys.readouterr().err.splitlines()
    assert re.search(
        r"grpo: step 10: 9\d% of completions .*max_new_tokens.*\(docs/troubleshooting.md#truncated\)", warning
    )
    resumed = Watch("grpo")
    resumed.replay(lines[:15])
    for step, line in enumerate(lines[15:], 16):
        resumed.see(step, line)
    assert capsys.readouterr().err == ""
    late = Watch("grpo")
    late.replay(lines[:6])
    for step, line in enumerate(lines[6:], 7):
        late.see(step, line)
    assert "step 10" in capsys.readouterr().err


def test_every_symptom_has_its_cause_and_cure_in_the_documentation():
    sections = re.split(r"(?m)^## ", DOCS.read_text("utf-8"))[1:]
    found = {section.partition("\n")[0].lower().replace(" ", "-"): section for section in sections}
    assert set(found) == {symptom.name for symptom in SYMPTOMS}
    for section in found.values():
        assert re.findall(r"\*\*(\w+)\.\*\*", section) == ["Symptom", "Cause", "Cure"]


def test_what_is_nearly_solved_is_no_trouble_but_a_constant_reward_is():
    easy = noisy(40, 0, entropy=lambda step: 0.8**step)
    solved = [line | {"reward": 0.97, "zero_signal": 0.93} for line in easy]
    assert told(solved) == set()
    assert told([line | {"reward": 0.5, "zero_signal": 0.93} for line in easy]) == {"zero-signal", "entropy-collapse"}
    assert told([line | {"reward": 1.0, "zero_signal": 1.0} for line in noisy(20, 0)]) == {"zero-signal"}


def test_a_kl_that_jumps_within_the_first_steps_is_told_and_a_high_one_that_stays_is_not():
    jump = noisy(20, 0, sequence_kl=lambda step: min(40.0, 8.0 * step))
    assert told(jump) == {"kl-running-away"}
    assert told(noisy(60, 0, sequence_kl=lambda step: 40.0)) == set()


def test_rewards_cancel_if_their_sum_moves_by_less_than_a_tenth():
    def lines(share):
        made = noisy(40, 0, **SICK["rewards-that-cancel"])
        return [line | {"reward": 1.0 + share * 0.05 * step} for step, line in enumerate(made)]

    assert told(lines(0.05)) == {"rewards-that-cancel"}
    assert told(lines(0.3)) == set()
