"""Data as people have it, through the front door: said aloud, shown with what is trained, trained as its format is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tiny_world import CHATML, Ran, byte_tokenizer, rlpost, save_model, save_recipe, save_rows, tiny_model

Row = dict[str, Any]
ASK, SAY = {"role": "user", "content": "Rain?"}, {"role": "assistant", "content": "No."}
ALPACA = {"instruction": "Rain?", "input": "", "output": "No."}
SHAREGPT = {"conversations": [{"from": "human", "value": "Rain?"}, {"from": "gpt", "value": "No."}]}
HH = {"chosen": "\n\nHuman: Rain?\n\nAssistant: No.", "rejected": "\n\nHuman: Rain?\n\nAssistant: Yes."}
SCORED = {"instruction": "Rain?", "completions": [{"response": "No.", "score": 2}, {"response": "Yes.", "score": 1}]}
RANKED = {"loss": {"fn": "plackett_luce"}}
OPENED = "<|im_start|>user⏎Rain?<|im_end|>⏎<|im_start|>assistant⏎"
NO, YES = f"{OPENED}»No.<|im_end|>«", f"{OPENED}»Yes.<|im_end|>«"
REWARDS = {"rewards": [{"fn": "length", "args": {"target": 8}}]}
SCORES = [f"score 2: {NO}", f"score 1: {YES}"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    tokenizer = byte_tokenizer(CHATML)
    model = tiny_model(vocabulary=len(tokenizer), max_position_embeddings=2048)
    return save_model(tmp_path_factory.mktemp("model"), model, tokenizer)


def run(folder: Path, verb: str, kind: str, rows: list[Row], *words: object, **stage: Any) -> Ran:
    save_rows(Path("rows.jsonl"), rows)
    learns = {} if kind == "pairs" else {"steps": 2, "learning_rate": 1e-2}
    whole = {"kind": kind, "data": {"c": {"path": "rows.jsonl"}}, **learns, **stage}
    save_recipe(Path("r.yaml"), {"model": {"path": str(folder)}, "stages": {"s": whole}})
    return rlpost(verb, "r.yaml", *words)


@pytest.mark.parametrize(
    ("kind", "row", "stage", "said", "lines"),
    [
        ("sft", ALPACA, {}, "alpaca (instruction, input, output)", [NO]),
        ("sft", SHAREGPT, {}, "sharegpt (conversations)", [NO]),
        ("dpo", HH, {}, "hh-rlhf (chosen, rejected)", [f"chosen:   {NO}", f"rejected: {YES}"]),
        ("reward_model", HH, {}, "hh-rlhf (chosen, rejected)", [f"chosen:   {NO}", f"rejected: {YES}"]),
        ("reward_model", SCORED, RANKED, "scored answers (instruction, completions)", SCORES),
        ("kto", {**SHAREGPT, "label": 0}, {}, "sharegpt (conversations, label)", [f"label false: {NO}"]),
        ("kto", {**ALPACA, "label": True}, {}, "alpaca (instruction, input, output, label)", [f"label true: {NO}"]),
        ("pairs", SHAREGPT, REWARDS, "sharegpt (conversations)", [OPENED]),
    ],
)  # fmt: skip
def test_a_layout_is_said_and_shown(kind, row, stage, said, lines, folder, here, tally):
    shown = run(folder, "show", kind, [row], "--rows", 1, **stage)
    assert shown.code == 0, shown.err
    assert f"rows.jsonl): 1 rows, read as {said}" in shown.out
    assert shown.out.splitlines()[-len(lines) :] == [f"  {line}" for line in lines]
    tally("layouts as shown", right=1)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "row", "same"),
    [
        ("sft", ALPACA, {"messages": [ASK, SAY]}),
        ("sft", SHAREGPT, {"messages": [ASK, SAY]}),
        ("dpo", HH, {"prompt": [ASK], "chosen": "No.", "rejected": "Yes."}),
    ],
)
def test_training_on_a_layout_makes_the_weights_that_its_format_makes(kind, row, same, folder, here, tally):
    from safetensors.torch import load_file

    made = []
    for name, rows in {"layout": [row], "format": [same]}.items():
        ran = run(folder, "train", kind, rows, f"run={name}", "model.precision=float32", batch_size=1, max_length=64)
        assert ran.code == 0, ran.err
        made.append(load_file(next(Path(ran.out.strip()).glob("*.safetensors"))))
    assert made[0].keys() == made[1].keys()
    assert all(made[0][key].equal(made[1][key]) for key in made[0])
    tally("layouts trained on", right=1)


def test_what_is_no_layout_is_refused_before_a_model_is_loaded(folder, here, tally):
    own = {"instruction": "Rain?", "context": "Oslo", "response": "No."}
    for verb, words in (("show", ("--rows", 1)), ("train", ("--dry-run",))):
        ran = run(folder, verb, "sft", [own], *words)
        assert ran.refused(3, "columns: {output: response, input: context}")
    both = run(folder, "show", "sft", [{**ALPACA, "text": "Rain? No."}], "--rows", 1)
    assert both.refused(3, "text and as alpaca", "columns: {text: text} or columns: {instruction: instruction}")
    tally("layouts refused", refused=3)
