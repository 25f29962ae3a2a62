"""Writes the report of runs: one HTML file that needs nothing else."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from rlpost.api.run import Score
from rlpost.errors import RecipeError
from rlpost.report.chart import Points, line_chart
from rlpost.report.collect import RunView, StageView, collect
from rlpost.run.files import write_atomic

TEMPLATE = "report.html.jinja"
MOST_RUNS = 6
"""As many as the colours and dashes tell apart."""
_FIRST = (
    *("reward", "eval/greedy/accuracy", "eval/greedy/reward", "loss", "eval/loss", "nll", "preference_loss"),
    *("accuracy", "eval/accuracy", "margin", "kl", "entropy", "length"),
)


def write_report(runs: Sequence[str], out: Path | None) -> Path:
    """Write the report of runs, by default to `report.html` in the first; returns the file.

    Raises:
        RecipeError: too many runs. ModelError: one is no run. DiskError: it is damaged, or nothing can be written.
    """
    if len(runs) > MOST_RUNS:
        raise RecipeError(f"{len(runs)} runs - a report shows at most {MOST_RUNS}, so that lines can be told apart")
    file = out or Path(runs[0]) / "report.html"
    text = render([collect(run) for run in runs])
    write_atomic(file, text.encode("utf-8", errors="replace"))
    return file


def render(runs: Sequence[RunView]) -> str:
    """The page; all that comes from runs is escaped."""
    source = Path(__file__).with_name(TEMPLATE).read_text("utf-8")
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"percent": percent, "duration": duration, "number": number}
    return environment.from_string(source).render(runs=runs, curves=_curves(runs), scores=scores_side_by_side(runs))


def _curves(runs: Sequence[RunView]) -> list[dict[str, Any]]:
    """By stage: its charts, a line a run."""
    stages = dict.fromkeys(stage.name for run in runs for stage in run.stages)
    found = []
    for name in stages:
        own: list[StageView | None] = [next((s for s in run.stages if s.name == name), None) for run in runs]
        keys = dict.fromkeys(k for s in own if s for row in s.metrics for k in row if k != "step")
        charts = []
        for key in sorted(keys, key=lambda k: _FIRST.index(k) if k in _FIRST else len(_FIRST)):
            series = {
                str(i): [(r["step"], r[key]) for r in s.metrics if key in r and "step" in r] if s else []
                for i, s in enumerate(own)
            }
            names = [run.name if len(runs) > 1 else "" for run in runs]
            # The chart's only text, the title, is escaped there.
            note = not_finite(list(zip(names, series.values(), strict=True)))
            charts.append((key, Markup(line_chart(series, key)), note))
        if charts:
            found.append({"name": name, "kind": next(s.kind for s in own if s), "charts": charts})
    return found


def not_finite(lines: Sequence[tuple[str, Points]]) -> str:
    """What is said of values that a chart leaves out: "not finite in b: 2 values, from step 21"; empty without any."""
    found = [(name, [x for x, y in points if not math.isfinite(y)]) for name, points in lines]
    said = [
        f"{f'in {name}: ' if name else ''}{len(steps)} value{'s' * (len(steps) > 1)}, from step {min(steps):.0f}"
        for name, steps in found
        if steps
    ]
    return f"not finite: {'; '.join(said)}" if said else ""


def scores_side_by_side(runs: Sequence[RunView]) -> list[tuple[int, RunView, Score]]:
    """(number of the run, run, score): the same stage, mode and prompts of all runs one below the other."""
    rows = [(i, run, score) for i, run in enumerate(runs) for score in run.scores]
    order = {key: i for i, key in enumerate(dict.fromkeys((s.stage, s.mode, s.part) for _, _, s in rows))}
    stages = {stage: i for i, stage in enumerate(dict.fromkeys(s.stage for _, _, s in rows))}
    return sorted(rows, key=lambda row: (stages[row[2].stage], order[row[2].stage, row[2].mode, row[2].part], row[0]))


def percent(score: Score) -> str:
    """ "93.4 [92.2, 94.4]"."""
    if math.isnan(score.low):
        return f"{100 * score.value:.1f}"
    return f"{100 * score.value:.1f} [{100 * score.low:.1f}, {100 * score.high:.1f}]"


def duration(seconds: float) -> str:
    """ "1 h 02 min", "3 min 20 s", "4.2 s"."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def number(value: float | None) -> str:
    """A reward, short; a dash where none was given."""
    return "–" if value is None else f"{value:.3g}"
