"""What rewards, evaluations and judges read of a completion whose markers the tokenizer declares special."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tiny_world import byte_tokenizer, rlpost, save_model, save_recipe, save_rows

from rlpost.data.step_split import split_steps, step_texts
from rlpost.engine.stopping import StopStrings, finished
from rlpost.types import Completion, Group

TOKENIZER = byte_tokenizer(more=("<think>", "</think>"))
ANSWER = "<think>a</think>4"


def ids_of(text: str) -> tuple[int, ...]:
    return tuple(TOKENIZER.encode(text, add_special_tokens=False))


def test_a_reward_sees_the_markers_that_a_model_has_learned(here: Path, tally):
    save_model(here / "m", tokenizer=TOKENIZER)
    save_rows(here / "d.jsonl", [{"prompt": "2+2=", "completion": ANSWER}] * 4)
    data = {"c": {"path": "d.jsonl"}}
    recipe = {
        "model": {"path": "m", "precision": "float32"},
        "stages": {
            "sft": {
                "kind": "sft",
                "data": data,
                "steps": 60,
                "batch_size": 4,
                "learning_rate": 1e-2,
                "schedule": "constant",
            }
        },
        "evaluation": {
            "data": data,
            "rewards": [{"fn": "pattern", "args": {"regex": "<think>.*</think>4", "whole": True}}],
            "samples": 0,
            "sampling": {"max_new_tokens": 10},
        },
    }
    assert rlpost("train", save_recipe(here / "r.yaml", recipe)).code == 0
    told = json.loads((here / "runs/r/evaluation/sft.json").read_text())
    assert told["greedy"]["accuracy"]["all"]["value"] == 1.0
    (sample,) = {json.loads(x)["completion"] for x in (here / "runs/r/evaluation/sft.jsonl").read_text().splitlines()}
    assert sample == ANSWER
    tally("special tokens", right=1)


@pytest.mark.parametrize("end", ["<|im_end|>", "<|endoftext|>"])
def test_only_what_ends_a_completion_is_left_out_of_its_text(end, tally):
    ends = ids_of("<|im_end|><|endoftext|>")
    ids = ids_of(ANSWER + end)
    assert finished(ids, [0.0] * len(ids), True, ends, StopStrings(TOKENIZER, [])).text == ANSWER
    stopped = finished(ids_of("<think>a</think>"), [0.0] * 3, True, ends, StopStrings(TOKENIZER, ["</think>"]))
    assert stopped.text == "<think>a"
    tally("special tokens", right=2)


def test_steps_end_at_markers_and_hold_them(tally):
    ends = ids_of("<|im_end|>")
    ids = ids_of(ANSWER + "<|im_end|>")
    group = Group((1,), (Completion(ids, (True,) * len(ids), ANSWER, "stop"),))
    (divided,) = split_steps(group, TOKENIZER, "</think>", ends).completions
    assert tuple(divided.steps) == (3, 2)
    assert step_texts(divided, TOKENIZER, ends) == ["<think>a</think>", "4"]
    tally("special tokens", right=1)
