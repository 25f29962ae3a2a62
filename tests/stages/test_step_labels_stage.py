"""Steps labelled by fresh rollouts: rows that a process reward model learns from."""

from __future__ import annotations

import json
import os
import signal
from types import SimpleNamespace

import pytest
from tiny_recipes import LORA, SFT, base, jsonl, metrics, run

from rlpost.errors import DataError, Interrupted
from rlpost.recipe.specs.step_labels import StepLabels
from rlpost.rewards.score import Scorer
from rlpost.stages import step_labels as stage
from rlpost.types import Completion, Group, completions

LABELS = {
    "kind": "step_labels",
    "data": SFT["data"],
    "prompts": 12,
    "group_size": 2,
    "sampling": {"max_new_tokens": 5},
    "rewards": [{"fn": "pattern", "args": {"regex": "1"}}],
    "step_end": "",
    "fresh_rollouts": 4,
}
JUDGE = {
    "kind": "process_reward_model",
    "data": {"steps": {"stage": "labels"}},
    "steps": 3,
    "batch_size": 8,
    "learning_rate": 1e-2,
    "max_length": 16,
}
LETTERS = "abcdefgh"
TOKENIZER = SimpleNamespace(decode=lambda ids, **_: "".join(LETTERS[i] for i in ids))


def said(text: str) -> Completion:
    ids = tuple(LETTERS.index(letter) for letter in text)
    return Completion(ids, (True,) * len(ids), text, "stop")


def labels_of(monkeypatch, texts: list[str], tried: list[list[str]], rewards: dict[str, float | None]) -> list[dict]:
    """Rows of one prompt's completions, given the rollouts from the end of every step but the last ones."""
    asked = Group((1,), (), {"prompt": "p"})
    states = []

    def fresh(engine, tokenizer, groups, ends, k, sampling, seed):
        for completion, own in zip(completions(groups), ends, strict=True):
            states.extend(completion.text[:end] for end in own)
        assert k == 4
        return [Group((1,), tuple(map(said, one))) for one in tried]

    class Table:
        def score(self, groups, steps=None):  # noqa: ARG002 - told of them, as every scorer is
            return SimpleNamespace(total=[[rewards[c.text] for c in g.completions] for g in groups])

    monkeypatch.setattr(stage, "collect", lambda *_, **__: [Group((1,), tuple(map(said, texts)), asked.example)])
    monkeypatch.setattr(stage, "mc_rollouts", fresh)
    rows = list(
        stage.labelled(
            None, SimpleNamespace(tokenizer=TOKENIZER, end_ids=()), [asked], Table(), StepLabels(step_end="a"), 0
        )
    )
    assert states == [t[: i + 1] for t in texts for i, letter in enumerate(t[:-1]) if letter == "a"]
    return rows


def test_a_steps_label_is_the_mean_of_its_rollouts_and_the_last_ones_the_completions_own(monkeypatch):
    tried = [["bac", "bad", "bad", "bad"], ["cabc", "cabd"], ["cabac", "cabad", "cabad"]]
    rewards = {"bad": 0.0, "bac": 1.0, "cabc": 1.0, "cabd": 0.0, "cabad": 1.0, "cabac": 0.0, "dd": 0.25}
    rows = labels_of(monkeypatch, ["bad", "cabad", "dd"], tried, rewards)
    assert rows == [
        {"prompt": "p", "steps": ["ba", "d"], "labels": [0.25, 0.0]},
        {"prompt": "p", "steps": ["ca", "ba", "d"], "labels": [0.5, 2 / 3, 1.0]},
        {"prompt": "p", "steps": ["dd"], "labels": [0.25]},
    ]


def test_what_is_unscored_is_left_out_and_with_nothing_left_so_is_the_row(monkeypatch):
    rewards = {"bad": 1.0, "bac": None, "cad": 0.5, "cac": None, "ead": None}
    tried = [["bad", "bac"], ["cac", "cac"], ["bad", "bad"]]
    rows = labels_of(monkeypatch, ["bad", "cad", "ead"], tried, rewards)
    assert rows == [{"prompt": "p", "steps": ["ba", "d"], "labels": [1.0, 1.0]}]


def rows_of(final) -> list[dict]:
    return [json.loads(line) for line in (final / "rows.jsonl").read_text("utf-8").splitlines()]


@pytest.mark.parametrize("lora", [(), (LORA,)], ids=["full", "lora"])
def test_a_stage_writes_rows_that_a_process_reward_model_learns_from(tmp_path, lora):
    # The policy passes unchanged through both.
    assert run(tmp_path, {"sft": SFT, "labels": LABELS, "judge": JUDGE}, *lora) == tmp_path / "runs/run/sft/final"
    rows = rows_of(tmp_path / "runs/run/labels/final")
    assert 12 <= len(rows) <= 24
    for row in rows:
        assert row["prompt"][2] == "+"
        assert "answer" in row
        assert all(len(step) == 1 or step in ("<pad>", "<bos>", "<unk>") for step in row["steps"])
        found = False
        for i, (step, label) in enumerate(zip(row["steps"], row["labels"], strict=True)):
            found = found or step == "1"
            assert label in (0.0, 0.25, 0.5, 0.75, 1.0)
            # What has earned its reward goes on having it; after the last step nothing can be earned any more.
            assert label == 1.0 if found else i < len(row["steps"]) - 1 or label == 0.0
    tried = [label for row in rows for label in row["labels"][:-1]]
    assert set(tried) > {0.0, 1.0}, "all rollouts of every state agree"
    (first, *_), labels = metrics(tmp_path, "judge"), [label for row in rows for label in row["labels"]]
    assert len(metrics(tmp_path, "judge")) == 3
    assert min(labels) < first["label"] < max(labels)
    made = json.loads((tmp_path / "runs/run/labels/final/checkpoint.json").read_text("utf-8"))
    assert (made["kind"], made["parent"]) == ("step_labels", str(tmp_path / "runs/run/sft/final"))


def test_the_same_seed_gives_the_same_rows(tmp_path):
    rows = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        run(tmp_path, {"labels": {**LABELS, "prompts": 6}}, f"run={name}", f"seed={seed}")
        rows.append(rows_of(tmp_path / f"runs/{name}/labels/final"))
    assert rows[0] == rows[1] != rows[2]


def test_conversations_are_labelled_and_learned_from(tmp_path):
    (tmp_path / "chat.jinja").write_text(
        "{% for m in messages %}{% if m.role == 'assistant' %}{{ '=' + m.content + eos_token }}"
        "{% else %}{{ m.content }}{% endif %}{% endfor %}{% if add_generation_prompt %}={% endif %}"
    )
    asked = [{"role": "user", "content": "1+2"}]
    jsonl(tmp_path / "chat.jsonl", [{"messages": asked}, {"messages": [*asked, {"role": "assistant", "content": "3"}]}])
    labels = {**LABELS, "data": {"chat": {"path": "chat.jsonl"}}, "prompts": 2, "group_size": 4}
    template = f"model.chat_template={tmp_path / 'chat.jinja'}"
    assert run(tmp_path, {"labels": labels, "judge": JUDGE}, template) == base(tmp_path)
    rows = rows_of(tmp_path / "runs/run/labels/final")
    assert len(rows) > 4
    assert all(row["prompt"] == asked for row in rows)
    assert len(metrics(tmp_path, "judge")) == 3


def test_no_row_at_all_is_an_error_that_says_what_to_do(tmp_path):
    with pytest.raises(DataError, match=r"stages\.labels: no completion has steps.*check step_end='=' and the"):
        run(tmp_path, {"labels": {**LABELS, "step_end": "=", "rewards": [{"fn": "rewards.py:none"}]}})
    assert not (tmp_path / "runs/run/labels/DONE").exists()


def test_a_signal_ends_the_sampling_between_two_lots_of_prompts(tmp_path, monkeypatch):
    monkeypatch.setattr(stage, "AT_ONCE", 4)
    score, asked = Scorer.score, []

    def signalled(self, groups, steps=None):
        if not asked:
            os.kill(os.getpid(), signal.SIGTERM)
        asked.append(len(groups))
        return score(self, groups, steps)

    monkeypatch.setattr(Scorer, "score", signalled)
    with pytest.raises(Interrupted, match=r"labels stopped while it sampled") as raised:
        run(tmp_path, {"labels": LABELS})
    assert raised.value.exit_code == 143
    assert asked[1:] == [4], "the first lot's rollouts, then its four groups themselves, and no other lot"
    assert not (tmp_path / "runs/run/labels/DONE").exists()
