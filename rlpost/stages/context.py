"""What a stage is given: where it starts, where it writes, and how it gets its model, data and functions."""

from __future__ import annotations

import json
import math
import os
import random
import zlib
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from rlpost import console
from rlpost.data.codec import make_codec
from rlpost.data.dataset import Dataset, open_dataset
from rlpost.data.fitting import Limit
from rlpost.data.formats import DataRole
from rlpost.data.params import Source, TooLong
from rlpost.data.part import Check, Shelf
from rlpost.engine.api import Engine, Guide
from rlpost.engine.door import engine_for
from rlpost.engine.params import EngineChoice
from rlpost.errors import RecipeError
from rlpost.policy.adapter_files import base_of, is_adapter
from rlpost.policy.adapters import POLICY
from rlpost.policy.identity import Inputs
from rlpost.policy.judge import AnyJudge, load_judge
from rlpost.policy.load import load_policy
from rlpost.policy.params import Model
from rlpost.policy.policy import Policy
from rlpost.policy.reference import Reference, reference_policy
from rlpost.policy.saved import save_policy, whole_weights
from rlpost.policy.sharded import Shards
from rlpost.policy.value_head import ValueHeadModel
from rlpost.recipe.specs.common import Offline, Stage, Training
from rlpost.rewards import tree
from rlpost.rewards.params import REWARD, Reward
from rlpost.rewards.score import Scorer, Unrewarded
from rlpost.run.interrupt import Interrupts
from rlpost.run.lookup import find_checkpoint
from rlpost.run.names import FROM_HERE
from rlpost.run.stage import StageDirectory
from rlpost.stages.balancing import balance_for
from rlpost.trackers.mirrors import Mirrors
from rlpost.train.evaluation import Measure, RecipeMeasure, StageEvaluation
from rlpost.train.learner import Learner
from rlpost.train.loop import POLICY as LEARNED
from rlpost.train.loop import Loop, Stateful, Weights
from rlpost.train.schedules import learning_rate_factor
from rlpost.types import Group
from rlpost.usercode.binding import bind, bind_engine, functions_at
from rlpost.usercode.bound import Bound
from rlpost.usercode.params import OnFailure


@dataclass(frozen=True)
class Context:
    """The surroundings of one stage."""

    name: str
    """The stage's name, which is also its directory's."""
    model: Model
    start: Path
    """The checkpoint it starts from."""
    out: StageDirectory
    checkpoints: Mapping[str, Path]
    """Results of the stages before it by name, and `base`."""
    rows_of: Callable[[str], Path]
    """The rows that an earlier stage wrote."""
    folder: Path
    """The recipe's."""
    seed: int
    """The recipe's."""
    bfloat16: bool
    device: torch.device
    interrupts: Interrupts
    lineage: Mapping[str, Any]
    """Further fields of checkpoint.json: the recipe's hash."""
    inputs: Inputs = field(default_factory=Inputs)
    """Records the models and rows that the stage reads besides its data."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """The stage's part of the resolved recipe, for DONE."""
    rollouts: EngineChoice = field(default_factory=EngineChoice)
    """The recipe's engine; a stage may have its own."""
    opened: ExitStack = field(default_factory=ExitStack)
    """Closes what the stage has opened."""
    allow_change: bool = False
    """Resume from a checkpoint although the data has changed."""
    shelf: Shelf | None = None
    """Where its rows are kept once they are encoded."""
    check: Check | None = None
    """A further check of its rows."""
    mirrors: Mirrors = field(default_factory=Mirrors)
    """Trackers that are sent what is logged."""
    evaluation: RecipeMeasure = field(default_factory=RecipeMeasure)
    """The recipe's evaluation, for while it trains."""
    shards: Shards | None = None
    """How the models that it trains are sharded; None: every rank has them whole."""
    _loops: list[Loop] = field(default_factory=list, repr=False)

    def seed_for(self, purpose: str, number: int = 0) -> int:
        """A seed of this stage's own for one purpose, the same in every process and every run."""
        return stage_seed(self.seed, self.name, purpose, number)

    def policy(self, *, trains: bool = True) -> Policy:
        """The model to train, or only to sample from, loaded from where the stage starts."""
        seed = self.seed_for("model")
        torch.manual_seed(seed)
        # rlpost draws from neither; a user's reward may.
        random.seed(seed)
        np.random.seed(seed)
        self.inputs.note("start", self.start)
        # What will be sharded may be too large for one device.
        device = "cpu" if self.shards is not None and trains else self.device
        return load_policy(self.start, self.model, bfloat16=self.bfloat16, device=device)

    def shard(self, model: Policy) -> None:
        """Shard a model that has all of its adapters, if this run shards its models."""
        if self.shards is not None:
            self.shards.apply(model)

    def reference(self, policy: Policy, name: str) -> Reference:
        """The reference called `name`, for a policy that was just loaded."""
        reference = reference_policy(policy, self.checkpoint(name), self.start, self.model)
        if reference.policy is not policy:
            self.shard(reference.policy)
        return reference

    def data(
        self,
        policy: Policy,
        sources: Mapping[str, Source],
        need: DataRole,
        max_length: int,
        too_long: TooLong,
        key: str = "data",
        tools: Sequence[Mapping[str, Any]] = (),
    ) -> Dataset:
        """The stage's dataset, no row longer than the model reads; prints what was recognised and what did not fit."""
        if max_length > policy.max_positions:
            console.say(
                f"{self.name}: rows are limited by the model's {policy.max_positions} positions, not by max_length"
            )
        dataset = open_dataset(
            sources,
            make_codec(policy.tokenizer, tools),
            need=need,
            limit=Limit.within(max_length, policy.max_positions, too_long),
            seed=self.seed_for(key if "." in key else "data"),  # a section's rows have an order of their own
            where=f"stages.{self.name}.{key}",
            stages=self._rows,
            bind=bind,
            base=self.folder,
            allow_change=self.allow_change,
            shelf=self.shelf,
            check=None if "." in key else self.check,
        )
        for line in dataset.notices:
            console.say(line)
        return dataset

    def held_out(
        self, policy: Policy, cfg: Offline, measure: Callable[[tuple[Group, ...]], Mapping[str, float]]
    ) -> Measure | None:
        """Gives the metrics of the stage's held-out rows, `measure` of all of them; None if it has none."""
        if not cfg.eval_data:
            return None
        data = self.data(policy, cfg.eval_data, cfg.rows(), cfg.max_length, cfg.too_long, key="eval_data")
        return lambda: measure(tuple(data.every()))

    def function(self, cfg: Stage, key: str) -> Bound:
        """The function that a key of the stage names, with its arguments applied."""
        (found,) = self.functions(cfg, key)
        return found

    def functions(self, cfg: Stage, key: str) -> list[Bound]:
        """The functions of a key that may name several, or none."""
        return [bind(*named, self.folder) for named in functions_at(cfg, key, f"stages.{self.name}")]

    def scorer(
        self, rewards: Sequence[Reward], policy: Policy, step_end: str | None = None, *, shares: bool = True
    ) -> Scorer:
        """The rewards; models judge completions of `policy`, on its base if `shares`, in steps ended by `step_end`."""

        def judge(name: str, adapter: str) -> AnyJudge:
            folder = self.checkpoint(name)
            return load_judge(
                folder, self.model, policy, name=adapter, step_end=step_end, device=self.device, shares=shares
            )

        return make_scorer(rewards, f"stages.{self.name}", self.folder, judge)

    def engine(self, policy: Policy, own: EngineChoice | None, guide: Guide | None = None) -> Engine:
        """The stage's engine, by its own choice or the recipe's; it is closed when the stage ends."""
        made = make_engine(policy, own, self.rollouts, f"stages.{self.name}", self.folder, guide)
        self.opened.callback(made.close)
        return made

    def learner(
        self,
        model: Policy | ValueHeadModel,
        cfg: Training,
        updates: int,
        *,
        whole_groups: bool = False,
        learning_rate: float | None = None,
    ) -> Learner:
        """The optimiser of `model` for this stage's `updates`; the stage's learning rate unless another is given.

        Its weights are sharded now, so no adapter can be added that it would train.
        """
        if isinstance(model, ValueHeadModel):
            self.shard(model.trunk)
            model.head.to(model.device)
        else:
            self.shard(model)
        return Learner(
            model,
            learning_rate=cfg.learning_rate if learning_rate is None else learning_rate,
            factor=learning_rate_factor(cfg.schedule, cfg.warmup, updates),
            optimizer=cfg.optimizer,
            betas=cfg.betas,
            weight_decay=cfg.weight_decay,
            max_grad_norm=cfg.max_grad_norm,
            max_tokens_per_microbatch=cfg.max_tokens_per_microbatch,
            whole_groups=whole_groups,
            balance=balance_for(model, cfg, self.name),
        )

    def loop(
        self,
        cfg: Training,
        states: Mapping[str, Stateful],
        steps: int,
        weights: Mapping[str, Weights] | None = None,
        *,
        held_out: Measure | None = None,
        **learners: Learner,
    ) -> Loop:
        """The stage's training loop, with its learners by name: `policy` is the result. `held_out` measures rows."""
        measures = [] if held_out is None else [held_out]
        learned = learners.get(LEARNED)
        if self.evaluation.of is not None and learned is not None and isinstance(learned.model, Policy):
            measures.append(self.evaluation.of(learned.model))
        every = self.evaluation.every if cfg.eval_every is None else cfg.eval_every
        made = Loop(
            self.name,
            self.out,
            learners,
            states,
            weights or {},
            self.interrupts,
            self.inputs,
            steps=steps,
            checkpoint_every=cfg.checkpoint_every,
            keep=cfg.keep_checkpoints,
            log_every=cfg.log_every,
            mirrors=self.mirrors,
            evaluation=StageEvaluation(every, measures, cfg.keep_best),
        )
        self._loops.append(made)
        return made

    def checkpoint(self, name: str) -> Path:
        """The model that `name` means: `start`, `base`, an earlier stage, or a run, stage, checkpoint or model."""
        if name == "start":
            return self.start
        return self.inputs.note(name, self.checkpoints.get(name) or find_checkpoint(name) or Path(name))

    def _rows(self, name: str) -> Path:
        rows = self.rows_of(name)
        self.inputs.note(name, rows.parent)
        return rows

    def finish(
        self,
        policy: Policy,
        kind: str,
        steps: int,
        *,
        adapter: str | None = POLICY,
        extra: Callable[[Path], None] | None = None,
        about: Mapping[str, Any] | None = None,
    ) -> Path:
        """Write the stage's result, with LoRA the given adapter of it; returns its folder.

        `extra` writes more files into it, such as a head; `about` is added to checkpoint.json.
        """

        state = whole_weights(policy)

        def write(folder: Path) -> None:
            save_policy(policy, folder, adapter or POLICY, state)
            if extra is not None:
                extra(folder)

        # A stage that stopped early has done fewer steps, and its best weights may be of another step.
        ended = self._loops[-1] if self._loops else None
        full = self._about(kind, steps, policy.has_adapter) | (ended.about_result if ended else {}) | dict(about or {})
        return self.out.finish(write, full, self._proof(ended.done if ended else steps))

    def finish_dataset(self, rows: Sequence[Mapping[str, Any]], kind: str) -> Path:
        """Write the result of a stage that makes rows; returns its folder."""

        def write(folder: Path) -> None:
            lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
            (folder / self.out.rows.name).write_text(lines, "utf-8")

        about = {"stage": self.name, "kind": kind, "parent": str(self.start), **self.lineage}
        return self.out.finish(write, about, self._proof(None))

    def _proof(self, steps: int | None) -> dict[str, Any]:
        return {"step": steps, "settings": dict(self.settings), "inputs": self.inputs.identities()}

    def _about(self, kind: str, steps: int, adapter: bool) -> dict[str, Any]:
        about = {
            "stage": self.name,
            "kind": kind,
            "step": steps,
            **self._where("parent", str(self.start)),
            **self.lineage,
        }
        if not adapter:
            return about
        base = base_of(self.start) if is_adapter(self.start) else str(self.start)
        return {**about, **self._where("base", base)}

    def _where(self, key: str, model: str) -> dict[str, str]:
        """A model's path or hub name; inside this run, which may be moved, also its path relative to the result."""
        if not Path(model).is_dir():
            return {key: model}
        location = Path(model).resolve()
        if not location.is_relative_to(self.out.path.parent.resolve()):
            return {key: str(location)}
        return {key: str(location), f"{key}{FROM_HERE}": os.path.relpath(location, self.out.final.resolve())}


def make_engine(
    policy: Policy, own: EngineChoice | None, top: EngineChoice, where: str, folder: Path, guide: Guide | None = None
) -> Engine:
    """The engine for the section at key path `where`: the section's own choice, or the recipe's.

    Raises:
        RecipeError: it names a function that is not there.
        EngineError: that function fails, or its engine cannot be guided.
    """
    chosen, location = (top, "rollouts") if own is None else (own, f"{where}.rollouts")
    return engine_for(policy, chosen, bind_engine(chosen, location, folder), guide, location)


def stage_seed(seed: int, stage: str, purpose: str, number: int = 0) -> int:
    """The seed of a stage for one purpose, made from the recipe's."""
    return zlib.crc32(f"{seed}/{stage}/{purpose}/{number}".encode())


def make_scorer(rewards: Sequence[Reward], where: str, folder: Path, judge: Callable[[str, str], AnyJudge]) -> Scorer:
    """Bind a tree of rewards to its functions and models.

    Args:
        rewards: the recipe's.
        where: key path of the section that has them.
        folder: the recipe's, which files of functions are relative to.
        judge: (name, adapter) -> the reward model of that name, loaded as that adapter where it shares a base; called
            once a name.
    """
    judges: dict[str, AnyJudge] = {}

    def bound(reward: Reward, location: str) -> tree.Reward:
        if reward.of:
            of = [bound(child, f"{location}.of[{i}]") for i, child in enumerate(reward.of)]
            return tree.Node(reward.name or reward.fn, reward.weight, reward.fn, of, reward.args)
        function = bind(reward, REWARD, location, folder)
        name = reward.model
        if name is not None and name not in judges:
            judges[name] = judge(name, f"reward_{len(judges)}")
        model = None if name is None else judges[name]
        unscored = reward.on_failure is OnFailure.unscored
        return tree.BoundReward(reward.name or function.name, reward.weight, function.call, model, unscored)

    every = [bound(reward, f"{where}.rewards[{i}]") for i, reward in enumerate(rewards)]
    return Scorer(every) if every else Unrewarded()


def steps_of(cfg: Training, rows: int, batch_size: int, where: str) -> int:
    """Optimiser steps from `steps` or `epochs`.

    Raises:
        RecipeError: if neither is given.
    """
    if cfg.steps is not None:
        return cfg.steps
    if cfg.epochs is None:
        raise RecipeError(f"{where}: give `steps` or `epochs`")
    return max(1, math.ceil(cfg.epochs * rows / batch_size))
