"""The table of docs/guides.md: what metrics of real runs look like from beginning to end.

rlpost train methods/start && for m in dpo … ; do rlpost train methods/$m; done    # fifteen minutes on two cores
python scripts/guide_numbers.py runs    # writes what stands below "## What the numbers were"
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path

import rlpost

PAGE = Path(__file__).parents[1] / "docs" / "guides.md"
HEADING = "## What the numbers were\n"
SHOWN: dict[tuple[str, str], tuple[str, ...]] = {
    ("demo", "sft"): ("nll", "grad_norm"),
    ("methods/dpo", "dpo"): ("preference_loss", "accuracy", "margin", "chosen_logratio", "rejected_logratio"),
    ("methods/ipo", "dpo"): ("accuracy", "margin", "chosen_logratio", "rejected_logratio"),
    ("methods/simpo", "dpo"): ("accuracy", "margin", "chosen_logratio", "rejected_logratio"),
    ("methods/orpo", "dpo"): ("accuracy", "margin", "chosen_logratio", "rejected_logratio"),
    ("methods/kto", "kto"): ("desirable_logratio", "undesirable_logratio", "z"),
    ("methods/reward_model", "judge"): ("accuracy", "margin"),
    ("methods/reward_model", "rl"): ("reward", "zero_signal"),
    ("methods/process_reward_model", "judge"): ("loss", "accuracy"),
    ("methods/grpo", "rl"): ("reward", "zero_signal", "entropy", "kl", "loss", "grad_norm"),
    ("methods/dapo", "rl"): ("reward", "zero_signal", "entropy"),
    ("methods/gspo", "rl"): ("reward", "zero_signal", "entropy"),
    ("methods/ppo", "rl"): ("reward", "explained_variance", "value_loss", "sequence_kl"),
    ("methods/online_dpo", "rl"): ("reward", "accuracy", "margin"),
    ("methods/distillation", "sft"): ("loss",),
}
"""(recipe, stage) -> metrics."""
INTRODUCTION = """
<!-- Written by scripts/guide_numbers.py. -->

Real runs of the tiny recipes (two-digit sums after a teacher who forgets the carry; seed 0): the first step, then means
over a twentieth of the steps, about a tenth, a half and the end of them. Sizes are this task's; what carries over is
which numbers move, which way, and when.

"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runs", type=Path, help="folder of runs")
    by_hand = PAGE.read_text("utf-8").partition(HEADING)[0]
    PAGE.write_text(
        by_hand.rstrip() + "\n\n" + HEADING + INTRODUCTION + "\n".join(table(parser.parse_args().runs)) + "\n", "utf-8"
    )


def table(runs: Path) -> Iterator[str]:
    yield "| recipe, stage | metric | first | a tenth | a half | last |"
    yield "|---|---|---|---|---|---|"
    for (recipe, stage), names in SHOWN.items():
        rows = rlpost.Run(runs / recipe.rpartition("/")[2]).metrics(stage)
        for i, name in enumerate(names):
            values = [row[name] for row in rows if name in row]
            cells = [values[0], *(around(values, place) for place in (0.1, 0.5, 1.0))]
            first = f"`{recipe}`, {stage}" if i == 0 else ""
            yield f"| {first} | `{name}` | {' | '.join(map(shown, cells))} |"


def around(values: Sequence[float], place: float) -> float:
    """Mean over a twentieth of the values about a place between 0 and 1."""
    width = max(1, len(values) // 20)
    start = min(max(round(place * len(values)) - width // 2, 0), len(values) - width)
    return sum(values[start : start + width]) / width


def shown(value: float) -> str:
    """Two digits after the point, or three for small numbers."""
    text = f"{value:.2f}" if abs(value) >= 0.1 else f"{value:.3f}"
    return text.replace("-", "−") if float(text) else "0"


if __name__ == "__main__":
    main()
