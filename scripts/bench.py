"""rlpost beside TRL, step by step in turn: `make bench`, or python scripts/bench.py --only sft.

Both sides train the same model on the same rows with the same optimiser, each in a process of its own by its own
command path, and stand still while the other does a step. Printed are medians of the ratios of neighbouring steps.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "scripts/bench"))

from pairs import Side, in_turn, python_of_peer, ratio, start  # noqa: E402
from workload import Lengths, make_model, write_rows  # noqa: E402

WARM = 2
"""First steps that are not counted: they start threads and fill caches."""
WORK: dict[str, dict[str, Any]] = {
    "sft": {"kind": "sft", "size": "6M", "batch": 16, "lengths": Lengths(62, 98)},
    "dpo": {"kind": "dpo", "size": "6M", "batch": 16, "lengths": Lengths(62, 98)},
    "grpo": {"kind": "grpo", "size": "6M", "batch": 8, "group": 8, "most": 200, "lengths": Lengths(62, 98)},
}
TUNED: dict[str, dict[str, Any]] = {
    "sft": {"gradient_checkpointing": False, "bf16": False},
    "dpo": {"gradient_checkpointing": False, "bf16": False, "precompute_ref_log_probs": True},
    "grpo": {"gradient_checkpointing": False, "bf16": False},
}
"""What TRL is fastest with on these machines, by measure: no recomputation, float32."""


def measure(name: str, steps: int, folder: Path) -> dict[str, Any]:
    """One workload: TRL at its defaults, TRL tuned, rlpost."""
    work = dict(WORK[name])
    lengths = work.pop("lengths")
    model = make_model(folder / "model", work.pop("size"))
    rows = folder / "rows.jsonl"
    tokens = write_rows(rows, work["kind"], work["batch"] * (steps + 1), lengths)
    common = {**work, "model": str(model), "rows": str(rows), "steps": steps, "learning_rate": 1e-4}
    common |= {"precision": "float32"}
    peer = python_of_peer(ROOT)
    sides: list[Side] = []
    try:
        for label, python, script, more in (
            ("rlpost", sys.executable, "side_rlpost.py", {}),
            ("TRL tuned", peer, "side_trl.py", {"trl": TUNED[name]}),
            ("TRL defaults", peer, "side_trl.py", {"trl": {}}),
        ):
            side = start(label, python, script, {**common, **more, "folder": str(folder / label.replace(" ", "-"))}, {})
            side.step()
            sides.append(side)
        in_turn(sides, steps)
    finally:
        for side in sides:
            side.end()
    own, tuned, defaults = sides
    return {
        "workload": name,
        "tokens": tokens,
        "seconds": {s.name: statistics.median(s.seconds(WARM)) for s in sides},
        "peak_gib": {s.name: s.peak for s in sides},
        "first_loss": {s.name: s.steps[0].get("loss") for s in sides},
        "times_tuned": vars(ratio(tuned.seconds(WARM), own.seconds(WARM))),
        "times_defaults": vars(ratio(defaults.seconds(WARM), own.seconds(WARM))),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=list(WORK), default=list(WORK))
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--out", type=Path, help="write the numbers as JSON")
    options = parser.parse_args()
    found = []
    for name in options.only:
        with tempfile.TemporaryDirectory() as folder:
            found.append(measure(name, options.steps, Path(folder)))
        print(json.dumps(found[-1], indent=1), flush=True)
    if options.out:
        options.out.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
