"""Pairs that are none, and what `show --rows` tells of rows that are judged."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tiny_world import Ran, byte_tokenizer, rlpost, save_model, save_recipe, save_rows, tiny_model

GOOD = {"prompt": "a", "chosen": "bc", "rejected": "bd"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    tokenizer = byte_tokenizer()
    return save_model(tmp_path_factory.mktemp("model"), tiny_model(vocabulary=len(tokenizer)), tokenizer)


def recipe(folder: Path, kind: str, rows: list[dict[str, Any]], **stage: Any) -> str:
    save_rows(Path("rows.jsonl"), rows)
    whole = {"kind": kind, "data": {"c": {"path": "rows.jsonl"}}, "steps": 2, "learning_rate": 1e-2, **stage}
    save_recipe(Path("r.yaml"), {"model": {"path": str(folder)}, "stages": {"s": whole}})
    return "r.yaml"


def show(folder: Path, kind: str, rows: list[dict[str, Any]], **stage: Any) -> Ran:
    return rlpost("show", recipe(folder, kind, rows, **stage), "--rows", 9)


RANKING = {"loss": {"fn": "dpo_plackett_luce"}}
RANKED_SCORES = {"loss": {"fn": "plackett_luce"}}
EQUAL = [
    ("dpo", {**GOOD, "rejected": "bc"}, {}),
    ("reward_model", {**GOOD, "rejected": "bc"}, {}),
    ("dpo", {**GOOD, "rejected": "bc"}, RANKING),
    ("dpo", {"prompt": "a", "completions": ["b", "b", "c"], "scores": [1, 0, None]}, RANKING),
    ("reward_model", {"prompt": "a", "completions": ["b", "b"], "scores": [1, 0]}, RANKED_SCORES),
    ("dpo", {"prompt": "a", "chosen": "b" * 9, "rejected": "b" * 9 + "c"}, {"max_length": 6, "too_long": "cut"}),
]


@pytest.mark.parametrize(("kind", "row", "stage"), EQUAL)
def test_pairs_of_equal_completions_are_left_out_and_counted(kind, row, stage, folder, here, tally):
    good = {"prompt": "a", "completions": ["b", "c"], "scores": [1, 0]} if "completions" in row else GOOD
    ran = show(folder, kind, [good, row, good], **stage)
    assert "1 of 3 rows dropped: their completions are the same, token by token, so none is better" in ran.out
    alone = show(folder, kind, [row], **stage)
    assert alone.refused(3, "none of 1 rows is left", "their completions are the same")
    tally("pairs of equal completions", right=1, refused=1)


def test_training_on_equal_pairs_beside_others_moves_nothing_by_them(folder, here, tally):
    """The weights are those that the other pairs alone make."""
    from safetensors.torch import load_file

    made = []
    for name, rows in {"with": [GOOD, {**GOOD, "rejected": "bc"}], "without": [GOOD]}.items():
        ran = rlpost(
            "train", recipe(folder, "dpo", rows, batch_size=1, max_length=64), f"run={name}", "model.precision=float32"
        )
        assert ran.code == 0, ran.err
        made.append(load_file(Path("runs") / name / "s/final/model.safetensors"))
    assert all((made[0][key] == made[1][key]).all() for key in made[0])
    tally("pairs of equal completions", right=1)


@pytest.mark.parametrize(
    ("kind", "row", "stage", "lines"),
    [
        ("dpo", GOOD, {}, ["  chosen:   a»bc<|im_end|>«", "  rejected: a»bd<|im_end|>«"]),
        ("kto", {"prompt": "a", "completion": "b", "label": "no"}, {}, ["  label false: a»b<|im_end|>«"]),
        (
            "dpo",
            {"prompt": "a", "completions": ["b", "c", "d"], "scores": [0.5, 0, None]},
            RANKING,
            ["  score 0.5: a»b<|im_end|>«", "  score 0: a»c<|im_end|>«", "  score none: a»d<|im_end|>«"],
        ),
        (
            "process_reward_model",
            {"prompt": "a", "steps": ["b", "c"], "labels": [1, 0.5]},
            {},
            ["  labels 1, 0.5: a»bc«"],
        ),
        ("sft", {"prompt": "a", "completions": ["b", "c"]}, {}, ["  1: a»b<|im_end|>«", "  2: a»c<|im_end|>«"]),
        ("sft", {"prompt": "a", "completion": "bcdef"}, {"max_length": 4, "too_long": "cut"}, ["  a»bcd«"]),
    ],
)
def test_show_tells_what_is_said_of_completions(kind, row, stage, lines, folder, here, tally):
    shown = show(folder, kind, [row], **stage).out.splitlines()
    assert shown[-len(lines) :] == lines
    tally("rows as shown", right=1)


def test_show_keeps_to_the_limits_of_the_stage(folder, here, tally):
    assert show(folder, "sft", [{"prompt": "a", "completion": "b" * 9}], max_length=8).refused(
        3, "rows.jsonl:1) has 11"
    )
    dropped = show(
        folder, "sft", [{"prompt": "a", "completion": "b" * n} for n in (2, 9)], max_length=8, too_long="drop"
    )
    assert "1 of 2 rows dropped: longer than 8 tokens" in dropped.out
    assert "row lengths: p50 4, p95 4, most 4, limit 8: 1 dropped" in dropped.out
    assert show(folder, "sft", [{"prompt": "a", "completion": "b" * 600}], max_length=1024).refused(
        3, "the limit is 512"
    )
    tally("rows as shown", right=1, refused=2)


def test_rows_of_later_stages_are_read_before_anything_is_trained(folder, here, tally):
    save_rows(Path("asked.jsonl"), [{"prompt": "a", "completion": "b"}])
    save_rows(Path("rows.jsonl"), [GOOD, {**GOOD, "chosen": 3}])
    learns = {"steps": 1, "learning_rate": 1e-3}
    stages = {
        "first": {"kind": "sft", "data": {"c": {"path": "asked.jsonl"}}, **learns},
        "then": {"kind": "dpo", "data": {"c": {"path": "rows.jsonl"}}, **learns},
    }
    save_recipe(Path("r.yaml"), {"model": {"path": str(folder)}, "stages": stages})
    assert rlpost("train", "r.yaml").refused(3, "stages.then.data.c", "rows.jsonl:2", "'chosen' is int")
    assert not list(Path("runs").rglob("*.safetensors"))
    tally("rows of later stages", refused=1)
