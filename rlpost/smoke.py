"""A smoke run: a whole recipe cut to a few steps, to see that all of it works before hours are spent on it.

The cut is a list of overrides, so that a smoke run is a run like any other: shown, saved, resumed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from rlpost.recipe.overrides import written
from rlpost.recipe.resolve import Resolved, resolve

ROWS_A_STEP = 256
"""Rows that are read of each source for a step of training."""
PROMPTS_A_STEP = 8
"""Prompts that are sampled for a step in stages that make rows."""
EVALUATED_A_STEP = 2
"""Prompts of each source of the evaluation for a step."""
TIE_BREAK = {"fn": "length", "name": "tie_break", "weight": 1e-3, "args": {"target": 1, "width": 1000}}
"""A reward too small to outvote another: with it, completions that are all equally wrong make pairs too."""


def resolve_smoke(recipe: str, overrides: Sequence[str], steps: int) -> Resolved:
    """Resolve a recipe with every stage cut to `steps` steps, as a run of its own name unless `run` is given.

    Raises:
        RecipeError: as `resolve`; the recipe is wrong without the cut too.
    """
    whole = resolve(recipe, overrides).tree
    cuts = list(_cuts(whole, steps))
    ending = f"-{steps}-steps"
    if not any(override.startswith("run=") for override in overrides) and not whole["run"].endswith(ending):
        cuts.append(("run", whole["run"] + ending))
    return resolve(recipe, [*overrides, *(text for key, value in cuts if (text := written(key, value)))])


def _cuts(recipe: dict[str, Any], steps: int) -> Iterator[tuple[str, Any]]:
    """(key, value) of whatever makes the recipe shorter."""
    for name, stage in recipe["stages"].items():
        if stage["enabled"]:
            yield from _changed(f"stages.{name}", stage, _of_stage(stage, steps))
    if evaluation := recipe.get("evaluation"):
        needed = max([2 if evaluation["best_of"] or evaluation["judge"] else 1, *evaluation["pass_at"]])
        rows = _first_rows(evaluation["data"], EVALUATED_A_STEP * steps)
        cut = {
            "data": rows,
            "samples": _least(evaluation["samples"], needed),
            "every": _least(evaluation["every"], steps),
        }
        yield from _changed("evaluation", evaluation, cut)


def _changed(where: str, section: dict[str, Any], cut: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    yield from ((f"{where}.{key}", value) for key, value in cut.items() if key in section and value != section[key])


def _of_stage(stage: dict[str, Any], steps: int) -> dict[str, Any]:
    trains, samples = "steps" in stage, "prompts" in stage
    rows = PROMPTS_A_STEP if not trains and not samples else ROWS_A_STEP
    cut: dict[str, Any] = {"data": _first_rows(stage["data"], rows * steps)}
    if trains:
        cut |= {"steps": _least(stage["steps"], steps), "epochs": None, "log_every": 1}
    elif samples:
        cut["prompts"] = _least(stage["prompts"], PROMPTS_A_STEP * steps)
    # What happens every so many steps happens once at least, and a critic's warm-up leaves a step for the policy.
    if stage.get("table_every"):
        cut["table_every"] = _least(stage["table_every"], steps)
    if stage.get("eval_every"):
        cut["eval_every"] = _least(stage["eval_every"], steps)
    if stage.get("eval_data"):
        cut["eval_data"] = _first_rows(stage["eval_data"], EVALUATED_A_STEP * steps)
    if isinstance(expert := stage.get("expert"), dict) and expert.get("data"):
        cut["expert"] = {**expert, "data": _first_rows(expert["data"], rows * steps)}
    for section, key, most in (("refresh", "every", steps), ("critic", "warmup_steps", steps - 1)):
        given = stage.get(section)
        if isinstance(given, dict) and key in given:
            cut[section] = {**given, key: _least(given[key], most)}
    # An untrained model hardly ever earns a reward, or reaches a goal: it gives rows all the same.
    if stage["kind"] == "pairs":
        cut |= {"min_gap": 0, "rewards": [*stage["rewards"], TIE_BREAK]}
    if stage["kind"] == "guided":
        cut["reached_only"] = False
    return cut


def _first_rows(sources: dict[str, Any], most: int) -> dict[str, Any]:
    """The sources, each with no more than so many rows; those of an earlier stage as they are."""
    return {
        name: source if source.get("stage") else {**source, "limit": _least(source["limit"], most)}
        for name, source in sources.items()
    }


def _least(value: Any, most: int) -> Any:
    """At most so many; what is no number, in a stage of a user's own kind, stays what it is."""
    return most if value is None else min(value, most) if isinstance(value, int) else value
