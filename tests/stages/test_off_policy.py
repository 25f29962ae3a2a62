"""The correction for samples that are not the trainer's own: when it is on, what it does, and what is said."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tiny_recipes import GRPO, prepared, run

from rlpost.engine.params import EngineChoice
from rlpost.errors import RecipeError
from rlpost.stages.off_policy import Gap
from rlpost.stages.params import Correction, CorrectionMode

SHIFTED = """\
def shifted(policy, *, by):
    from rlpost.engine.local import LocalEngine
    from rlpost.types import Completion

    class Shifted(LocalEngine):
        def generate(self, requests):
            return [tuple(self.one(c) for c in group) for group in super().generate(requests)]

        def one(self, c):
            return Completion(c.ids, c.action, finish=c.finish, logprobs=c.logprobs - by)

    return Shifted(policy)
"""
ONE = {**GRPO, "steps": 2, "group_size": 4}


@pytest.mark.parametrize(
    ("engine", "given", "mode"),
    [
        (EngineChoice(), None, "none"),
        (EngineChoice(staleness=1), None, "truncate"),
        (EngineChoice(engine="vllm"), None, "truncate"),
        (EngineChoice(engine="mine.py:engine"), None, "truncate"),
        (EngineChoice(engine="vllm"), "none", "none"),
        (EngineChoice(), "mask", "mask"),
        (None, None, "none"),
    ],
)
def test_the_mode_is_the_recipes_or_what_the_engine_needs(engine, given, mode):
    assert Correction(mode=given and CorrectionMode(given)).mode_for(engine) == mode


def learned(folder: Path, kind: str, by: float, **more: Any) -> list[dict[str, float]]:
    """The metrics of a run whose sampler says log-probabilities that are `by` too low."""
    (folder / "engines.py").write_text(SHIFTED, "utf-8")
    rollouts = {"engine": "engines.py:shifted", "args": {"by": by}}
    run(folder, {kind: {**ONE, "kind": kind, **more}}, f"run={kind}", rollouts=rollouts)
    lines = (folder / "runs" / kind / kind / "metrics.jsonl").read_text("utf-8").splitlines()
    return [json.loads(line) for line in lines]


@pytest.mark.parametrize("kind", ["grpo", "ppo"])
def test_a_sampler_that_is_wrong_about_its_probabilities_is_corrected_and_told(tmp_path, capsys, kind):
    lines = learned(tmp_path, kind, 0.2)
    assert [line["sampler_gap"] for line in lines] == pytest.approx([0.2, 0.2], abs=1e-4)
    # Ratios are to the trainer's own probabilities, and every weight is the same e^0.2.
    assert [line["ratio"] for line in lines] == pytest.approx([1, 1], abs=1e-5)
    assert [line["effective_samples"] for line in lines] == pytest.approx([1, 1], abs=1e-5)
    said = " ".join(capsys.readouterr().err.split())
    assert "weighed by the trainer's probability over the sampler's, at most 2 (correction.mode=truncate)" in said
    assert said.count("are 0.2 nats a token from the trainer's (limit 0.05)") == 1


def test_a_weight_of_the_correction_scales_the_gradient(tmp_path):
    """Every action's weight is e^0.2, so that the first gradient is e^0.2 times what it is without."""
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    sure = {"whiten": False, "critic": {"trunk": "frozen"}}
    weighted = learned(tmp_path / "a", "ppo", 0.2, **sure)
    plain = learned(tmp_path / "b", "ppo", 0.0, **sure)
    assert plain[0]["sampler_gap"] < 1e-5
    assert weighted[0]["grad_norm"] / plain[0]["grad_norm"] == pytest.approx(2.718281828**0.2, rel=1e-4)


def test_the_gap_is_told_once_and_when_it_is_over(capsys):
    gap = Gap("rl", EngineChoice(engine="vllm"))
    for step, value in enumerate([0.01, 0.2, 0.3, 0.01]):
        gap.report({"sampler_gap": value}, step)
    gap.report({"reward": 1.0}, 4)
    said = " ".join(capsys.readouterr().err.split())
    assert said.count("nats a token") == 1
    assert "rl: step 2: the log-probabilities of vllm are 0.2 nats a token from the trainer's" in said
    assert "rl: step 4: sampler and trainer agree again" in said


def test_samples_of_earlier_weights_are_not_judged_by_their_gap(capsys):
    Gap("rl", EngineChoice(staleness=1)).report({"sampler_gap": 0.5}, 0)
    assert capsys.readouterr().err == ""


def test_a_correction_that_cannot_be_is_refused(tmp_path):
    with pytest.raises(RecipeError, match=r"stages.dpo.correction: online_dpo learns from pairs"):
        prepared(tmp_path, {"dpo": {**ONE, "kind": "online_dpo", "correction": {"mode": "mask"}}})
    with pytest.raises(RecipeError, match=r"correction.floor: 3 is not below cap=2"):
        prepared(tmp_path, {"rl": {**ONE, "correction": {"mode": "mask", "floor": 3.0}}})
