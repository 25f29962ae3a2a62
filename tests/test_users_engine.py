"""An engine from a user's file in every place that samples: what it replays is learned from as if the local one had
sampled it."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from tiny_recipes import GRPO, PAIRS, SFT, prepared, run, sha256, write

from rlpost.cli.app import main
from rlpost.engine.params import Sampling
from rlpost.errors import EngineError, RecipeError
from rlpost.inference.evaluate import evaluate_checkpoint
from rlpost.inference.pairs import write_pairs
from rlpost.inference.sample import sample
from rlpost.pipeline import preflight, train

ENGINES = '''\
"""One engine that notes what it samples, and one that says it again."""

import json


def recording(policy, *, log):
    from rlpost.engine.local import LocalEngine

    class Recording(LocalEngine):
        def generate(self, requests):
            found = super().generate(requests)
            with open(log, "a") as file:
                for request, some in zip(requests, found):
                    said = [[c.ids.tolist(), c.logprobs.tolist(), c.finish] for c in some]
                    file.write(json.dumps([request.prompt.tolist(), request.seed, said]) + "\\n")
            return found

    return Recording(policy)


def replaying(policy, *, log):
    return Replaying(log)


def silent(policy):
    return Silent(None)


class Replaying:
    opened = {}

    def __init__(self, log):
        if log not in self.opened:
            self.opened[log] = [json.loads(line) for line in open(log)]
        self.rows = self.opened[log]

    def update_weights(self, policy, version):
        self.version = version

    def generate(self, requests):
        return [self.one(request) for request in requests]

    def one(self, request):
        from rlpost.types import Completion

        prompt, seed, said = self.rows.pop(0)
        assert (prompt, seed, len(said)) == (request.prompt.tolist(), request.seed, request.n)
        return tuple(
            Completion(ids, [True] * len(ids), finish=finish, logprobs=logprobs, weights_version=self.version)
            for ids, logprobs, finish in said
        )

    def close(self):
        pass


class Silent(Replaying):
    opened = {None: []}

    def generate(self, requests):
        return [()] * len(requests)
'''
TURNS = """\
def reply(text, turns):
    return "+4=" if len(turns) < 2 else None
"""
ANY = {**GRPO, "steps": 1, "group_size": 2, "table_every": 1}
ONE = {**ANY, "correction": {"mode": "none"}}
STAGES: dict[str, Any] = {
    "sft": SFT,
    "grpo": ONE,
    "episodes": {
        **ONE,
        "environment": {"fn": "turns.py:reply"},
        "sampling": {"max_new_tokens": 12, "stop": ["1", "2", "3"]},
        "max_length": 24,
    },
    "vine": {**ONE, "advantage": {"fn": "monte_carlo_values"}, "step_end": "", "fresh_rollouts": 2},
    "remax": {**ONE, "advantage": {"fn": "greedy_baseline"}},
    "ppo": {**ONE, "kind": "ppo"},
    "trpo": {**ONE, "kind": "trpo", "learning_rate": 1.0, "cg_iterations": 2},
    "online_dpo": {**ANY, "kind": "online_dpo", "group_size": 4},
    "value": {
        **{k: ONE[k] for k in ("data", "steps", "prompts_per_step", "group_size", "sampling", "learning_rate")},
        "kind": "value",
        "goals": {"texts": ["1"], "truncated_counts": True},
        "max_length": 20,
    },
    "pairs": {**PAIRS, "prompts": 8},
    "labels": {
        **{k: PAIRS[k] for k in ("data", "sampling", "rewards")},
        "kind": "step_labels",
        "prompts": 3,
        "step_end": "",
        "fresh_rollouts": 2,
    },
}
FEW_STAGES = {name: STAGES[name] for name in ("grpo", "episodes", "vine")}
EVALUATION = {
    "data": {"held_out": {"task": {"fn": "addition.held_out"}, "limit": 3}},
    "rewards": [{"fn": "rewards.py:digits"}],
    "sampling": {"max_new_tokens": 4},
    "samples": 2,
    "best_of": True,
}


def with_engine(folder: Path, name: str, **more: Any) -> dict[str, Any]:
    (folder / "engines.py").write_text(ENGINES, "utf-8")
    (folder / "turns.py").write_text(TURNS, "utf-8")
    return {"engine": f"engines.py:{name}", "args": {"log": str(folder / "log.jsonl")}, **more}


def left(run: Path) -> dict[str, str]:
    kinds = ("*/final/*.safetensors", "*/metrics.jsonl", "*/rollouts/*", "*/final/rows.jsonl", "evaluation/*.jsonl")
    return {str(f.relative_to(run)): sha256(f) for kind in kinds for f in run.glob(kind)}


def recorded_run(folder: Path, stages: dict[str, Any], **more: Any) -> Path:
    """The folder, with a run whose engine noted what it sampled."""
    run(folder, stages, "run=recorded", rollouts=with_engine(folder, "recording"), **more)
    return folder


@pytest.fixture(scope="module")
def recorded(tmp_path_factory) -> Path:
    return recorded_run(tmp_path_factory.mktemp("engines"), FEW_STAGES)


def replayed(folder: Path, stages: dict[str, Any], **more: Any) -> dict[str, str]:
    """What is left by a run whose engine says again what was noted, which is what the recorded run has left."""
    run(folder, stages, "run=replayed", rollouts=with_engine(folder, "replaying"), **more)
    found, expected = (left(folder / "runs" / name) for name in ("replayed", "recorded"))
    assert found == expected
    return found


@pytest.mark.slow
def test_every_stage_learns_from_what_is_replayed_as_from_what_was_sampled(tmp_path):
    found = replayed(recorded_run(tmp_path, STAGES, evaluation=EVALUATION), STAGES, evaluation=EVALUATION)
    assert {name.split("/")[0] for name in found} == {*STAGES, "evaluation"}


def test_what_is_replayed_is_learned_from_as_what_was_sampled(recorded):
    assert {name.split("/")[0] for name in replayed(recorded, FEW_STAGES)} == {*FEW_STAGES}
    hashes = json.loads((recorded / "runs/replayed/environment.json").read_text("utf-8"))
    assert f'"{recorded}/engines.py:replaying": "{sha256(recorded / "engines.py")}"' in json.dumps(hashes)


@pytest.mark.slow
def test_without_another_engine_the_local_one_samples_the_same(recorded):
    run(recorded, FEW_STAGES, "run=local")
    found, expected = (left(recorded / "runs" / name) for name in ("local", "recorded"))
    assert found == expected


def test_eval_pairs_sample_and_best_of_use_the_recipes_engine(recorded, tmp_path):
    """Asked once with an engine that notes what it samples, and once with one that says it again."""
    answers = []
    for name in ("recording", "replaying"):
        recipe = write(
            tmp_path, {"pairs": {**PAIRS, "prompts": 12}}, rollouts=with_engine(tmp_path, name), evaluation=EVALUATION
        )
        final, few = str(recorded / "runs/recorded/grpo/final"), Sampling(max_new_tokens=4)
        _, result, _ = evaluate_checkpoint(final, str(recipe), [])
        rows = Path(write_pairs(final, str(recipe), str(tmp_path / f"{name}.jsonl"), [])).read_text("utf-8")
        texts = sample(final, "1+2=", sampling=few, n=3, recipe=str(recipe))
        best = sample(final, "1+2=", sampling=few, best_of=4, recipe=str(recipe))
        answers.append((result.to_json(), rows, texts, best))
    assert answers[0] == answers[1]
    assert answers[0][1]


@pytest.mark.slow
def test_a_stages_own_choice_wins_over_the_recipes(tmp_path):
    own = with_engine(tmp_path, "recording")
    evaluation = {**EVALUATION, "rollouts": {"engine": "local"}}
    stages = {"grpo": ONE, "again": {**ONE, "rollouts": {"engine": "local"}}}
    run(tmp_path, stages, rollouts=own, evaluation={**evaluation, "samples": 0, "best_of": False})
    assert len((tmp_path / "log.jsonl").read_text("utf-8").splitlines()) == ONE["prompts_per_step"]
    lines = preflight(prepared(tmp_path, stages, rollouts=own, evaluation=evaluation))
    assert any("rollouts: recording from" in line and "sha256" in line for line in lines)
    # A resolved recipe finds the file from anywhere.
    found = prepared(tmp_path, stages, rollouts=own).config.rollouts.engine
    assert found == f"{tmp_path.resolve()}/engines.py:recording"


def command(monkeypatch, *words: str) -> int:
    monkeypatch.setattr(sys, "argv", ["rlpost", *words])
    with pytest.raises(SystemExit) as stop:
        main()
    return int(stop.value.code or 0)


def test_sample_names_an_engine_and_a_wrong_one_is_exit_code_8(recorded, monkeypatch, capsys):
    monkeypatch.chdir(recorded)
    final = str(recorded / "runs/recorded/grpo/final")
    assert command(monkeypatch, "sample", final, "1+2=", "--engine", "engines.py:silent") == 8
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert said.endswith("request 1 of 1 ('1+2='): it gave 0 completions, not 1; return as many as its n says")
    assert command(monkeypatch, "sample", final, "1+2=", "--engine", "engines.py:slient") == 2
    assert "--engine: no function 'slient' in" in (said := capsys.readouterr().err)
    assert "did you mean 'silent'?" in said
    assert command(monkeypatch, "sample", final, "1+2=", "--engine", "engines.py:recording") == 2
    assert "--args.log: missing" in capsys.readouterr().err
    assert command(monkeypatch, "sample", final, "1+2=", "--engine", "locla") == 2
    assert "--engine: no engine 'locla' - did you mean 'local'?" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("chosen", "message"),
    [
        ({"engine": "locl"}, r"rollouts.engine: no engine 'locl' - did you mean 'local'\?"),
        ({"engine": "sglang"}, r"rollouts.engine: no engine 'sglang' \(there are: local, vllm, vllm_server, file"),
        ({"engine": "nowhere.py:f"}, r"rollouts.engine: no file 'nowhere.py'"),
        (
            {"args": {"a": 1}},
            "rollouts.args: is for file.py:function or vllm or vllm_server, not for local",
        ),
        ({"deadline": 3}, "rollouts.deadline: is for file.py:function or vllm_server, not for local"),
        ({"deadline": 0}, "rollouts.deadline: expected more than 0"),
        ({"cache_gib": -1}, "rollouts.cache_gib: expected at least 0"),
        ({"engin": "local"}, "rollouts.engin: unknown key - did you mean '{}rollouts.engine'"),
    ],
)
@pytest.mark.parametrize("place", ["top", "stage", "evaluation"])
def test_a_wrong_choice_is_refused_before_anything_loads(tmp_path, chosen, message, place):
    stages = {"grpo": {**ONE, **({"rollouts": chosen} if place == "stage" else {})}}
    evaluation = {**EVALUATION, **({"rollouts": chosen} if place == "evaluation" else {})}
    top = {"rollouts": chosen} if place == "top" else {}
    where = {"top": "", "stage": "stages.grpo.", "evaluation": "evaluation."}[place]
    with pytest.raises(RecipeError, match=f"^{where}{message.format(where)}"):
        preflight(prepared(tmp_path, stages, evaluation=evaluation, **top))


def test_guided_samples_refuse_a_users_engine(tmp_path):
    guided = {"kind": "guided", "data": SFT["data"], "network": "value", "goals": {"texts": ["1"]}}
    with pytest.raises(
        RecipeError, match=r"stages.led.rollouts.engine: a guide weighs every token, .* give stages.led"
    ):
        prepared(tmp_path, {"value": STAGES["value"], "led": guided}, rollouts=with_engine(tmp_path, "recording"))
    own = {**guided, "rollouts": {"engine": "local"}}
    prepared(tmp_path, {"value": STAGES["value"], "led": own}, rollouts=with_engine(tmp_path, "recording"))


def test_a_factory_that_fails_is_told_with_its_line(tmp_path):
    (tmp_path / "broken.py").write_text("def broken(policy):\n    raise OSError('no server')\n", "utf-8")
    with pytest.raises(EngineError, match=r"rollouts: broken raised OSError: no server at .*broken.py:2 - mend"):
        train(prepared(tmp_path, {"grpo": ONE}, rollouts={"engine": "broken.py:broken"}))
