"""Sampling ahead of training: which weights a step's samples are of, what is kept, resumed, and refused."""

from __future__ import annotations

import itertools
import json
import os
import re
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from engines import local
from processes import Trap, finish, finish_on_ranks, start, wait_until
from safetensors.torch import load_file
from tiny_recipes import GRPO, LORA, PAIRS, PPO, SFT, TRPO, base, metrics, prepared, rollouts, run, sha256, write

from rlpost.engine.collect import collect
from rlpost.engine.params import Sampling
from rlpost.engine.shared import changing
from rlpost.engine.side import LocalSideEngine
from rlpost.errors import EngineError, Interrupted, RecipeError, RewardError
from rlpost.pipeline import train
from rlpost.policy.judge import load_judge
from rlpost.policy.load import load_policy
from rlpost.policy.params import Lora, Model
from rlpost.stages.context import stage_seed
from rlpost.stages.rollouts import Sampler
from rlpost.train.learner import Learner
from rlpost.types import Completion, Group

STEPS = 8
LONG = {**GRPO, "steps": STEPS, "checkpoint_every": 3, "keep_checkpoints": 9}
MODELS = {"full": Model(), "lora": Model(lora=Lora(r=4, alpha=8.0))}
OVERRIDES = {"full": (), "lora": (LORA,)}


def ahead(staleness: int, **more: Any) -> dict[str, Any]:
    return {**LONG, "rollouts": {"staleness": staleness}, **more}


def logged(folder: Path, step: int) -> list[Group]:
    """A step's samples as its file has them."""
    return [
        Group(
            row["prompt"],
            [
                Completion(
                    c["ids"],
                    [bool(a) for a in c["action"]],
                    c["text"],
                    c["finish"],
                    torch.tensor(c["logprobs"]).numpy(),
                    weights_version=c["weights_version"],
                )
                for c in row["completions"]
            ],
            row["example"],
        )
        for row in rollouts(folder, "grpo", step + 1)
    ]


@pytest.mark.parametrize(
    ("way", "staleness"),
    [("lora", 2), *(pytest.param(w, k, marks=pytest.mark.slow) for w, k in [("full", 1), ("full", 4), ("lora", 9)])],
)
def test_a_steps_samples_are_of_the_weights_of_staleness_steps_before(tmp_path, way, staleness):
    """Every completion is drawn again by the local engine, from the checkpoint of the version that it should be of."""
    run(tmp_path, {"sft": SFT, "grpo": ahead(staleness, checkpoint_every=1)}, *OVERRIDES[way])
    stage = tmp_path / "runs/run/grpo"
    policy = load_policy(tmp_path / "runs/run/sft/final", MODELS[way])
    weights = {0: {name: p.detach().clone() for name, p in policy.trained().items()}}
    for step in range(1, STEPS + 1):
        weights[step] = load_file(stage / f"checkpoints/step-{step:06d}/weights.safetensors")
    for step in range(STEPS):
        version = max(0, step - staleness)
        with torch.no_grad():
            for name, p in policy.trained().items():
                p.copy_(weights[version][name])
        engine = local(policy)
        engine.update_weights(policy, version)
        found = logged(tmp_path, step)
        seed = stage_seed(0, "grpo", "sample", step)
        expected = collect(engine, found, GRPO["group_size"], Sampling(max_new_tokens=5), seed)
        assert all(a.same(b) for a, b in zip(found, expected, strict=True)), step
    lines = metrics(tmp_path, "grpo")
    assert [line["staleness"] for line in lines] == [float(min(step, staleness)) for step in range(STEPS)]
    # The first step's weights are those that sampled; later ones' are not.
    assert [line["sampler_gap"] < 1e-5 for line in lines] == [True] + [False] * (STEPS - 1)
    timings = [json.loads(line) for line in (stage / "timings.jsonl").read_text("utf-8").splitlines()]
    for line in timings:
        assert line["waited"] + line["learning"] == pytest.approx(line["seconds"])
        assert not {"sampling", "scoring"} & set(line)


def left(run: Path) -> dict[str, str]:
    """sha256 of all that must not depend on where the run was interrupted."""
    kept = [*run.glob("*/final/*.safetensors"), *run.glob("*/metrics.jsonl"), *run.glob("*/rollouts/*")]
    return {str(file.relative_to(run)): sha256(file) for file in kept}


STOPS = [
    Trap("rlpost.train.learner:Learner.update", 2, signal.SIGINT),  # before there is a checkpoint
    Trap("rlpost.train.learner:Learner.update", 3),  # after the checkpoint of the signal, killed in step 5
    Trap("rlpost.stages.ahead:packed", 1),  # while a checkpoint is made of samples that are drawn
    Trap("rlpost.run.files:write_manifest", 1),  # while it is written
    Trap("rlpost.train.learner:Learner.update", 2, signal.SIGTERM),
]


@pytest.mark.parametrize(
    ("way", "staleness"),
    [(way, staleness) for way in MODELS for staleness in (1, 2, 4)],
)
@pytest.mark.slow  # a minute each
def test_interrupted_anywhere_it_ends_as_if_it_had_gone_through(tmp_path, way, staleness):
    more = {"kl": {"beta": 0.05}, "dynamic_sampling_rounds": 1}
    overrides = OVERRIDES[way]
    stages = {"grpo": ahead(staleness, **more)}
    run(tmp_path, stages, *overrides, "run=whole")
    words = ["train", str(tmp_path / "tiny.yaml"), *overrides]
    for number, stop in enumerate(STOPS):
        code = finish(words, tmp_path / f"stopped{number}", stop)
        assert code == {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGKILL: -9}[signal.Signals(stop.number)]
        assert (tmp_path / f"stopped{number}.out").read_text() == ""
    assert finish(words, tmp_path / "resumed") == 0
    assert "grpo: resumes after step" in (tmp_path / "resumed.err").read_text()
    expected = left(tmp_path / "runs/whole")
    assert len(expected) == 1 + 1 + STEPS
    assert left(tmp_path / "runs/run") == expected


class Snapshots:
    """The side engine without its process: a second policy, and copies of weights. What remains is the thread."""

    def __init__(self, context: Any, _: Any, chosen: Any) -> None:
        self.own = load_policy(context.start, context.model)
        self.engine = local(self.own, cache_gib=chosen.cache_gib)
        self.closed = False

    def stage(self, policy: Any, version: int) -> Callable[[], None]:
        copies = {name: x.clone() for name, x in changing(policy).items()}

        def switch() -> None:
            assert threading.current_thread() is not threading.main_thread()
            with torch.no_grad():
                for name, x in changing(self.own).items():
                    x.copy_(copies[name])
            self.engine.update_weights(self.own, version)

        return switch

    def update_weights(self, *_: Any) -> None:
        raise AssertionError("weights are staged")

    def generate(self, requests: Any) -> Any:
        if self.closed:
            raise EngineError("closed")
        return self.engine.generate(requests)

    def close(self) -> None:
        self.closed = True


@pytest.fixture
def quick(monkeypatch) -> None:
    """No second process."""
    monkeypatch.setattr("rlpost.stages.rollouts.side_engine", Snapshots)


def interrupted(monkeypatch, resolved: Any, at: int) -> str:
    """Train, with a signal just before update number `at`; returns what is said in the end."""
    calls = itertools.count(1)
    update = Learner.update

    def signalled(*args: Any, **kwargs: Any) -> Any:
        if next(calls) == at:
            os.kill(os.getpid(), signal.SIGTERM)
        return update(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(Learner, "update", signalled)
        with pytest.raises(Interrupted) as said:
            train(resolved)
    return str(said.value)


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("staleness", [2, *(pytest.param(k, marks=pytest.mark.slow) for k in (1, 4))])
def test_a_run_that_is_asked_to_stop_goes_on_bit_for_bit(tmp_path, monkeypatch, staleness):
    more = {"num_minibatches": 2, "kl": {"beta": 0.05}, "dynamic_sampling_rounds": 1}
    stages = {"grpo": ahead(staleness, **more)}
    run(tmp_path, stages, "run=whole")
    resolved = prepared(tmp_path, stages)
    for at, step in ((1, 1), (5, 4), (8, 8)):
        if step < STEPS:
            said = interrupted(monkeypatch, resolved, at)
            assert f"grpo stopped after step {step} with a checkpoint" in said
    train(resolved)
    assert left(tmp_path / "runs/run") == left(tmp_path / "runs/whole")


@pytest.mark.usefixtures("quick")
def test_no_more_is_drawn_than_is_learned_from_and_in_order(tmp_path, monkeypatch):
    drawn = []
    draw = Sampler.draw
    monkeypatch.setattr(Sampler, "draw", lambda self, step: (drawn.append(step), draw(self, step))[1])
    run(tmp_path, {"grpo": ahead(3, checkpoint_every=2)})
    assert drawn == list(range(STEPS))
    held = {}
    for path in sorted((tmp_path / "runs/run/grpo/checkpoints").iterdir()):
        state = json.loads((path / "state.json").read_text("utf-8"))["states"]["data"]
        held[int(path.name[-6:])] = [int(step) for step in state["ahead"]]
    assert held == {2: [2, 3, 4], 4: [4, 5, 6], 6: [6, 7], 8: []}


@pytest.mark.slow
@pytest.mark.usefixtures("quick")
def test_a_change_of_staleness_goes_on_from_what_is_drawn(tmp_path, monkeypatch):
    """Steps that are drawn already keep their versions; none is left out, and none is drawn twice."""
    stages = {"grpo": ahead(3)}
    interrupted(monkeypatch, prepared(tmp_path, stages), 3)
    lower = prepared(tmp_path, {"grpo": ahead(1)})
    train(lower, allow_change=True)
    versions = [{c.weights_version for g in logged(tmp_path, step) for c in g.completions} for step in range(STEPS)]
    assert versions == [{0}, {0}, {0}, {0}, {1}, {2}, {5}, {6}]


@pytest.mark.slow
@pytest.mark.usefixtures("quick")
def test_samples_that_are_drawn_are_not_left_out_without_a_word(tmp_path, monkeypatch):
    interrupted(monkeypatch, prepared(tmp_path, {"grpo": ahead(2)}), 3)
    with pytest.raises(
        RecipeError, match=r"stages\.grpo: its checkpoint holds samples of 2 steps that are not learned"
    ):
        train(prepared(tmp_path, {"grpo": LONG}), allow_change=True)
    # The other way round there is nothing to lose.
    interrupted(monkeypatch, prepared(tmp_path, {"grpo": LONG}, "run=later"), 3)
    train(prepared(tmp_path, {"grpo": ahead(2)}, "run=later"), allow_change=True)
    assert [line.get("staleness") for line in metrics(tmp_path, "grpo", "later")] == [None] * 3 + [0, 1, 2, 2, 2]


@pytest.mark.slow
@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("kind", [PPO, TRPO, {**GRPO, "kind": "online_dpo"}], ids=lambda kind: kind["kind"])
def test_every_kind_that_samples_may_be_ahead(tmp_path, kind):
    run(tmp_path, {"grpo": {**kind, "steps": 4, "rollouts": {"staleness": 1}}})
    lines = metrics(tmp_path, "grpo")
    assert [line["staleness"] for line in lines] == [0, 1, 1, 1]
    assert all(line["loss"] == line["loss"] for line in lines)


@pytest.mark.usefixtures("quick")
def test_an_error_of_the_thread_is_raised_where_its_step_is_due(tmp_path):
    """What was learned before is logged; the cause comes with it."""
    stages = {"grpo": ahead(2, rewards=[{"fn": "mine.py:fails"}])}
    (tmp_path / "mine.py").write_text(
        "calls = []\n\ndef fails(completion):\n    calls.append(1)\n"
        f"    return 1 / (len(calls) != {4 * 16 + 1}) + len(completion.text)\n"
    )
    with pytest.raises(RewardError, match=r"fails raised ZeroDivisionError") as caught:
        run(tmp_path, stages)
    assert "mine.py" in str(caught.value.__cause__)
    # After step 3 there would be a checkpoint, which needs all that was begun.
    assert [line["step"] for line in metrics(tmp_path, "grpo")] == [1, 2, 3]
    assert not list((tmp_path / "runs/run/grpo/checkpoints").glob("*"))


@pytest.mark.slow
@pytest.mark.usefixtures("quick")
def test_evaluating_while_a_stage_trains_changes_nothing(tmp_path):
    """It waits for the thread, and may call the same functions."""
    evaluation = {
        "data": {"held_out": {"task": {"fn": "addition.held_out"}, "limit": 8}},
        "rewards": [{"fn": "rewards.py:digits"}],
        "sampling": {"max_new_tokens": 4},
        "every_stage": False,
    }
    run(tmp_path, {"grpo": ahead(2)}, "run=without")
    run(tmp_path, {"grpo": ahead(2, eval_every=2)}, evaluation=evaluation)
    assert left(tmp_path / "runs/run") == left(tmp_path / "runs/without")
    assert len((tmp_path / "runs/run/grpo/evaluations.jsonl").read_text("utf-8").splitlines()) == 4


@pytest.mark.slow
@pytest.mark.usefixtures("quick")
def test_a_reward_model_on_the_policys_base_judges_beside_training(tmp_path):
    """It gets a model of its own; its scores are those of the model alone."""
    reward = {
        "kind": "reward_model",
        "data": {"pairs": {"path": "pairs.jsonl"}},
        "steps": 4,
        "batch_size": 4,
        "learning_rate": 1e-2,
        "max_length": 16,
    }
    stages = {"reward": reward, "grpo": ahead(2, rewards=[{"fn": "reward_model", "model": "reward"}])}
    run(tmp_path, stages, LORA)
    policy = load_policy(base(tmp_path), MODELS["lora"])
    judge = load_judge(tmp_path / "runs/run/reward/final", MODELS["lora"], policy, shares=False)
    for step in range(STEPS):
        groups = logged(tmp_path, step)
        given = [c["reward"] for row in rollouts(tmp_path, "grpo", step + 1) for c in row["completions"]]
        assert judge.scores(groups) == given
    lines = metrics(tmp_path, "grpo")
    assert lines[0]["ratio"] == pytest.approx(1, abs=1e-5)


REFUSED = {
    "advantage.fn: greedy_baseline has more sampled": {"advantage": {"fn": "greedy_baseline"}},
    "advantage.fn: monte_carlo_values has more sampled": {"advantage": {"fn": "monte_carlo_values"}, "step_end": "+"},
    "advantage.fn: mine has more sampled": {"advantage": {"fn": "mine.py:mine"}},
    "rewards[0].model: judged would run beside training": {"rewards": [{"fn": "mine.py:judged", "model": "base"}]},
    "rollouts.staleness: recorded rollouts are all there is": {"recorded": True, "rewards": []},
}


@pytest.mark.parametrize("said", REFUSED)
def test_what_cannot_be_ahead_is_refused_when_the_recipe_is_read(tmp_path, said):
    (tmp_path / "mine.py").write_text(
        "def judged(completion, model):\n    return 0.0\n\ndef mine(reward_PG, greedy_P):\n    return reward_PG\n"
    )
    with pytest.raises(RecipeError, match=re.escape(f"stages.grpo.{said}")):
        prepared(tmp_path, {"grpo": ahead(1, **REFUSED[said])})


@pytest.mark.parametrize("where", ["evaluation", "stages.pairs"])
def test_where_nothing_trains_a_staleness_of_its_own_is_refused_and_the_recipes_ignored(tmp_path, where):
    data = {"held_out": {"task": {"fn": "addition.held_out"}, "limit": 8}}
    evaluation = {"data": data, "rewards": [{"fn": "rewards.py:digits"}], "sampling": {"max_new_tokens": 4}}
    stages = {"pairs": PAIRS}
    given = f"{where}.rollouts={{staleness: 1}}"
    with pytest.raises(RecipeError, match=re.escape(f"{where}.rollouts.staleness: nothing is trained on")):
        prepared(tmp_path, stages, given, evaluation=evaluation)
    if where == "evaluation":
        run(tmp_path, stages, evaluation=evaluation, rollouts={"staleness": 1})


@pytest.mark.slow  # seven seconds
@pytest.mark.usefixtures("quick")
def test_what_was_begun_is_drawn_after_a_signal_however_long_it_takes(tmp_path):
    """Many calls, each of which is short: all of them are needed for the checkpoint."""
    (tmp_path / "mine.py").write_text(
        "import time\ncalls = []\n\ndef slow(completion):\n    calls.append(1)\n"
        "    time.sleep(0.5 if len(calls) > 48 else 0)\n    return len(completion.text)\n"
    )
    stages = {"grpo": ahead(1, rewards=[{"fn": "mine.py:slow"}])}
    signalled(tmp_path, stages, r"grpo stopped after step 3 with a checkpoint")
    (path,) = (tmp_path / "runs/run/grpo/checkpoints").iterdir()
    assert list(json.loads((path / "state.json").read_text("utf-8"))["states"]["data"]["ahead"]) == ["3"]


def signalled(folder: Path, stages: dict[str, Any], said: str) -> None:
    """Train until three steps are logged, when a signal comes."""
    resolved = prepared(folder, stages)
    log = folder / "runs/run/grpo/metrics.jsonl"

    def stop() -> None:
        wait_until(lambda: log.exists() and log.read_text().count("\n") == 3)
        os.kill(os.getpid(), signal.SIGTERM)

    waits = threading.Thread(target=stop)
    waits.start()
    with pytest.raises(Interrupted, match=said):
        train(resolved)
    waits.join()


@pytest.mark.slow  # five seconds of grace
@pytest.mark.usefixtures("quick")
def test_a_users_function_that_hangs_in_the_thread_does_not_hold_up_a_signal(tmp_path):
    (tmp_path / "mine.py").write_text(
        "import time\ncalls = []\n\ndef slow(completion):\n    calls.append(1)\n"
        "    time.sleep(50 if len(calls) > 48 else 0)\n    return 1.0\n"
    )
    stages = {"grpo": ahead(1, rewards=[{"fn": "mine.py:slow"}])}
    signalled(tmp_path, stages, "stopped while a user's function ran; run the same command to go on")


def test_a_kind_of_stage_that_samples_step_by_step_is_refused():
    sampler = Sampler.__new__(Sampler)
    sampler.staleness, sampler.context = 1, SimpleNamespace(name="mine")
    sampler.cfg = SimpleNamespace(kind="mine.py:mine")
    with pytest.raises(RecipeError, match=r"stages\.mine\.kind: mine\.py:mine takes its samples step by step"):
        sampler.sample(0)


@pytest.mark.slow
def test_episodes_of_the_process_are_those_of_a_second_policy_in_this_one(tmp_path, monkeypatch):
    """Through the whole stage, with turns that go on from what is kept."""
    (tmp_path / "mine.py").write_text("def reply(text, turns):\n    return '=' if len(turns) < 3 else None\n")
    more = {"environment": {"fn": "mine.py:reply"}, "max_turns": 3, "sampling": {"max_new_tokens": 9, "stop": ["1"]}}
    stages = {"sft": SFT, "grpo": ahead(2, max_length=24, **more)}
    run(tmp_path, stages, LORA, "run=process")
    monkeypatch.setattr("rlpost.stages.rollouts.side_engine", Snapshots)
    run(tmp_path, stages, LORA)
    assert any(not all(c.action) for g in logged(tmp_path, 0) for c in g.completions)
    assert left(tmp_path / "runs/process") == left(tmp_path / "runs/run")


@pytest.mark.slow
def test_the_process_that_samples_ends_with_a_trainer_that_is_killed(tmp_path):
    file = write(tmp_path, {"grpo": ahead(1, steps=100_000)})
    trainer = start(["train", str(file)], tmp_path / "killed")
    log = tmp_path / "runs/run/grpo/metrics.jsonl"
    wait_until(lambda: log.exists() or not trainer.is_alive())
    children = Path(f"/proc/{trainer.pid}/task/{trainer.pid}/children").read_text().split()
    (sampler,) = [pid for pid in children if b"side_worker.py" in Path(f"/proc/{pid}/cmdline").read_bytes()]
    trainer.kill()
    trainer.join()
    wait_until(
        lambda: not Path(f"/proc/{sampler}/cmdline").exists() or not Path(f"/proc/{sampler}/cmdline").read_bytes()
    )


@pytest.mark.slow
def test_a_sampler_that_dies_is_said_in_one_line_where_its_samples_are_due(tmp_path, monkeypatch):
    stage = LocalSideEngine.stage

    def killed(self: LocalSideEngine, policy: Any, version: int) -> Any:
        if version == 2:
            self._process.kill()
        return stage(self, policy, version)

    monkeypatch.setattr(LocalSideEngine, "stage", killed)
    with pytest.raises(EngineError, match=r"the process that samples beside training ended \(exit code -9"):
        run(tmp_path, {"grpo": ahead(1)})
    assert len(metrics(tmp_path, "grpo")) in (2, 3)


@pytest.mark.slow  # a minute
@pytest.mark.parametrize("more", [(), ("parallel.strategy=fsdp2",)], ids=["ddp", "fsdp"])
def test_two_ranks_give_what_one_gives(tmp_path, more):
    """The same tokens at every step, and the same numbers up to rounding."""
    file = write(tmp_path, {"grpo": ahead(2, steps=5)})
    run(tmp_path, {"grpo": ahead(2, steps=5)}, "run=one")
    assert finish_on_ranks(2, ["train", str(file), *more], tmp_path / "rank") == [0, 0]
    for step in range(5):
        one, two = [
            [
                json.loads(line)
                for line in (tmp_path / f"runs/{name}/grpo/rollouts/step-{step + 1:06d}.jsonl").read_text().splitlines()
            ]
            for name in ("one", "run")
        ]
        for a, b in zip(one, two, strict=True):
            assert a["prompt"] == b["prompt"]
            for c, d in zip(a["completions"], b["completions"], strict=True):
                assert (c["ids"], c["reward"], c["weights_version"]) == (d["ids"], d["reward"], d["weights_version"])
                assert c["logprobs"] == pytest.approx(d["logprobs"], abs=1e-4)
    for a, b in zip(metrics(tmp_path, "grpo", "one"), metrics(tmp_path, "grpo"), strict=True):
        assert a == pytest.approx(b, rel=1e-3, abs=1e-4)
