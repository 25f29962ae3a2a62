"""Rules across the fields of one stage, and between a stage and those before it. Free of torch."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any

from rlpost.data.params import Direction, Source
from rlpost.engine.params import LOCAL, EngineChoice, Sampling
from rlpost.goals.params import Goals, ValueTarget
from rlpost.recipe.functions import reward_leaves
from rlpost.recipe.parts import Kind, Stage, Training
from rlpost.recipe.row_stages import Guesses, Guided
from rlpost.recipe.schema import Dpo, Grouped, OnlineDpo, Ppo, Recipe, Rollouts, Sft, Trpo, Value, reads_backwards
from rlpost.rewards.params import Reward
from rlpost.stages.params import MAKES_JUDGES, MAKES_ROWS, CorrectionMode, KlEstimator, KlPlacement, Weight
from rlpost.suggest import hint_or_list

GROUP_BASELINES = (
    *("group_mean", "group_normalised", "leave_one_out", "length_weighted_baseline", "max_likelihood"),
    *("nonzero_rescaled", "pass_at_k", "per_reward_normalised", "process_normalised"),
)
"""Advantages that compare the completions of a group with each other."""
_BY_STEP = ("process", "process_normalised", "monte_carlo_values")
_DISTILS = ("forward_kl", "reverse_kl", "jensen_shannon")
_WITHOUT_REFERENCE = ("simpo", "cpo", "orpo")
"""Losses of pairs that look at the policy alone."""
_OF_LOG_RATIOS = ("f_divergence", "length_desensitised")
"""Modifiers that change log-ratios to the reference, and nothing else."""
_JUDGED = {
    "reward_model": "a reward_model stage",
    "process_reward_model": "a process_reward_model stage",
    "reverse_likelihood": "an sft stage with direction: reverse",
}
"""Reward functions that ask a model, and what leaves one."""
NODES = {"sum": (), "product": (), "min": (), "gate": ("above",), "lexicographic": ("scale",), "shaping": ("gamma",)}
"""Nodes of a tree of rewards, and what `args` each takes."""


class Earlier:
    """The stages before one stage, and why another name is none of them."""

    def __init__(self, recipe: Recipe, name: str, left_out: frozenset[str]) -> None:
        before = list(recipe.stages)[: list(recipe.stages).index(name)]
        self.own = name
        self.rollouts = recipe.rollouts
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
        kind = self.stages[name].kind if problem is None and name in self.stages else None
        if kind in MAKES_ROWS:
            return (
                f"{where}: {name!r} is of kind {kind.value}, which leaves rows and no model - name a stage that trains"
            )
        if kind in MAKES_JUDGES:
            return f"{where}: {name!r} is of kind {kind.value}, which leaves no policy - name a stage that trains one"
        if problem is None and name in self.stages and reads_backwards(self.stages[name]):
            return f"{where}: {name!r} reads backwards, and leaves no policy - name a stage that trains one"
        return problem

    def no_judge(self, name: str, where: str, kinds: tuple[str, ...]) -> str | None:
        """Why `name` is no stage of these kinds; None when it is one, or no stage's name at all (then it is a path)."""
        if name not in self.all and name not in self.disabled:
            return None
        problem = self.problem(name, where)
        if problem is None and self.stages[name].kind not in kinds:
            wanted = " or ".join(kinds)
            return f"{where}: {name!r} is of kind {self.stages[name].kind.value} - name a {wanted} stage"
        return problem

    def no_reverse(self, name: str, where: str) -> str | None:
        """Why `name` is no stage that reads backwards; None as of `no_judge`."""
        if name not in self.all and name not in self.disabled:
            return None
        problem = self.problem(name, where)
        if problem is None and not reads_backwards(self.stages[name]):
            return f"{where}: {name!r} does not read backwards - name {_JUDGED['reverse_likelihood']}"
        return problem


def stage_problems(stage: Any, where: str, earlier: Earlier) -> Iterator[str]:
    """What is wrong with one stage, given those before it."""
    if stage.start is not None and (problem := earlier.no_model(stage.start, f"{where}.start", ("base",))):
        yield problem
    if not stage.data:
        yield f"{where}.data: missing - name at least one source, like {{train: {{path: rows.jsonl}}}}"
    yield from source_problems(stage.data, f"{where}.data", earlier)
    yield from _directions(stage, where)
    if hasattr(stage, "reference"):
        problem = earlier.no_model(stage.reference, f"{where}.reference", ("start", "base"))
        if problem:
            yield problem
    if isinstance(stage, Training):
        yield from _training(stage, where)
    if isinstance(stage, Sft):
        yield from _sft(stage, where, earlier)
    if isinstance(stage, Dpo):
        yield from _dpo(stage, where)
    if isinstance(stage, Value):
        yield from _value(stage, where)
    if isinstance(stage, Guided):
        yield from sampling_problems(stage.sampling, f"{where}.sampling")
        if (stage.rollouts or earlier.rollouts).engine != LOCAL:
            yield (
                f"{where}.rollouts.engine: a guide weighs every token, which only the {LOCAL} engine shows - "
                f"give {where}.rollouts.engine={LOCAL}"
            )
    yield from engine_problems(getattr(stage, "rollouts", None), f"{where}.rollouts")
    if isinstance(stage, Guided | Guesses):
        yield from _goals(stage.goals, where)
        if problem := earlier.no_judge(stage.network, f"{where}.network", (Kind.value,)):
            yield problem
    if isinstance(stage, Rollouts):
        yield from _rollouts(stage, where)
    if isinstance(stage, Grouped):
        yield from _grouped(stage, where)
    if isinstance(stage, Ppo):
        yield from _ppo(stage, where, earlier)
    if isinstance(stage, OnlineDpo):
        yield from _online_dpo(stage, where)
    if hasattr(stage, "rewards"):
        if stage.rewards or not getattr(stage, "recorded", False):
            yield from reward_problems(stage.rewards, where, earlier)
        yield from sampling_problems(stage.sampling, f"{where}.sampling")


def _directions(stage: Any, where: str) -> Iterator[str]:
    """Only likelihoods can be learned backwards, and a model reads one way."""
    ways = {name: source.direction for name, source in stage.data.items()}
    turned = [f"{where}.data.{name}.direction" for name, way in ways.items() if way is Direction.reverse]
    if turned and not isinstance(stage, Sft):
        yield f"{turned[0]}: reverse is for sft - remove it"
    elif turned and len(turned) < len(ways):
        yield f"{turned[0]}: a model reads one way - give all sources of the stage the same direction"


def _training(stage: Training, where: str) -> Iterator[str]:
    if isinstance(stage, Rollouts):
        if stage.epochs is not None:
            yield f"{where}.epochs: {stage.kind.value} counts steps - give `{where}.steps` instead"
        if stage.steps is None:
            yield f"{where}.steps: missing - how many rollout steps to take"
    elif (stage.steps is None) == (stage.epochs is None):
        given = "neither is given" if stage.steps is None else "not both"
        yield f"{where}: give exactly one of {where}.steps and {where}.epochs ({given})"
    if stage.warmup > 1 and stage.warmup != int(stage.warmup):
        yield f"{where}.warmup: {stage.warmup} - a share below 1, or a whole number of updates"


def _sft(stage: Sft, where: str, earlier: Earlier) -> Iterator[str]:
    if stage.loss.fn in _DISTILS and stage.teacher is None:
        yield f"{where}.teacher: missing - {stage.loss.fn} imitates a teacher: name a stage, a checkpoint or a model"
    if stage.teacher in earlier.all and (problem := earlier.no_model(stage.teacher, f"{where}.teacher", ("base",))):
        yield problem


def _dpo(stage: Dpo, where: str) -> Iterator[str]:
    """A setting that would have no effect is refused, so that nobody takes the result for its."""
    loss, modifiers = stage.loss.fn, [m.fn for m in stage.modifiers]
    if loss == "ranking" and modifiers:
        yield f"{where}.modifiers[0]: {modifiers[0]} is for pairs, and ranking compares whole groups - remove it"
    if loss == "ranking" and stage.nll:
        yield f"{where}.nll: ranking compares whole groups, of which none is the chosen one - use 0"
    if loss in _WITHOUT_REFERENCE and stage.refresh:
        yield f"{where}.refresh: {loss} has no reference that could follow - remove it, or use another loss"
    for i, name in enumerate(modifiers):
        if loss in _WITHOUT_REFERENCE and name in _OF_LOG_RATIOS:
            yield (
                f"{where}.modifiers[{i}]: {name} changes log-ratios to the reference, and {loss} has none - "
                "remove it, or use another loss"
            )
        if name == "length_desensitised" and any(m in _OF_LOG_RATIOS for m in modifiers[:i]):
            yield f"{where}.modifiers[{i}]: {name} weighs actions - put it before f_divergence, and only once"


def _goals(goals: Goals, where: str) -> Iterator[str]:
    given = [n for n, x in (("texts", goals.texts), ("path", goals.path), ("column", goals.column)) if x]
    if len(given) != 1:
        which = " and ".join(given) or "none is given"
        yield f"{where}.goals: give exactly one of texts, path and column ({which})"


def _value(stage: Value, where: str) -> Iterator[str]:
    goals = stage.goals
    if stage.hindsight < 1:
        yield from _goals(goals, where)
    needs = {
        "goals.column": bool(goals.column),
        "hindsight": stage.hindsight > 0,
        "target: contrastive": stage.target == ValueTarget.contrastive,
    }
    needed = next((name for name, wanted in needs.items() if wanted), None)
    if needed and not stage.condition:
        yield f"{where}.condition: with {needed} goals differ, so the model has to read them - give '{{goal}} ', say"
    if stage.condition and "{goal}" not in stage.condition:
        yield f"{where}.condition: {stage.condition!r} does not say where the goal goes - write {{goal}} in it"
    if (stage.hindsight or stage.target == ValueTarget.contrastive) and stage.group_size < 2:
        yield f"{where}.group_size: another completion's ending is the goal - give at least 2"
    if stage.target == ValueTarget.contrastive and stage.avoid:
        yield f"{where}.avoid: a contrastive value has no scale of its own, and 1 − V needs one - use another target"


def _online_dpo(stage: OnlineDpo, where: str) -> Iterator[str]:
    if stage.group_size < 2:
        yield f"{where}.group_size: a pair needs two completions - give at least 2"
    if stage.kl.beta:
        yield f"{where}.kl.beta: the loss of online_dpo holds to the reference by itself - use 0, and loss.args.beta"


def _rollouts(stage: Rollouts, where: str) -> Iterator[str]:
    kl = stage.kl
    if kl.placement == KlPlacement.loss and kl.estimator == KlEstimator.k1:
        yield (
            f"{where}.kl.estimator: k1 in the loss has an expected gradient of zero: it adds noise only - "
            "use placement: reward, or k2 or k3"
        )
    if kl.placement == KlPlacement.loss and isinstance(stage, Ppo | Trpo):
        yield f"{where}.kl.placement: {stage.kind.value} has no KL term in its loss - use placement: reward"
    if kl.target is not None and kl.beta == 0:
        yield f"{where}.kl.beta: 0 stays 0 whatever the target - give beta a start, like 0.05"
    for name, neutral in (("top_k", 0), ("top_p", 1.0), ("min_p", 0.0)):
        if getattr(stage.sampling, name) != neutral:
            yield (
                f"{where}.sampling.{name}: {stage.kind.value} samples from the whole distribution: a filtered sampler "
                f"and the trainer would differ - use {neutral:g} (pairs and evaluation may)"
            )
    if stage.updates > stage.prompts:
        yield f"{where}.updates: {stage.updates} for {stage.prompts} prompts - at most one update a prompt"
    if stage.sampling.max_new_tokens >= stage.max_length:
        yield (
            f"{where}.max_length: {stage.max_length} leaves no room for a prompt beside "
            f"sampling.max_new_tokens={stage.sampling.max_new_tokens} - raise it, or lower that"
        )


def _grouped(stage: Grouped, where: str) -> Iterator[str]:
    if stage.advantage.fn in _BY_STEP and stage.step_end is None:
        yield (
            f"{where}.step_end: missing - {stage.advantage.fn} credits steps: give the text that ends one, "
            "or '' for every token"
        )
    loss = getattr(stage, "loss", None)
    if loss is not None and loss.fn == "geometric_mean" and stage.weight != Weight.sequence_mean:
        yield f"{where}.weight: geometric_mean is one value a completion - use sequence_mean"
    if stage.recorded and stage.environment is not None:
        yield f"{where}.environment: recorded rollouts are over - remove it, or recorded"
    if stage.recorded and (stage.resample or stage.advantage.fn in ("greedy_baseline", "monte_carlo_values")):
        what = "resample" if stage.resample else f"advantage.fn={stage.advantage.fn}"
        yield f"{where}.{what}: needs new samples, and recorded rollouts are all there is - remove one of the two"
    if stage.environment is not None and stage.advantage.fn == "monte_carlo_values":
        yield f"{where}.environment: monte_carlo_values goes on from inside a turn, alone - remove one of the two"
    k = stage.advantage.args.get("k") if stage.advantage.fn == "pass_at_k" else None
    if isinstance(k, int) and not 1 <= k <= stage.group_size:
        yield f"{where}.advantage.args.k: {k} - expected from 1 to group_size={stage.group_size}"
    elif k is not None and stage.group_size == 1:
        yield f"{where}.group_size: pass_at_k compares completions - give at least 2"
    if stage.correction.mode != CorrectionMode.none and stage.correction.floor >= stage.correction.cap:
        yield f"{where}.correction.floor: {stage.correction.floor:g} is not below cap={stage.correction.cap:g}"


def _ppo(stage: Ppo, where: str, earlier: Earlier) -> Iterator[str]:
    if stage.kl.estimator != KlEstimator.k1:
        yield f"{where}.kl.estimator: ppo puts k1 into every action's reward, the exact one - use k1"
    start = stage.critic.start
    if start is not None and (problem := earlier.no_judge(start, f"{where}.critic.start", (Kind.reward_model,))):
        yield problem
    if stage.step_end is not None:
        yield f"{where}.step_end: ppo credits actions by its critic - use grpo with advantage.fn=process"


def source_problems(data: dict[str, Source], where: str, earlier: Earlier | None) -> Iterator[str]:
    """What is wrong with the sources at `where`; without `earlier`, stages' rows cannot be read there."""
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
        if source.direction is Direction.reverse and earlier is None:
            yield f"{path}.direction: reverse is for sft - remove it"
        if source.stage and earlier:
            problem = earlier.problem(source.stage, f"{path}.stage")
            if problem:
                yield problem
            elif earlier.stages[source.stage].kind not in MAKES_ROWS:
                kind = earlier.stages[source.stage].kind.value
                yield f"{path}.stage: {source.stage!r} is of kind {kind}, without rows - name a pairs stage"


def reward_problems(rewards: Sequence[Reward], where: str, earlier: Earlier | None) -> Iterator[str]:
    """What is wrong with the rewards of the stage at `where`."""
    if not rewards:
        yield f"{where}.rewards: missing - give at least one, like [{{fn: math_answer}}]"
    names: list[str] = []
    for node, place in _nodes(rewards, f"{where}.rewards"):
        name = node.name or re.split(r"[.:]", node.fn)[-1]
        if name in names:
            yield f"{place}.name: {name!r} is logged already - give this one a name of its own"
        names.append(name)
        if node.of:
            yield from _node(node, place)
    for leaf, place in reward_leaves(rewards, where):
        if leaf.fn in NODES:
            yield f"{place}.of: missing - {leaf.fn} puts other rewards together: list them"
        if leaf.fn in _JUDGED and leaf.model is None:
            yield f"{place}.model: missing - name {_JUDGED[leaf.fn]}, or a checkpoint of one"
        if leaf.model is not None and earlier is not None:
            if leaf.fn == "reverse_likelihood":
                problem = earlier.no_reverse(leaf.model, f"{place}.model")
            else:
                problem = earlier.no_judge(leaf.model, f"{place}.model", MAKES_JUDGES)
            if problem:
                yield problem


def _nodes(rewards: Sequence[Reward], where: str) -> Iterator[tuple[Reward, str]]:
    for i, reward in enumerate(rewards):
        yield reward, f"{where}[{i}]"
        yield from _nodes(reward.of, f"{where}[{i}].of")


def _node(node: Reward, where: str) -> Iterator[str]:
    if node.fn not in NODES:
        yield f"{where}.fn: {node.fn!r} takes no other rewards{hint_or_list(node.fn, list(NODES), 'these do')}"
        return
    for key in node.args:
        if key not in NODES[node.fn]:
            near = hint_or_list(key, NODES[node.fn], "it takes")
            yield f"{where}.args.{key}: {node.fn} has no argument {key!r}{near}"
    for key in ("deadline", "on_failure"):
        if getattr(node, key) is not None:
            yield f"{where}.{key}: is for functions of a file, and {node.fn} is none - set it in `of`"
    if node.fn == "gate" and len(node.of) != 2:
        yield f"{where}.of: a gate has a guard and what counts if it passed - give two, not {len(node.of)}"
    if node.fn == "shaping" and len(node.of) != 1:
        yield f"{where}.of: shaping takes one potential, a reward by step - give one, not {len(node.of)}"


def engine_problems(chosen: EngineChoice | None, where: str) -> Iterator[str]:
    """What is wrong with a choice of engine."""
    if chosen is not None and chosen.engine == LOCAL:
        for key in ("args", "deadline"):
            if getattr(chosen, key):
                yield f"{where}.{key}: is for an engine of file.py:function, not for {LOCAL} - remove it"


def sampling_problems(sampling: Sampling, where: str) -> Iterator[str]:
    """What is wrong with a sampling section."""
    if "" in sampling.stop:
        yield f"{where}.stop: an empty string stops every completion at once - remove it"
