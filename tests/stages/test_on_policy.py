"""The loop around algorithms that learn from their own samples: what it calls, how often, in what order."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from rlpost.engine.params import EngineChoice
from rlpost.stages import on_policy as driver
from rlpost.stages.on_policy import KlPenalty, mean_of, on_policy, updates_of
from rlpost.stages.params import Kl
from rlpost.train.experience import Experience
from rlpost.train.throughput import Throughput
from rlpost.types import Completion, Group

PROMPTS = 6


class Stage:
    """Everything around an algorithm, which notes what it is asked for."""

    def __init__(self, steps: int, **cfg: int) -> None:
        self.name, self.calls, self.lines, self.shown = "mine", [], [], []
        self.given: dict[str, object] = {}
        self.cfg = SimpleNamespace(
            kind="grpo", steps=steps, prompts_per_step=PROMPTS, table_every=0, rollouts=None, **cfg
        )
        self.rollouts = EngineChoice()
        self.data = SimpleNamespace(epoch_length=100)
        self.throughput = Throughput([])
        self.seconds = {"sampling": 0.0, "scoring": 0.0}

    def seed_for(self, purpose: str, number: int) -> int:
        return 1000 * len(purpose) + number

    def loop(self, _, states, steps, weights, *, held_out, **learners):
        assert weights is None
        assert held_out is None
        self.given = {**states, **learners}
        return SimpleNamespace(
            steps=lambda: range(steps),
            throughput=self.throughput,
            log=lambda step, line, live: self.lines.append((step, dict(line), live)),
            rollouts=lambda step, _: self.shown.append(step),
        )

    def finish(self, policy, kind, steps):
        return policy, kind, steps

    def sample(self, step: int):
        self.calls.append(("sample", step))
        groups = [Group((p + 1,), (Completion((5,), (True,)),)) for p in range(PROMPTS)]
        return SimpleNamespace(groups=groups, metrics={"reward": float(step)})

    def assemble(self, rollout, step: int) -> Experience:
        self.calls.append(("assemble", step))
        return Experience(tuple(rollout.groups)).with_actions(number=torch.arange(float(PROMPTS)))

    def minimise(self, minibatch: Experience, _: int) -> dict[str, float]:
        self.calls.append(("minimise", tuple(minibatch["number"].tolist())))
        return {"loss": float(minibatch["number"].sum()), "sampler_gap": float(len(self.calls))}

    def observe(self, experience: Experience) -> dict[str, float]:
        self.calls.append(("observe", len(experience.groups)))
        return {"beta": 0.5}

    def run(self):
        hooks = {"assemble": self.assemble, "minimise": self.minimise, "observe": self.observe}
        policy = SimpleNamespace(tokenizer=None)
        return on_policy(
            self, self.cfg, policy, self, **hooks, learners={"policy": 1}, states={"beta": 2}, live=("reward",)
        )


def test_a_step_is_samples_then_experience_then_passes_over_minibatches_then_a_line():
    stage = Stage(2, num_iterations=2, num_minibatches=3)
    _, kind, steps = stage.run()
    assert (kind, steps) == ("grpo", 2)
    assert stage.given == {"data": stage, "beta": 2, "policy": 1}
    names = [name for name, _ in stage.calls]
    assert names == 2 * ["sample", "assemble", *6 * ["minimise"], "observe"]
    batches = [value for name, value in stage.calls if name == "minimise"]
    passes = [batches[i : i + 3] for i in range(0, 12, 3)]
    for batch in passes:
        assert sorted(x for share in batch for x in share) == list(range(PROMPTS))
    assert len({tuple(batch) for batch in passes}) == 4  # another shuffle each time
    assert stage.shown == []
    for step, line, live in stage.lines:
        assert line == {"reward": step, "beta": 0.5, "loss": 5.0, "sampler_gap": line["sampler_gap"]}
        assert live == ("reward",)
    # Of the step's first update: before the policy has moved.
    assert [line["sampler_gap"] for _, line, _ in stage.lines] == [3.0, 12.0]


def test_a_table_at_the_first_step_and_every_so_often(monkeypatch):
    monkeypatch.setattr(driver, "show_samples", lambda *_: None)
    stage = Stage(5, num_iterations=1, num_minibatches=1)
    stage.cfg.table_every = 3
    stage.run()
    assert stage.shown == [0, 2]


def test_updates_of_a_stage():
    stage = Stage(7, num_iterations=2, num_minibatches=3)
    assert updates_of(stage, stage.cfg, stage) == 42
    stage.cfg.steps, stage.cfg.epochs = None, 1.2
    assert updates_of(stage, stage.cfg, stage) == 20 * 6


def test_a_metric_that_not_every_update_has_is_a_mean_over_those_that_have_it():
    assert mean_of([{"a": 1.0}, {"a": 2.0, "b": 5.0}]) == {"a": 1.5, "b": 5.0}


@pytest.mark.parametrize(("beta", "expected"), [(0.5, 0.7), (0.25, 0.25)])
def test_a_coefficient_goes_on_unless_the_recipe_has_another(beta, expected):
    before, after = KlPenalty(Kl(beta=0.5, target=1.0), None), KlPenalty(Kl(beta=beta, target=1.0), None)
    before.beta = 0.7
    after.load(before.state())
    assert after.beta == expected
