"""The pure parts of scripts/bench, and its gate with small processes."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

BENCH = Path(__file__).parents[1] / "scripts/bench"
sys.path.insert(0, str(BENCH))

from compare import WORKLOADS, candidates, defaults_of_peer, same_numbers  # noqa: E402
from gate import BenchError  # noqa: E402
from growth import exponents  # noqa: E402
from limit import body_parameters, decode_seconds, training_operations  # noqa: E402
from pairs import WARM, in_turn, ratio, start  # noqa: E402
from report import MARKS, publish, tables  # noqa: E402
from workload import Lengths, make_rows  # noqa: E402

SMALL = {
    "hidden_size": 4,
    "intermediate_size": 6,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "vocab_size": 10,
}


def test_lengths_are_lognormal_around_their_medians_and_bounded() -> None:
    prompt, completion = Lengths(62, 98, most=300).draw(np.random.default_rng(0), 4000)
    assert abs(np.median(prompt) - 62) < 3
    assert abs(np.median(completion) - 98) < 5
    assert prompt.min() >= 2
    assert completion.max() == 300
    assert abs(np.log(prompt).std() - 0.5) < 0.03


def test_rows_have_as_many_words_as_tokens_were_drawn() -> None:
    rows = make_rows("dpo", 5, Lengths(7, 9, 0.0), vocabulary=50)
    assert all(row.lengths == [(7, 10), (7, 10)] for row in rows)
    assert rows[0].as_json("dpo").keys() == {"prompt", "chosen", "rejected"}
    assert make_rows("dpo", 5, Lengths(7, 9, 0.0), vocabulary=50) == rows


def test_ratios_are_of_neighbours_and_of_the_last_steps() -> None:
    found = ratio([99.0, 2.0, 9.0, 8.0, 10.0], [1.0, 3.0, 2.0, 2.0])
    assert (found.median, found.low, found.high) == (3.5, 2.75, 4.25)
    assert ratio([6.0], [3.0]).median == 2.0


def test_operations_of_a_step_count_a_shared_prompt_once() -> None:
    body = body_parameters(SMALL)
    assert body == 2 * (16 + 8 + 8 + 16 + 3 * 24)
    rows = [[(5, 3), (5, 2)]]  # a prompt of 5 tokens with two completions
    seen = 25 / 2 + (15 + 4.5) + (10 + 2)
    forward = 2 * body * 10 + 2 * 40 * 5
    assert training_operations(SMALL, rows) == 3 * forward + 3 * 4 * 8 * seen
    assert training_operations(SMALL, rows, reference=0.5) == 3.5 * forward + 3.5 * 4 * 8 * seen
    assert training_operations(SMALL, rows, lora=True) == 2 * forward + 3 * 4 * 8 * seen


def test_a_decoding_step_is_bound_by_products_or_by_reading() -> None:
    weights = body_parameters(SMALL) + 40
    assert decode_seconds(SMALL, 8, 100, operations=1.0, read=1e12) == 2 * weights * 8
    assert decode_seconds(SMALL, 8, 100, operations=1e12, read=1.0) == 4 * (weights + 2 * 2 * 2 * 100 * 8)


def test_growth_is_an_exponent_between_neighbours() -> None:
    assert exponents([1, 2, 8], [3.0, 6.0, 96.0]) == pytest.approx([1.0, 2.0])


def test_nothing_is_compared_unless_the_first_step_is_trls() -> None:
    own = {"loss": 2.0, "grad_norm": 1.0, "length": 3.0}
    assert same_numbers("sft", own, {"loss": 2.000001, "grad_norm": 1.0}) == {
        "loss": pytest.approx(5e-7),
        "grad_norm": 0,
    }
    with pytest.raises(BenchError, match=r"sft: not compared, .* loss 2 against 2, grad_norm 1 against 1.01"):
        same_numbers("sft", own, {"loss": 2.0, "grad_norm": 1.01})
    assert same_numbers("sft", own, {"loss": 2.0, "grad_norm": 1.01}, lora=True) == {"loss": 0}
    with pytest.raises(BenchError, match="grad_norm nan"):
        same_numbers("sft", {**own, "grad_norm": float("nan")}, {"loss": 2.0, "grad_norm": 1.0})
    with pytest.raises(BenchError, match="given_logprob nan"):
        same_numbers("grpo", {"given_logprob": float("nan")}, {"given_logprob": -8.0})


@pytest.mark.parametrize("has", [True, False])
def test_trl_is_tried_in_the_precisions_that_the_processor_has_and_packed(has: bool, monkeypatch) -> None:
    monkeypatch.setattr("compare.has_half", lambda: has)
    half = ["bfloat16"] * has
    assert list(candidates(WORKLOADS["sft"], "bfloat16", 3000)) == ["float32", *half, "float32, packed"]
    assert defaults_of_peer() == ({} if has else {"bf16": False})
    assert list(candidates(WORKLOADS["grpo"], "float32", 0)) == ["float32"]
    assert all(c["precompute_ref_log_probs"] for c in candidates(WORKLOADS["dpo-two-epochs"], "bfloat16", 0).values())


SIDE = f"""
import json, os, sys
sys.path.insert(0, {str(BENCH)!r})
from gate import Gate
work = json.loads(sys.argv[-1])
gate = Gate()
for step in range(work["steps"]):
    with open(work["order"], "a") as file:
        file.write(work["name"] + str(step) + " ")
    gate.passed(tokens=step, once=3.0, of=6)
print("that was all")
"""


def test_sides_step_in_turn_and_stand_still_in_between(tmp_path: Path) -> None:
    order = tmp_path / "order"
    sides = []
    try:
        for name in ("a", "b"):
            work = {"name": name, "steps": 6, "order": str(order), "folder": str(tmp_path / name)}
            sides.append(start(name, [sys.executable, "-c", SIDE], work))
        in_turn(sides, 3)
        assert order.read_text().split() == ["a0", "b0", "a1", "b1", "a2", "b2", "a3", "b3"]
        assert len(sides[0].seconds) == 4 - WARM
        assert all(0.5 <= s < 1.5 for s in sides[0].seconds), "a sixth of what was done once"
        assert sides[1].mean("tokens") == 2.5
        assert 0 < sides[1].peak < 1
    finally:
        for side in sides:
            side.end()


def test_a_side_that_ends_is_named_with_its_last_words(tmp_path: Path) -> None:
    work = {"name": "a", "steps": 1, "order": str(tmp_path / "order"), "folder": str(tmp_path / "a")}
    side = start("TRL", [sys.executable, "-c", SIDE], work)
    with pytest.raises(BenchError, match="TRL ended early: that was all"):
        side.go_on()
    side.end()
    with pytest.raises(BenchError, match="TRL ended early: ModuleNotFoundError: No module named 'trll'"):
        start("TRL", [sys.executable, "-c", "import trll"], work)


def test_tables_say_ratios_memory_and_growth() -> None:
    times = {peer: {"median": 2.5, "low": 2.0, "high": 3.0} for peer in ("TRL tuned", "TRL defaults")}
    compared = {
        "workload": "sft",
        "seconds": {},
        "times": times,
        "rate": {"rlpost": 2950.2},
        "unit": "tokens",
        "precision": "float32",
        "trl_tuned": "float32",
        "share": 0.58,
        "peak_gib": {"rlpost": 1.0, "TRL tuned": 2.0, "TRL defaults": 4.0},
    }
    line = {"axis": "update, prompt tokens", "values": [1, 2], "seconds": [1.0, 4.0], "peak_gib": [1.0, 1.5]}
    first, second, third = tables([compared, {"workload": "growth", "lines": [line]}])
    assert first.rows == [
        ("sft", "float32", "2,950 tokens/s", "2.50× (2.00–3.00)", "2.50× (2.00–3.00)", "float32", "58%")
    ]
    assert second.rows == [("sft", "1.00", "4.00", "2.00", "0.25×", "0.50×")]
    assert third.rows == [("update, prompt tokens", "1, 2", "1, 4", "1.00, 1.50", "2.00")]
    assert "| sft | 1.00 | 4.00 |" in second.markdown()


def test_results_replace_those_of_the_page(tmp_path: Path) -> None:
    page = tmp_path / "docs/benchmarks.md"
    page.parent.mkdir()
    page.write_text(f"# Speed\n\n{MARKS[0]}\n\nold\n{MARKS[1]}\n\nThe rest.\n")
    (tmp_path / "bench.md").write_text("| new |\n")
    publish(tmp_path, page)
    assert page.read_text() == f"# Speed\n\n{MARKS[0]}\n\n| new |\n{MARKS[1]}\n\nThe rest.\n"
    publish(tmp_path, page)
    assert page.read_text().count("new") == 1
    assert all(mark in (BENCH.parents[1] / "docs/benchmarks.md").read_text() for mark in MARKS)
