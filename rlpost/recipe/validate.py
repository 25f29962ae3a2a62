"""What types cannot say: ranges, and rules across fields. Free of torch."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Set
from pathlib import Path

from rlpost.data.params import TokenizerKind
from rlpost.engine.params import EngineChoice
from rlpost.errors import RecipeError
from rlpost.evaluate.params import Evaluation
from rlpost.key import out_of_range
from rlpost.policy.params import Attention, Lora, Model
from rlpost.recipe.functions import check, functions_of
from rlpost.recipe.keys import join
from rlpost.recipe.places import users_file
from rlpost.recipe.rules import Earlier, Leaves, engine_problems, reward_problems, sampling_problems, source_problems
from rlpost.recipe.schema import Recipe
from rlpost.recipe.specs.common import Stage
from rlpost.recipe.walk import walk
from rlpost.rewards.params import reward_leaves
from rlpost.suggest import hint

_RUN = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,79}")
_STAGE = re.compile(r"[A-Za-z0-9_-]{1,80}")  # a dot would end the name in a key path
_RESERVED = ("base", "start", "evaluation")


def validate(recipe: Recipe, left_out: frozenset[str] = frozenset()) -> list[str]:
    """Check a typed recipe; returns warnings, one line each. Disabled stages are not looked into.

    Args:
        recipe: with every value filled in.
        left_out: stages dropped before because they are disabled and unfinished.

    Raises:
        RecipeError: the first thing that is wrong, by full key path, with a remedy.
    """
    for problem in _problems(recipe, left_out):
        raise RecipeError(problem)
    return list(_warnings(recipe))


def _problems(recipe: Recipe, left_out: frozenset[str]) -> Iterator[str]:
    if not _RUN.fullmatch(recipe.run):
        yield f"run: {recipe.run!r} is no name for a directory - use letters, digits and ._-, like run=first"
    enabled = {name: stage for name, stage in recipe.stages.items() if stage.enabled}
    yield from _stage_names(recipe)
    if not enabled and recipe.evaluation is None:
        yield "stages: nothing to do - give at least one stage or an evaluation"
    yield from out_of_range(recipe, "")
    stages = [(join("stages", name), stage) for name, stage in enabled.items()]
    others = [("model", recipe.model), ("rollouts", recipe.rollouts), ("evaluation", recipe.evaluation)]
    for top, value in [*others[:2], *stages, *others[2:]]:
        for where, inner in walk(value, top):
            yield from out_of_range(inner, where)
            if isinstance(inner, EngineChoice):
                yield from engine_problems(inner, where)
    yield from _model(recipe.model)
    for function, lookup, where in functions_of(recipe):
        users_file(function.fn, f"{where}.{lookup.key}", Path(recipe.folder or "."))
    for name, stage in enabled.items():
        yield from stage.problems(join("stages", name), Earlier(recipe, name, left_out))
    if recipe.evaluation:
        yield from _evaluation(recipe.evaluation, enabled, left_out | (recipe.stages.keys() - enabled.keys()))
    for function, lookup, where in functions_of(recipe):
        check(function, lookup, where)


def _stage_names(recipe: Recipe) -> Iterator[str]:
    for name in recipe.stages:
        where = join("stages", name)
        if name in _RESERVED:
            yield f"{where}: {name!r} means something else in `start` and `reference` - choose another name"
        elif not _STAGE.fullmatch(name):
            yield f"{where}: {name!r} is no name for a stage - use letters, digits, '_' and '-'"


def _model(model: Model) -> Iterator[str]:
    if bool(model.path) == bool(model.config):
        which = "not both" if model.path else "neither is given"
        yield f"model: give exactly one of model.path and model.config ({which})"
    if model.path and model.tokenizer:
        yield "model.tokenizer: is for models made from scratch - model.path brings its own; remove it"
    if model.config and "model_type" not in model.config:
        near = hint("model_type", map(str, model.config))
        yield f"model.config.model_type: missing - the name of an architecture, such as llama{near}"
    if model.config and model.tokenizer is None:
        yield "model.tokenizer: missing - a model from scratch needs one: {kind: characters, alphabet: ...}"
    if model.tokenizer:
        yield from source_problems(model.tokenizer.data, "model.tokenizer.data", None)
        if model.tokenizer.kind == TokenizerKind.characters and not model.tokenizer.alphabet:
            yield "model.tokenizer.alphabet: missing - give the characters it knows, such as '0123456789+='"
        if model.tokenizer.kind == TokenizerKind.bpe and not model.tokenizer.data:
            yield "model.tokenizer.data: missing - a bpe tokenizer is trained on the text of some rows"


def _evaluation(evaluation: Evaluation, stages: Mapping[str, Stage], disabled: Set[str]) -> Iterator[str]:
    where = "evaluation"
    if not evaluation.data:
        yield f"{where}.data: missing - name at least one source, like {{test: {{path: rows.jsonl}}}}"
    yield from source_problems(evaluation.data, f"{where}.data", None)
    yield from reward_problems(evaluation.rewards, where, None)
    yield from sampling_problems(evaluation.sampling, f"{where}.sampling")
    for i, k in enumerate(evaluation.pass_at):
        if k > evaluation.samples:
            yield (
                f"{where}.pass_at[{i}]: pass@{k} needs {k} samples a prompt, not {evaluation.samples} - "
                f"give evaluation.samples={k} or more"
            )
    if evaluation.best_of and evaluation.samples < 2:
        yield f"{where}.best_of: needs at least 2 samples a prompt - give evaluation.samples=8, say"
    if evaluation.judge is not None and evaluation.samples < 2:
        yield f"{where}.judge: chooses among at least 2 samples a prompt - give evaluation.samples=8, say"
    if not evaluation.greedy and evaluation.samples == 0:
        yield f"{where}.samples: 0 without greedy leaves nothing to evaluate - give samples or greedy=true"
    judge = evaluation.judge or ""
    if judge in disabled:
        yield f"{where}.judge: stage {judge!r} is disabled - enable it, or name another"
    elif judge in stages and stages[judge].leaves not in (Leaves.reward_model, Leaves.reverse):
        yield f"{where}.judge: {judge!r} is of kind {stages[judge].kind} - name a reward_model stage or a reverse one"
    for leaf, place in reward_leaves(evaluation.rewards, where):
        if leaf.model in stages and evaluation.every_stage:
            yield (
                f"{place}.model: the base model is evaluated before stage {leaf.model!r} has run - "
                "name a checkpoint, or set evaluation.every_stage=false"
            )


def _warnings(recipe: Recipe) -> Iterator[str]:
    for name, stage in recipe.stages.items():
        if stage.enabled:
            yield from stage.warnings(join("stages", name), recipe.model)
    if isinstance(recipe.model.lora, Lora) and recipe.model.lora.dropout > 0:
        flat = "attention=flat cannot share prompts and " if recipe.model.attention == Attention.flat else ""
        yield (
            f"model.lora.dropout: with dropout above 0 {flat}every row is computed with its own copy of the "
            "prompt (slower) - 0 shares prompts"
        )
