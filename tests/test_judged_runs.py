"""Runs whose reward is a language model's: resumed without a question asked twice, on ranks, with `rlpost serve`."""

from __future__ import annotations

import hashlib
import re
import signal
import string
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import yaml
from judge_server import JudgeServer, Refusal, judging, shown
from processes import Trap, finish, finish_on_ranks, start
from test_resume import left
from test_serve import TEMPLATE, free_port, listens, wait_for
from tiny_recipes import GRPO, MODEL, SFT, jsonl, metrics, prepared, rollouts, run, write

from rlpost.errors import RecipeError
from rlpost.pipeline import dry_run, functions_of, train
from rlpost.recipe.resolve import resolve
from rlpost.rewards.judge_settings import rubric_of
from rlpost.train.learner import Learner

FEW = {"steps": 4, "checkpoint_every": 2, "prompts_per_step": 2}
CRITERIA = {"odd": {"text": "Is it odd?"}}


class Once:
    """A judge of its own mind (its verdict is a hash), which refuses to be asked the same again."""

    def __init__(self) -> None:
        self.asked: set[str] = set()
        self.lock = threading.Lock()

    def __call__(self, prompt: str) -> str | Refusal:
        with self.lock:
            if prompt in self.asked:
                return Refusal(401, "you have asked that before")
            self.asked.add(prompt)
        odd = hashlib.sha256((shown(prompt, "question") + shown(prompt, "answer")).encode()).digest()[0] % 5
        return f'{{"odd": {odd}}}'


def stages(server: JudgeServer, **args: Any) -> dict[str, Any]:
    given = {"url": server.url, "model_name": "m", "criteria": CRITERIA, "scale": [0, 4], **args}
    return {"grpo": {**GRPO, **FEW, "rewards": [{"fn": "judge", "args": given}]}}


def test_a_run_that_was_interrupted_asks_nothing_twice_and_ends_as_if_it_had_not_been(tmp_path, monkeypatch):
    once = Once()
    with judging(once) as server:
        run(tmp_path, stages(server), "run=whole")
        once.asked.clear()
        update, calls = Learner.update, []

        def interrupted(*args: Any, **kwargs: Any) -> Any:
            calls.append(1)
            if len(calls) == 3:
                raise KeyboardInterrupt
            return update(*args, **kwargs)

        monkeypatch.setattr(Learner, "update", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path, stages(server))
        asked = len(once.asked)
        run(tmp_path, stages(server))
    assert len(once.asked) > asked > 10
    assert left(tmp_path / "runs/run") == left(tmp_path / "runs/whole")
    assert (tmp_path / "runs/run/judge.sqlite").is_file()
    assert len({c["reward"] for row in rollouts(tmp_path, "grpo", 1) for c in row["completions"]}) > 2
    assert len({row["reward/judge"] for row in metrics(tmp_path, "grpo")}) > 2


@pytest.mark.slow
def test_a_run_killed_in_the_midst_of_its_questions_and_on_two_ranks(tmp_path):
    """Takes 40 seconds."""
    once = Once()
    with judging(once) as server:
        write(tmp_path, stages(server))
        words = ["train", str(tmp_path / "tiny.yaml")]
        assert finish([*words, "run=whole"], tmp_path / "whole") == 0
        once.asked.clear()
        for at in (5, 20):
            trap = Trap("rlpost.rewards.judge_answers:Answers.put", at)
            assert (
                finish([*words, "stages.grpo.rewards.0.args.concurrency=1"], tmp_path / "killed", trap)
                == -signal.SIGKILL
            )
            # What was on its way when the process ended is asked again.
            once.asked.discard(server.prompts[-1])
        assert finish([*words, "stages.grpo.rewards.0.args.concurrency=1"], tmp_path / "resumed") == 0
        assert left(tmp_path / "runs/run") == left(tmp_path / "runs/whole")
        once.asked.clear()
        asked = len(server.bodies)
        assert finish_on_ranks(2, [*words, "run=ranks"], tmp_path / "ranks") == [0, 0]
        assert len(server.bodies) - asked == len(once.asked), "one rank asks"
    assert [row["reward"] for row in metrics(tmp_path, "grpo", "ranks")] == [
        row["reward"] for row in metrics(tmp_path, "grpo", "whole")
    ]


@pytest.mark.slow
def test_a_run_that_is_told_to_stop_while_its_judge_is_silent(tmp_path):
    """Takes 15 seconds, 5 of them for the judge to answer after all."""
    once, silent, free = Once(), threading.Event(), threading.Event()

    def answer(prompt: str) -> str | Refusal:
        if len(once.asked) == 20 and not free.is_set():
            silent.set()
            free.wait(100)
            return Refusal(503)
        return once(prompt)

    with judging(answer) as server:
        free.set()
        run(tmp_path, stages(server), "run=whole")
        free.clear()
        once.asked.clear()
        process = start(["train", str(tmp_path / "tiny.yaml")], tmp_path / "stopped")
        assert silent.wait(100)
        process.terminate()
        process.join(60)
        free.set()
        assert process.exitcode == 128 + signal.SIGTERM
        assert "run the same command to go on" in (tmp_path / "stopped.err").read_text("utf-8")
        run(tmp_path, stages(server))
    assert left(tmp_path / "runs/run") == left(tmp_path / "runs/whole")


def test_a_template_belongs_to_the_run(tmp_path):
    (tmp_path / "judge.txt").write_text("{{question}} {{answer}}", "utf-8")
    with judging(lambda _: '{"score": 1}') as server:
        args = {"template": "judge.txt", "criteria": None}
        resolved = prepared(tmp_path, stages(server, **args))
        assert (
            functions_of(resolved)[str(tmp_path / "judge.txt")]
            == hashlib.sha256(b"{{question}} {{answer}}").hexdigest()
        )
        elsewhere = tmp_path / "elsewhere"
        elsewhere.mkdir()
        (elsewhere / "config.resolved.yaml").write_text(resolved.to_yaml(), "utf-8")
        assert functions_of(resolve(str(elsewhere / "config.resolved.yaml"))) == functions_of(resolved)
        short = {"grpo": {**stages(server, **args)["grpo"], "steps": 1}}
        run(tmp_path, short)
        (tmp_path / "judge.txt").write_text("{{question}} {{answer}}!", "utf-8")
        with pytest.raises(RecipeError, match=r"judge\.txt"):
            run(tmp_path, short)


@pytest.mark.parametrize("missing", ["???", {"url": "???", "model_name": "m", "template": "???"}])
def test_a_judge_can_be_shown_with_what_is_still_to_be_given(tmp_path, missing):
    file = write(tmp_path, {"grpo": {**GRPO, "rewards": [{"fn": "judge", "args": missing}]}})
    assert resolve(str(file), lenient=True).missing


def test_a_judge_that_cannot_be_asked_is_told_before_a_model_is_made(tmp_path):
    with judging(lambda _: "") as server:
        resolved = prepared(tmp_path, stages(server, api_key_env="NO_SUCH_KEY"))
        for begin in (dry_run, train):
            with pytest.raises(RecipeError, match=r"^stages\.grpo\.rewards\[0\]\.args\.api_key_env: 'NO_SUCH_KEY'"):
                begin(resolved)
    assert not (tmp_path / "runs").exists()


def test_where_texts_are_sent_is_said_before_they_are(tmp_path, monkeypatch):
    monkeypatch.setenv("JUDGE_KEY", "sk-secret")
    with judging(lambda _: "") as server:
        told = dry_run(prepared(tmp_path, stages(server, api_key_env="JUDGE_KEY")))
        sent = f"shows questions and completions to m at {server.url} with the key in JUDGE_KEY"
        assert f"stages.grpo.rewards[0]: {sent}" in told
    assert "sk-secret" not in "".join(told)


def test_the_example_of_the_documentation_is_a_recipe(tmp_path):
    page = (Path(__file__).parents[1] / "docs/rewards.md").read_text("utf-8")
    block = page.partition("## A language model as judge")[2].partition("```yaml\n")[2].partition("```")[0]
    rewards = yaml.safe_load(block)["rewards"]
    config = prepared(tmp_path, {"grpo": {**GRPO, "rewards": rewards}}).config
    assert [reward.fn for reward in config.stages["grpo"].rewards] == [reward["fn"] for reward in rewards]
    assert "judge" in {reward["fn"] for reward in rewards}


@pytest.mark.extras
def test_a_model_that_rlpost_serves_judges_the_completions_of_another(tmp_path):
    """From a judge that is trained to say one verdict, over the server of transformers, to the rewards of a run."""
    given = {
        "mode": "score",
        "criteria": CRITERIA,
        "scale": [0, 4],
        "pairs": "all",
        "template": None,
        "reference": None,
    }
    rubric = rubric_of(given, "", tmp_path)
    said = [{"question": f"{n}+{n}=", "answer": "<pad>+" * (n % 4) + "12345"[: n % 6]} for n in range(10, 74)]
    turns = [[("user", rubric.prompt(texts)), ("assistant", '{"odd": 3}')] for texts in said]
    jsonl(tmp_path / "said.jsonl", [{"messages": [{"role": r, "content": c} for r, c in own]} for own in turns])
    (tmp_path / "turns.jinja").write_text(TEMPLATE, "utf-8")
    judge = {
        **MODEL,
        "config": {**MODEL["config"], "max_position_embeddings": 4096},
        "tokenizer": {"kind": "characters", "alphabet": string.printable},
        "chat_template": str(tmp_path / "turns.jinja"),
    }
    data = {"said": {"path": "said.jsonl"}}
    sft = {**SFT, "data": data, "steps": 200, "batch_size": 4, "max_length": 4096}
    trained = run(tmp_path, {"sft": sft}, "run=judge", model=judge)
    port = free_port()
    words = [sys.executable, "-m", "rlpost", "serve", str(trained), "--port", str(port)]
    with (tmp_path / "told").open("w") as told:
        server = subprocess.Popen(words, stdout=told, stderr=told)
    try:
        wait_for(lambda: listens(port), lambda: server.poll() is None)
        named = re.search(r"/v1, model (\S+),", (tmp_path / "told").read_text("utf-8"))
        assert named is not None
        args = {"url": f"http://localhost:{port}/v1", "model_name": named[1], "criteria": CRITERIA, "scale": [0, 4]}
        rewards = [{"fn": "judge", "args": {**args, "max_tokens": 20}}]
        run(tmp_path, {"grpo": {**GRPO, **FEW, "steps": 1, "rewards": rewards}})
    finally:
        server.send_signal(signal.SIGINT)
        server.wait(60)
    assert [row["reward/judge"] for row in metrics(tmp_path, "grpo")] == [0.75]
