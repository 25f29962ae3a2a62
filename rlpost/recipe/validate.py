"""Checks that types cannot express: rules between keys, names, and functions. Free of torch."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from rlpost.engine.params import SERVER, VLLM, EngineChoice, Sampling
from rlpost.errors import RecipeError
from rlpost.evaluate.params import Evaluation
from rlpost.policy.params import Attention, Lora
from rlpost.recipe.functions import functions_of
from rlpost.recipe.rules import Earlier, Leaves, reward_problems, source_problems
from rlpost.recipe.schema import Recipe
from rlpost.recipe.specs.common import Rollouts
from rlpost.rewards.of_environment import environment_problems
from rlpost.rewards.params import reward_leaves
from rlpost.section import join, walk
from rlpost.train.params import OptimizerName, Strategy
from rlpost.usercode.binding import check
from rlpost.usercode.places import users_file

_RUN = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,79}")
_STAGE = re.compile(r"[A-Za-z0-9_-]{1,80}")  # a dot would end the name in a key path
_RESERVED = ("base", "start", "evaluation")
_TRACKERS = "trackers"
"""The run's folder for them."""


def validate(recipe: Recipe) -> list[str]:
    """Check a built recipe, except disabled stages; returns warnings, one line each.

    Raises:
        RecipeError: the first thing that is wrong, by full key path, with a remedy.
    """
    for problem in _problems(recipe):
        raise RecipeError(problem)
    return list(_warnings(recipe))


def _problems(recipe: Recipe) -> Iterator[str]:
    if not _RUN.fullmatch(recipe.run):
        yield f"run: {recipe.run!r} is no name for a directory - use letters, digits and ._-, like run=first"
    yield from _stage_names(recipe)
    if not recipe.enabled() and recipe.evaluation is None:
        yield "stages: nothing to do - give at least one stage or an evaluation"
    for top, section in recipe.sections():
        for where, inner in walk(section, top):
            yield from inner.problems(where)
    for function, lookup, where in functions_of(recipe):
        users_file(function.fn, f"{where}.{lookup.key}", Path(recipe.folder or "."))
    yield from _vllm(recipe)
    yield from _shards(recipe)
    yield from _ahead(recipe)
    yield from _optimizers(recipe)
    if recipe.model.tokenizer:
        yield from source_problems(recipe.model.tokenizer.data, "model.tokenizer.data", None)
    for name, stage in recipe.enabled().items():
        yield from stage.rules(join("stages", name), Earlier(recipe, name))
    if recipe.evaluation:
        yield from _evaluation(recipe.evaluation, recipe)
    for function, lookup, where in functions_of(recipe):
        check(function, lookup, where)


def _vllm(recipe: Recipe) -> Iterator[str]:
    """What vLLM would sample otherwise, and what it cannot load as an adapter."""
    lora = recipe.model.lora
    beyond = lora is not None and (lora.use_dora or lora.modules_to_save or recipe.model.quantization)
    for top, section in recipe.sections():
        for where, inner in walk(section, top):
            if (
                isinstance(inner, EngineChoice)
                and inner.engine in (VLLM, SERVER)
                and beyond
                and not inner.merge_adapter
            ):
                yield (
                    f"{where}.merge_adapter: vLLM's adapters are low ranks alone (model.lora), on weights that are "
                    "not quantised - set it to true"
                )
            sampling, own = getattr(inner, "sampling", None), getattr(inner, "rollouts", None)
            if isinstance(sampling, Sampling) and (own or recipe.rollouts).engine in (VLLM, SERVER):
                yield from sampling.unlike_vllm(f"{where}.sampling")


def _shards(recipe: Recipe) -> Iterator[str]:
    """What needs whole weights, of which a process has a share only: four bits, and a user's engine, which reads it."""
    if recipe.parallel.strategy is Strategy.ddp:
        return
    if recipe.model.quantization:
        yield "model.quantization: weights in four bits cannot be kept in shards - set parallel.strategy=ddp"
    for top, section in recipe.sections():
        for where, inner in walk(section, top):
            if isinstance(inner, EngineChoice) and inner.is_users:
                yield (
                    f"{where}.engine: {inner.engine} would read weights of which every process has a share - "
                    "set parallel.strategy=ddp, or use an engine of rlpost"
                )


def _ahead(recipe: Recipe) -> Iterator[str]:
    """Sampling ahead of training where nothing trains; at the top of the recipe it is for the stages that do."""
    for top, section in recipe.sections():
        for where, inner in walk(section, top):
            if isinstance(inner, EngineChoice) and inner.staleness and not isinstance(section, EngineChoice | Rollouts):
                yield f"{where}.staleness: nothing is trained on these samples, so none are drawn ahead - remove it"


def _optimizers(recipe: Recipe) -> Iterator[str]:
    """An optimiser of whole matrices, of which a process has a share only; adapters stay whole."""
    if recipe.parallel.strategy is Strategy.ddp or recipe.model.lora is not None:
        return
    for name, stage in recipe.enabled().items():
        chosen = getattr(stage, "optimizer", OptimizerName.adamw)
        if chosen is not OptimizerName.adamw:
            yield (
                f"{join('stages', name)}.optimizer: {chosen} steps whole matrices, of which every process has a share "
                "- use adamw, train an adapter (model.lora), or set parallel.strategy=ddp"
            )


def _stage_names(recipe: Recipe) -> Iterator[str]:
    for name in recipe.stages:
        where = join("stages", name)
        if name in _RESERVED:
            yield f"{where}: {name!r} means something else in `start` and `reference` - choose another name"
        elif name == _TRACKERS:
            yield f"{where}: a run keeps its trackers in a folder of that name - choose another name"
        elif not _STAGE.fullmatch(name):
            yield f"{where}: {name!r} is no name for a stage - use letters, digits, '_' and '-'"


def _evaluation(evaluation: Evaluation, recipe: Recipe) -> Iterator[str]:
    where, stages = "evaluation", recipe.stages
    yield from source_problems(evaluation.data, f"{where}.data", None)
    yield from reward_problems(evaluation.rewards, where, None)
    yield from environment_problems(evaluation.rewards, evaluation.environment, where)
    trained = [stage for stage in recipe.enabled().values() if hasattr(stage, "eval_every")]
    longest = max((stage.steps or evaluation.every for stage in trained), default=0)
    if evaluation.every > longest:
        most = f"no stage has more than {longest} steps, so give at most that"
        what = most if trained else "no stage trains, so remove it"
        yield f"{where}.every: {evaluation.every} - {what}"
    judge = stages.get(evaluation.judge or "")
    if judge is not None and not judge.enabled:
        yield f"{where}.judge: stage {evaluation.judge!r} is disabled - enable it, or name another"
    elif judge is not None and judge.leaves not in (Leaves.reward_model, Leaves.reverse):
        yield (
            f"{where}.judge: {evaluation.judge!r} is of kind {judge.kind} - name a reward_model stage or a reverse one"
        )
    for leaf, place in reward_leaves(evaluation.rewards, where):
        if leaf.model in recipe.enabled() and evaluation.every_stage:
            yield (
                f"{place}.model: the base model is evaluated before stage {leaf.model!r} has run - "
                "name a checkpoint, or set evaluation.every_stage=false"
            )
        elif leaf.model in recipe.enabled() and (early := _evaluated_before(str(leaf.model), evaluation, recipe)):
            yield (
                f"{place}.model: {early!r} is evaluated while it trains, before stage {leaf.model!r} has run - "
                f"name a checkpoint, or set stages.{early}.eval_every=0"
            )


def _evaluated_before(model: str, evaluation: Evaluation, recipe: Recipe) -> str | None:
    """The first stage before `model` whose policy is evaluated while it trains."""
    order = recipe.enabled()
    for name in list(order)[: list(order).index(model)]:
        every = getattr(order[name], "eval_every", 0)
        if (evaluation.every if every is None else every) and order[name].leaves is Leaves.policy:
            return name
    return None


def _warnings(recipe: Recipe) -> Iterator[str]:
    for name, stage in recipe.enabled().items():
        yield from stage.warnings(join("stages", name), recipe.model)
    if isinstance(recipe.model.lora, Lora) and recipe.model.lora.dropout > 0:
        flat = "attention=flat cannot share prompts and " if recipe.model.attention == Attention.flat else ""
        yield (
            f"model.lora.dropout: with dropout above 0 {flat}every row is computed with its own copy of the "
            "prompt (slower) - 0 shares prompts"
        )
