"""`rlpost eval --harness lm_eval` gives the scores of rlpost's own evaluation, row by row."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from tiny_recipes import LORA, SFT, greedy, jsonl, policy, run, write

from rlpost.cli.app import main
from rlpost.data.codec import make_codec
from rlpost.errors import ModelError, RecipeError
from rlpost.evaluate.task_files import read_task_files
from rlpost.inference.evaluate import evaluate_checkpoint, sample_rows
from rlpost.inference.harness import HarnessOptions, HarnessResult, evaluate_harness, score_tasks
from rlpost.policy.policy import Policy
from rlpost.policy.score import logprobs
from rlpost.types import Completion, Group

pytestmark = pytest.mark.extras
PROMPTS = [f"{a}+{b:02d}=" for a in (12, 34, 56, 78) for b in (9, 31, 70)]
TEMPLATE = (
    "{% for m in messages %}{{ '1' if m.role == 'user' else '2' }}{{ m.content }}<eos>{% endfor %}"
    "{% if add_generation_prompt %}2{% endif %}"
)
EVALUATION = {
    "data": {"rows": {"path": "rows.jsonl"}},
    "rewards": [{"fn": "addition.correct"}],
    "sampling": {"max_new_tokens": 5},
    "samples": 0,
    "every_stage": False,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A run with an adapter, a recipe, and rows of which the model answers every second one right."""
    made = tmp_path_factory.mktemp("harness")
    last = run(made, {"sft": {**SFT, "steps": 80}}, LORA)
    answers = greedy(policy(last), *PROMPTS)
    assert len(set(answers)) > 2
    rows = [
        {
            "prompt": p,
            "answer": a if i % 2 else a + "0",
            "choices": ["1", "23", a or "7", "0=4"],
            "right": i % 4,
        }
        for i, (p, a) in enumerate(zip(PROMPTS, answers, strict=True))
    ]
    jsonl(made / "rows.jsonl", rows)
    write(made, {"sft": SFT}, evaluation=EVALUATION)
    return made


def task(folder: Path, name: str, **settings: Any) -> Path:
    made = {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(folder / "rows.jsonl")}},
        "test_split": "test",
        "doc_to_text": "{{prompt}}",
        "doc_to_target": "{{answer}}",
        "output_type": "generate_until",
        "generation_kwargs": {"until": ["\n"], "max_gen_toks": 5, "do_sample": False},
        "metric_list": [{"metric": "exact_match"}],
        **settings,
    }
    file = folder / f"{name}.yaml"
    file.write_text(yaml.safe_dump({k: v for k, v in made.items() if v is not None}), "utf-8")
    return file


def choosing(folder: Path, name: str = "choosing", **settings: Any) -> Path:
    plain = {"doc_to_choice": "{{choices}}", "doc_to_target": "{{right}}", "target_delimiter": ""}
    metrics = [{"metric": "acc"}, {"metric": "acc_norm"}]
    no_text = {"output_type": "multiple_choice", "generation_kwargs": None, "metric_list": metrics}
    return task(folder, name, **plain, **no_text, **settings)


def scored(folder: Path, *files: Path, **options: Any) -> HarnessResult:
    chosen = HarnessOptions(**options)
    read = read_task_files(list(map(str, files)), chosen.trusted)
    return evaluate_harness(str(folder / "runs/run"), None, ["model.precision=float32"], read, chosen)[0]


def test_generated_answers_and_scores_are_those_of_our_own_evaluation(folder):
    prompts, ours, _ = evaluate_checkpoint(str(folder / "runs/run"), str(folder / "tiny.yaml"), [])
    own = list(sample_rows(prompts, ours))
    for batch in (1, 5):
        theirs = scored(folder, task(folder, "sums"), batch_size=batch)
        assert [row["requests"][0][0] for row in theirs.rows] == [row["example"]["prompt"] for row in own]
        assert [row["answers"][0][0] for row in theirs.rows] == [row["completion"] for row in own]
        assert [row["scores"]["exact_match"] for row in theirs.rows] == [row["reward"] for row in own]
        (score,) = theirs.scores
        assert score.estimate == ours.summaries["greedy"].accuracy["all"]
        assert (score.rows, score.share) == (12, True)
    assert 0 < score.estimate.value < 1


def test_choices_are_scored_by_the_log_probabilities_of_the_policy(folder):
    found = policy(folder / "runs/run/sft/final")
    result = scored(folder, choosing(folder), batch_size=3)
    right, right_by_length = [], []
    for row in result.rows:
        choices = [choice for _, choice in row["requests"]]
        own = summed(found, row["example"]["prompt"], choices)
        assert [answer[0][0] for answer in row["answers"]] == pytest.approx(own, abs=1e-4)
        right.append(float(max(range(4), key=own.__getitem__) == row["target"]))
        by_length = [value / len(choice) for value, choice in zip(own, choices, strict=True)]
        right_by_length.append(float(max(range(4), key=by_length.__getitem__) == row["target"]))
    assert [row["scores"]["acc"] for row in result.rows] == right
    assert [row["scores"]["acc_norm"] for row in result.rows] == right_by_length
    assert {s.name: s.estimate.value for s in result.scores} == pytest.approx(
        {"acc": sum(right) / 12, "acc_norm": sum(right_by_length) / 12}
    )
    assert 0 < sum(right) < 12


def summed(found: Policy, prompt: str, choices: list[str]) -> list[float]:
    """The log-probability of each choice after the prompt, by rlpost's own forward pass."""
    codec = make_codec(found.tokenizer)
    ids = [codec.ids(choice, "a choice") for choice in choices]
    start = (*codec.begin, *codec.ids(prompt, "the prompt"))
    groups = [Group(start, tuple(Completion(i, (True,) * len(i)) for i in ids))]
    logp = logprobs(found, groups).split([len(i) for i in ids])
    return [float(piece.sum()) for piece in logp]


def test_chat_asks_with_the_prompt_of_training(folder, tmp_path):
    found = policy(folder / "runs/run/sft/final")
    found.tokenizer.chat_template = TEMPLATE
    (tmp_path / "t.jinja").write_text(TEMPLATE)
    talks = [{"prompt": [{"role": "user", "content": p}], "answer": "1"} for p in PROMPTS]
    jsonl(tmp_path / "rows.jsonl", talks)
    recipe = str(write(tmp_path, {"sft": SFT}, evaluation=EVALUATION))
    template = f"model.chat_template={tmp_path / 't.jinja'}"
    prompts, ours, _ = evaluate_checkpoint(str(folder / "runs/run"), recipe, [template])
    read = read_task_files([str(task(folder, "chatting"))])
    theirs = score_tasks(found, read, HarnessOptions(chat=True))
    assert [row["requests"][0][0] for row in theirs.rows] == prompts
    assert [row["answers"][0][0] for row in theirs.rows] == [r["completion"] for r in sample_rows(prompts, ours)]


def test_the_command_prints_a_table_and_lines(folder, monkeypatch, capsys):
    files = [task(folder, "sums"), choosing(folder)]
    words = ["eval", str(folder / "runs/run"), "--harness", "lm_eval", *(w for f in files for w in ("--tasks", str(f)))]
    for more in ([], ["--json", "--limit", "4"]):
        monkeypatch.setattr(sys, "argv", ["rlpost", *words, *more])
        with pytest.raises(SystemExit) as caught:
            main()
        assert not caught.value.code
        printed = capsys.readouterr()
        assert "choosing  acc_norm" in printed.err
        if not more:
            assert "sums.exact_match.value: 0.5" in printed.out
            continue
        *rows, last = map(json.loads, printed.out.splitlines())
        assert [(row["task"], row["row"]) for row in rows] == [(t, i) for t in ("sums", "choosing") for i in range(4)]
        assert last["summary"]["sums"]["exact_match"]["rows"] == 4


def test_a_template_cannot_reach_the_interpreter_unless_trusted(folder):
    reach = "{{ prompt.__class__.__name__ }}"
    with pytest.raises(RecipeError, match="SecurityError"):
        scored(folder, task(folder, "reaching", doc_to_text=reach))
    trusted = scored(folder, task(folder, "reaching", doc_to_text=reach), trusted=True, limit=1)
    assert trusted.rows[0]["requests"][0][0] == "str"


def test_functions_of_a_trusted_file_are_run(folder):
    (folder / "own.py").write_text("def ask(doc):\n    return doc['prompt'] + '1'\n")
    file = task(folder, "own", doc_to_text=None)
    with file.open("a", encoding="utf-8") as opened:
        opened.write("doc_to_text: !function own.ask\n")
    with pytest.raises(RecipeError, match=r"!function own\.ask"):
        scored(folder, file)
    assert scored(folder, file, trusted=True, limit=1).rows[0]["requests"][0][0] == PROMPTS[0] + "1"


def test_what_lm_eval_or_the_model_cannot_do_is_one_line(folder):
    cases = {
        "no room": (ModelError, "leave no room for a prompt", {"generation_kwargs": {"until": ["\n"]}}),
        "no column": (RecipeError, "'absent' is undefined", {"doc_to_text": "{{absent}}"}),
        "no metric": (RecipeError, "no metric of this name", {"metric_list": [{"metric": "mine"}]}),
        "no split": (RecipeError, "lm-eval refuses it", {"test_split": "absent"}),
        "no type": (RecipeError, "lm-eval refuses it", {"output_type": "absent"}),
    }
    for name, (kind, said, settings) in cases.items():
        with pytest.raises(kind, match=said) as refused:
            scored(folder, task(folder, name.replace(" ", "_"), **settings))
        assert "\n" not in str(refused.value)
    with pytest.raises(ModelError, match="no chat template"):
        scored(folder, task(folder, "sums"), chat=True)
