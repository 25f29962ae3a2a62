"""What types cannot say: ranges, and rules across fields. Free of torch."""

from __future__ import annotations

import re
from collections.abc import Iterator

from rlpost.errors import RecipeError
from rlpost.recipe.keys import join
from rlpost.recipe.ranges import out_of_range
from rlpost.recipe.schema import (
    Attention,
    Dpo,
    Evaluation,
    Grpo,
    Kind,
    KlEstimator,
    KlPlacement,
    Lora,
    Model,
    Pairs,
    Recipe,
    Reward,
    Sampling,
    Source,
    Stage,
    TokenizerKind,
    Training,
)
from rlpost.recipe.suggest import hint, hint_or_list
from rlpost.recipe.walk import walk

_RUN = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,79}")
_STAGE = re.compile(r"[A-Za-z0-9_-]{1,80}")  # a dot would end the name in a key path
_RESERVED = ("base", "start", "evaluation")
_GROUP_BASELINES = ("group_mean", "group_normalised", "leave_one_out")


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
    for top, value in [("model", recipe.model), *stages, ("evaluation", recipe.evaluation)]:
        for where, inner in walk(value, top):
            yield from out_of_range(inner, where)
    yield from _model(recipe.model)
    for name, stage in enabled.items():
        yield from _stage(stage, join("stages", name), _Earlier(recipe, name, left_out))
    if recipe.evaluation:
        yield from _evaluation(recipe.evaluation)


def _stage_names(recipe: Recipe) -> Iterator[str]:
    for name in recipe.stages:
        where = join("stages", name)
        if name in _RESERVED:
            yield f"{where}: {name!r} means something else in `start` and `reference` - choose another name"
        elif not _STAGE.fullmatch(name):
            yield f"{where}: {name!r} is no name for a stage - use letters, digits, '_' and '-'"


class _Earlier:
    """The stages before one stage, and why another name is none of them."""

    def __init__(self, recipe: Recipe, name: str, left_out: frozenset[str]) -> None:
        before = list(recipe.stages)[: list(recipe.stages).index(name)]
        self.own = name
        self.stages: dict[str, Stage] = {n: recipe.stages[n] for n in before if recipe.stages[n].enabled}
        self.disabled = left_out | {n for n, stage in recipe.stages.items() if not stage.enabled}
        self.all = set(recipe.stages)

    def problem(self, name: str, where: str, also: tuple[str, ...] = ()) -> str | None:
        """Why `name`, given at `where`, is no earlier stage; None when it is one (or one of `also`)."""
        if name in self.stages or name in also:
            return None
        if name in self.disabled:
            return f"{where}: stage {name!r} is disabled - enable it, or name another"
        if name == self.own:
            return f"{where}: {name!r} is this stage itself - name an earlier one"
        if name in self.all:
            return f"{where}: stage {name!r} comes later - name an earlier one"
        return f"{where}: no stage {name!r}{hint_or_list(name, [*also, *self.stages], 'there are')}"

    def no_model(self, name: str, where: str, also: tuple[str, ...]) -> str | None:
        """Why `name`, given at `where`, is no earlier stage with a model; None when it is one (or one of `also`)."""
        problem = self.problem(name, where, also)
        if problem is None and name in self.stages and self.stages[name].kind == Kind.pairs:
            return f"{where}: {name!r} is of kind pairs, which leaves rows and no model - name a stage that trains"
        return problem


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
        yield from _sources(model.tokenizer.data, "model.tokenizer.data", None)
        if model.tokenizer.kind == TokenizerKind.characters and not model.tokenizer.alphabet:
            yield "model.tokenizer.alphabet: missing - give the characters it knows, such as '0123456789+='"
        if model.tokenizer.kind == TokenizerKind.bpe and not model.tokenizer.data:
            yield "model.tokenizer.data: missing - a bpe tokenizer is trained on the text of some rows"


def _stage(stage: Stage, where: str, earlier: _Earlier) -> Iterator[str]:
    if stage.start is not None and (problem := earlier.no_model(stage.start, f"{where}.start", ("base",))):
        yield problem
    assert isinstance(stage, Training | Pairs)
    if not stage.data:
        yield f"{where}.data: missing - name at least one source, like {{train: {{path: rows.jsonl}}}}"
    yield from _sources(stage.data, f"{where}.data", earlier)
    if isinstance(stage, Dpo | Grpo):
        problem = earlier.no_model(stage.reference, f"{where}.reference", ("start", "base"))
        if problem:
            yield problem
    if isinstance(stage, Training):
        yield from _training(stage, where)
    if isinstance(stage, Grpo):
        yield from _grpo(stage, where)
    if isinstance(stage, Grpo | Pairs):
        yield from _rewards(stage.rewards, f"{where}.rewards")
        yield from _sampling(stage.sampling, f"{where}.sampling")


def _training(stage: Training, where: str) -> Iterator[str]:
    if stage.kind == Kind.grpo:
        if stage.epochs is not None:
            yield f"{where}.epochs: grpo counts steps - give `{where}.steps` instead"
        if stage.steps is None:
            yield f"{where}.steps: missing - how many rollout steps to take"
    elif (stage.steps is None) == (stage.epochs is None):
        given = "neither is given" if stage.steps is None else "not both"
        yield f"{where}: give exactly one of {where}.steps and {where}.epochs ({given})"
    if stage.warmup > 1 and stage.warmup != int(stage.warmup):
        yield f"{where}.warmup: {stage.warmup} - a share below 1, or a whole number of updates"


def _grpo(stage: Grpo, where: str) -> Iterator[str]:
    if stage.kl.placement == KlPlacement.loss and stage.kl.estimator == KlEstimator.k1:
        yield (
            f"{where}.kl.estimator: k1 in the loss has an expected gradient of zero: it adds noise only - "
            "use placement: reward, or k2 or k3"
        )
    for name, neutral in (("top_k", 0), ("top_p", 1.0), ("min_p", 0.0)):
        if getattr(stage.sampling, name) != neutral:
            yield (
                f"{where}.sampling.{name}: grpo samples from the whole distribution: a filtered sampler and "
                f"the trainer would differ - use {neutral:g} (pairs and evaluation may)"
            )
    if stage.updates > stage.prompts:
        yield f"{where}.updates: {stage.updates} for {stage.prompts} prompts - at most one update a prompt"
    if stage.sampling.max_new_tokens >= stage.max_length:
        yield (
            f"{where}.max_length: {stage.max_length} leaves no room for a prompt beside "
            f"sampling.max_new_tokens={stage.sampling.max_new_tokens} - raise it, or lower that"
        )


def _sources(data: dict[str, Source], where: str, earlier: _Earlier | None) -> Iterator[str]:
    for name, source in data.items():
        path = f"{where}.{name}"
        given = [key for key in ("path", "stage", "task") if getattr(source, key)]
        if len(given) != 1:
            yield f"{path}: give exactly one of path, stage, task ({' and '.join(given) or 'none'} given)"
        if source.fold and source.fold.hold_out >= source.fold.of:
            yield (
                f"{path}.fold.hold_out: {source.fold.hold_out} of {source.fold.of} parts - counted from 0, "
                f"it is at most {source.fold.of - 1}"
            )
        if source.stage and earlier is None:
            yield f"{path}.stage: only stages read other stages' rows - give path or task"
        elif source.stage and earlier:
            problem = earlier.problem(source.stage, f"{path}.stage")
            if problem:
                yield problem
            elif earlier.stages[source.stage].kind != Kind.pairs:
                kind = earlier.stages[source.stage].kind.value
                yield f"{path}.stage: {source.stage!r} is of kind {kind}, without rows - name a pairs stage"


def _rewards(rewards: list[Reward], where: str) -> Iterator[str]:
    if not rewards:
        yield f"{where}: missing - give at least one, like [{{fn: math_answer}}]"
    names = [reward.name or re.split(r"[.:]", reward.fn)[-1] for reward in rewards]
    for i, name in enumerate(names):
        if name in names[:i]:
            yield f"{where}[{i}].name: {name!r} is logged already - give this one a name of its own"


def _sampling(sampling: Sampling, where: str) -> Iterator[str]:
    if "" in sampling.stop:
        yield f"{where}.stop: an empty string stops every completion at once - remove it"


def _evaluation(evaluation: Evaluation) -> Iterator[str]:
    where = "evaluation"
    if not evaluation.data:
        yield f"{where}.data: missing - name at least one source, like {{test: {{path: rows.jsonl}}}}"
    yield from _sources(evaluation.data, f"{where}.data", None)
    yield from _rewards(evaluation.rewards, f"{where}.rewards")
    yield from _sampling(evaluation.sampling, f"{where}.sampling")
    for i, k in enumerate(evaluation.pass_at):
        if k > evaluation.samples:
            yield (
                f"{where}.pass_at[{i}]: pass@{k} needs {k} samples a prompt, not {evaluation.samples} - "
                f"give evaluation.samples={k} or more"
            )
    if evaluation.best_of and evaluation.samples < 2:
        yield f"{where}.best_of: needs at least 2 samples a prompt - give evaluation.samples=8, say"
    if not evaluation.greedy and evaluation.samples == 0:
        yield f"{where}.samples: 0 without greedy leaves nothing to evaluate - give samples or greedy=true"


def _warnings(recipe: Recipe) -> Iterator[str]:
    for name, stage in recipe.stages.items():
        where = join("stages", name)
        if not stage.enabled or not isinstance(stage, Grpo):
            continue
        if stage.group_size == 1 and stage.advantage.fn in _GROUP_BASELINES:
            yield (
                f"{where}.group_size: a group of one has no baseline: {stage.advantage.fn} is 0 everywhere "
                "and nothing is learned - use at least 2"
            )
        if stage.kl.placement == KlPlacement.reward and stage.kl.estimator != KlEstimator.k1 and stage.kl.beta > 0:
            yield f"{where}.kl.estimator: {stage.kl.estimator.value} in the reward is biased - k1 is exact"
    if isinstance(recipe.model.lora, Lora) and recipe.model.lora.dropout > 0:
        flat = "attention=flat cannot share prompts and " if recipe.model.attention == Attention.flat else ""
        yield (
            f"model.lora.dropout: with dropout above 0 {flat}every row is computed with its own copy of the "
            "prompt (slower) - 0 shares prompts"
        )
