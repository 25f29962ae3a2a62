"""The teacher of a stage that distils, and what it is shown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from torch import Tensor

from rlpost import console
from rlpost.data.codec import make_codec
from rlpost.data.dataset import Dataset
from rlpost.data.privileged import Privileged
from rlpost.engine.api import ScoringEngine
from rlpost.engine.door import scoring_engine
from rlpost.engine.params import ScoringChoice
from rlpost.errors import ModelError, RecipeError
from rlpost.policy import adapters
from rlpost.policy.policy import Policy
from rlpost.policy.reference import Reference
from rlpost.policy.teacher import Taught, teacher_model
from rlpost.recipe.specs.distill import SELF, Distill
from rlpost.stages.context import Context
from rlpost.stages.exclusion import without_actions
from rlpost.stages.rollouts import Rollout
from rlpost.types import Group
from rlpost.usercode.binding import bind_engine
from rlpost.usercode.toolset import bound_tools


def lessons_of(context: Context, cfg: Distill, policy: Policy) -> Lessons:
    """The teacher that the recipe names, for a student that was just loaded.

    Raises:
        EngineError: its engine cannot be reached, or has another vocabulary.
        ModelError: it cannot be loaded, its vocabulary is another one, or it has fewer positions.
        RecipeError: it is the student, whose weights are in shards; or `top_k` is the whole vocabulary.
    """
    longest = min(cfg.max_length, policy.max_positions)
    if cfg.top_k is not None and cfg.top_k >= policy.vocabulary:
        raise RecipeError(
            f"stages.{context.name}.top_k: {cfg.top_k} of a vocabulary of {policy.vocabulary} leaves no other token: "
            "leave it out"
        )
    privileged = _privileged(context, cfg, policy, longest)
    if cfg.teacher_engine is not None:
        return Lessons(_engine(context, cfg, cfg.teacher_engine, policy), privileged, context.name)
    teacher = _teacher(context, cfg, policy)
    if teacher.policy.max_positions < longest:
        raise ModelError(
            f"stages.{context.name}.teacher: {cfg.teacher} has {teacher.policy.max_positions} positions, and rows have "
            f"up to {longest} tokens: lower max_length"
        )
    return Lessons(teacher, privileged, context.name)


class Lessons:
    """A teacher, and the prompts that it reads."""

    def __init__(self, teacher: Reference | ScoringEngine, privileged: Privileged | None, name: str) -> None:
        """A teacher that is loaded here, or an engine that scores."""
        self._teacher = teacher
        self._privileged = privileged
        self._name = name

    @property
    def is_loaded(self) -> bool:
        """It is a model of this process, whose whole distributions can be read."""
        return isinstance(self._teacher, Reference)

    def distributions(self, groups: Sequence[Group], temperature: float) -> Taught:
        """The teacher's distributions at the groups' actions."""
        assert isinstance(self._teacher, Reference), "the caller has seen to it"
        return Taught(self._teacher, self._shown(groups), temperature)

    def score(self, groups: Sequence[Group], k: int, temperature: float) -> Mapping[str, Tensor]:
        """Of every action `teacher`, its log-probability; of an engine, with `k`, `ids` and `top` of the likeliest.

        They are [N], [N, K] and [N, K], on the CPU.

        Raises:
            EngineError: the engine has no answer.
        """
        shown = self._shown(groups)
        if isinstance(self._teacher, Reference):
            return {"teacher": self._teacher.logprobs(shown, temperature)}
        found = self._teacher.score(shown, k, temperature)
        return {"teacher": found.logp_N, **({"ids": found.ids_NK, "top": found.logp_NK} if k else {})}

    def check(self, data: Dataset) -> None:
        """Render the teacher's prompt of every row.

        Raises:
            DataError: a row lacks a column, or its prompt is too long and such are refused.
        """
        long = 0 if self._privileged is None else self._privileged.check(data)
        if long:
            console.say(
                f"{self._name}: nothing is learned from {long} rows, whose prompts for the teacher are too long"
            )

    def begin(self, rollout: Rollout) -> Rollout:
        """A step's samples without what the teacher cannot read."""
        if self._privileged is None:
            return rollout
        self._privileged.forget()
        fits = self._privileged.fits
        learned = [g if fits(g) else _nothing(g) for g in rollout.learned]
        return replace(rollout, learned=learned)

    def _shown(self, groups: Sequence[Group]) -> Sequence[Group]:
        """The groups as the teacher reads them; what it cannot read has no actions, and its own prompt."""
        if self._privileged is None:
            return groups
        readable = [any(c.actions for c in g.completions) for g in groups]
        shown = iter(self._privileged.shown([g for g, reads in zip(groups, readable, strict=True) if reads]))
        return [next(shown) if reads else g for g, reads in zip(groups, readable, strict=True)]


def _nothing(group: Group) -> Group:
    return replace(group, completions=tuple(without_actions(c) for c in group.completions))


def _teacher(context: Context, cfg: Distill, policy: Policy) -> Reference:
    assert cfg.teacher is not None, "validated: a teacher"
    if cfg.teacher != SELF:
        sharded = context.shards is not None
        checkpoint = context.checkpoint(cfg.teacher)
        return teacher_model(policy, checkpoint, context.start, context.model, apart=sharded)
    if context.shards is not None:
        raise RecipeError(
            f"stages.{context.name}.teacher: self reads distributions of weights that are in shards, which are gone "
            "when they are needed; name `start`, or remove parallel.strategy"
        )
    return Reference(policy, adapters.POLICY if policy.has_adapter else None)


def _engine(context: Context, cfg: Distill, chosen: ScoringChoice, policy: Policy) -> ScoringEngine:
    where = f"stages.{context.name}.teacher_engine"
    made = scoring_engine(policy, chosen, cfg.top_k or 0, bind_engine(chosen, where, context.folder), where)
    context.opened.callback(made.close)
    return made


def _privileged(context: Context, cfg: Distill, policy: Policy, longest: int) -> Privileged | None:
    if cfg.privileged is None:
        return None
    where = f"stages.{context.name}"
    told = [tool.schema for tool in bound_tools(cfg, where, context.folder)]
    room = longest - cfg.sampling.max_new_tokens
    return Privileged(cfg.privileged, make_codec(policy.tokenizer, told), room, cfg.too_long, where)
