"""Evaluates two checkpoints on the same prompts and compares them: `rlpost compare`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rlpost import console
from rlpost.data.codec import make_codec
from rlpost.errors import DataError, RecipeError
from rlpost.evaluate.comparison import Comparison, compare_scores, corrected
from rlpost.evaluate.evaluator import ALL, Answers, Result
from rlpost.evaluate.params import Evaluation
from rlpost.evaluate.statistics import Estimate
from rlpost.evaluate.table import unit
from rlpost.inference.checkpoint import frozen_policy, judges_of, located, recipe_of
from rlpost.policy.model_files import stored_dtype
from rlpost.policy.params import Model
from rlpost.recipe.resolve import Resolved, resolve
from rlpost.run.names import CONFIG
from rlpost.stage_evaluation import evaluate_recipe, evaluation_rows


def compare_checkpoints(a: str, b: str, recipe: str | None) -> tuple[list[Comparison], list[str]]:
    """Compare checkpoint B with A by the evaluation of a recipe: by default that of A's run, else of B's.

    Returns:
        A comparison by mode and by part (all prompts, each source, each slice), and the two models' folders.

    Raises:
        RecipeError: no recipe is known, or it has no evaluation.
        DataError: the two models were given different rows.
    """
    resolved = resolve(recipe or str(_own_recipe(a) or _own_recipe(b) or recipe_of(a)))
    cfg = resolved.config.evaluation
    if cfg is None:
        raise RecipeError(f"{resolved.file}: it has no `evaluation`; name a recipe that has one with --recipe")
    models = [located(a), located(b)]
    for model in models:
        if not Path(model).is_dir():
            stored_dtype(model, None)  # a wrong name is refused before the other model is evaluated
    evaluated = [_evaluated(model, given, resolved, cfg, recipe) for model, given in zip(models, (a, b), strict=True)]
    results, sizes = [result for result, _ in evaluated], evaluated[0][1]
    comparisons = [
        compare_scores(mode, part, [first[p] for p in rows], [second[p] for p in rows], resolved.config.seed)
        for mode, (first, second, parts) in _scores(results, cfg, sizes).items()
        for part, rows in parts.items()
    ]
    return corrected(comparisons), models


def print_comparison(comparisons: Sequence[Comparison]) -> None:
    """Print the table, and what may be said in a line a mode."""
    rows = []
    for c in comparisons:
        d = c.difference
        interval = f"{100 * d.value:+.1f} [{100 * d.low:+.1f}, {100 * d.high:+.1f}]"
        score = [f"{100 * c.a:.1f}", f"{100 * c.b:.1f}"]
        counts = [str(c.wins), str(c.losses), str(c.ties)]
        rows.append([c.mode, c.part, str(c.prompts), *score, *counts, interval, f"{c.adjusted_p:.2g}", c.verdict])
    columns = ["mode", "prompts", "n", "A", "B", "wins", "losses", "ties", "B − A [95 %]", "p", ""]
    what = unit(Estimate(score, score, score) for c in comparisons for score in (c.a, c.b))
    console.table(f"B against A: {what}", columns, rows)
    console.say(f"p: {', '.join(dict.fromkeys(c.test for c in comparisons))}{_correction(len(comparisons))}")


def conclusion(comparison: Comparison) -> str:
    """One line: what the comparison shows, or that it is within noise."""
    d = comparison.difference
    what = f"{comparison.mode}, {comparison.part}: B − A = {100 * d.value:+.1f} points"
    interval = f" [{100 * d.low:+.1f}, {100 * d.high:+.1f}]" if d.low == d.low else ""
    counts = f"{comparison.wins} wins, {comparison.losses} losses, {comparison.ties} ties"
    return f"{what}{interval}, {counts}, p = {comparison.adjusted_p:.2g}: {comparison.verdict}"


def _correction(count: int) -> str:
    return f", by Holm's correction for {count} tests" if count > 1 else ""


def _own_recipe(path: str) -> Path | None:
    """The resolved recipe of the run that contains a path; None if no run does."""
    folder = Path(path).resolve()
    return next((p / CONFIG for p in (folder, *folder.parents) if (p / CONFIG).is_file()), None)


def _evaluated(
    model: str, given: str, resolved: Resolved, cfg: Evaluation, recipe: str | None
) -> tuple[Result, list[int]]:
    """Answers of a model, loaded as its own run says, to the recipe's prompts; and the rows of each source."""
    own = _own_recipe(given)
    settings: Model = resolve(str(own)).config.model if own else resolved.config.model
    policy = frozen_policy(model, settings)
    judges = judges_of(resolved, None if recipe or own is None else given)
    console.say(f"evaluating {given}")
    result = evaluate_recipe(resolved, cfg, policy, judges)[1]
    if len(cfg.data) == 1:
        return result, []
    rows = evaluation_rows(resolved, cfg, make_codec(policy.tokenizer), policy.max_positions, None)
    return result, rows.sizes


_Parts = tuple[list[list[float]], list[list[float]], dict[str, list[int]]]


def _scores(results: Sequence[Result], cfg: Evaluation, sizes: Sequence[int]) -> dict[str, _Parts]:
    """By mode: scores [P][n] of A and B, and the rows of each part."""
    accuracy: dict[str, _Parts] = {}
    for first, second in zip(results[0].answers, results[1].answers, strict=True):
        examples = [dict(group.example) for group in first.groups]
        if examples != [dict(group.example) for group in second.groups]:
            raise DataError("evaluation.data: A and B were given different rows; fix its seed, or name a file of rows")
        accuracy[first.mode] = (_of(first), _of(second), _parts(examples, cfg, sizes))
    return accuracy


def _of(answers: Answers) -> list[list[float]]:
    """The first reward [P][n]; answers that it left unscored count as wrong."""
    first = next(iter(answers.scores.by_name.values()))
    return [[0.0 if v is None else float(v) for v in row] for row in first]


def _parts(examples: Sequence[Mapping[str, Any]], cfg: Evaluation, sizes: Sequence[int]) -> dict[str, list[int]]:
    """Rows of all prompts, of each of several sources, and of each slice that has some."""
    parts = {ALL: list(range(len(examples)))}
    first = 0
    for name, size in zip(cfg.data, sizes, strict=False):
        parts[f"source {name}"] = list(range(first, first + size))
        first += size
    for column in cfg.slices:
        rows = [p for p, example in enumerate(examples) if example.get(column)]
        if rows:
            parts[column] = rows
    return parts
