"""A dataset for process reward models without human labels: a step's is the mean reward of rollouts from its end.

Math-Shepherd (Wang et al. 2023, arXiv:2312.08935, §3.3), with soft labels.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from rlpost.data.formats import DataRole
from rlpost.data.messages import opening
from rlpost.data.params import TooLong
from rlpost.data.step_split import split_steps, step_starts, step_texts
from rlpost.engine.api import Engine
from rlpost.engine.collect import collect
from rlpost.engine.mc_rollouts import as_answers, mc_rollouts
from rlpost.environments.scoring import scored
from rlpost.errors import DataError
from rlpost.policy.policy import Policy
from rlpost.recipe.specs.step_labels import StepLabels
from rlpost.rewards.score import Scorer
from rlpost.stages.context import Context
from rlpost.stages.generate_dataset import generate_dataset
from rlpost.types import Group, completions

AT_ONCE = 64
"""Prompts sampled at a time."""


def step_labels(context: Context, cfg: StepLabels) -> Path:
    """Sample, split into steps, roll out from each one's end; returns the folder with the rows `prompt, steps, labels`.

    Raises:
        DataError: no completion has steps that could be labelled.
        Interrupted: when a signal asked to stop.
    """
    policy = context.policy(trains=False)
    limit = policy.max_positions - cfg.sampling.max_new_tokens
    data = context.data(policy, cfg.data, DataRole.prompts, limit, TooLong.refuse)
    prompts = data.next(cfg.prompts or len(data))
    scorer = context.scorer(cfg.rewards, policy, cfg.step_end)

    engine = context.engine(policy, cfg.rollouts)

    def make(some: Sequence[Group], first: int) -> Iterator[dict[str, Any]]:
        engine.update_weights(policy, first // AT_ONCE)
        return labelled(engine, policy, some, scorer, cfg, context.seed_for("sample", first))

    rows = generate_dataset(context, prompts, AT_ONCE, make)
    if not rows:
        raise DataError(
            f"stages.{context.name}: no completion has steps that could be labelled; "
            f"check step_end={cfg.step_end!r} and the rewards"
        )

    return context.finish_dataset(rows, cfg.kind)


def labelled(
    engine: Engine, policy: Policy, prompts: Sequence[Group], scorer: Scorer, cfg: StepLabels, seed: int
) -> Iterator[dict[str, Any]]:
    """Rows of sampled completions: the label of a step is the mean reward of fresh rollouts from its end.

    The label of its last step is the completion's own reward. Unscored
    rollouts are left out; a completion with a step that has none of them left gives no row, nor does one without text.
    """
    tokenizer, end_ids = policy.tokenizer, policy.end_ids
    answered = collect(engine, prompts, cfg.group_size, cfg.sampling, seed=seed, keep=True)
    groups = [split_steps(g, tokenizer, cfg.step_end, end_ids) for g in answered]
    sampled = completions(groups)
    ends = [step_starts(c)[1:] for c in sampled]
    fresh = mc_rollouts(engine, tokenizer, groups, ends, cfg.fresh_rollouts, cfg.sampling, seed + 1)
    divided = [split_steps(g, tokenizer, cfg.step_end, end_ids) for g in as_answers(fresh)]
    rollout_means = iter([_mean(row) for row in scored(scorer, divided, policy).total])
    own_rewards = iter([reward for row in scored(scorer, groups, policy).total for reward in row])
    for group in groups:
        for completion in group.completions:
            labels = [next(rollout_means) for _ in completion.steps[1:]] + [next(own_rewards)]
            steps = step_texts(completion, tokenizer, end_ids)
            if any(steps) and None not in labels:
                yield _row(group, steps, labels)


def _row(group: Group, steps: Sequence[str], labels: Sequence[float | None]) -> dict[str, Any]:
    prompt = opening(group.example.get("messages", []))
    return {"prompt": prompt, **group.example, "steps": steps, "labels": labels}


def _mean(rewards: Sequence[float | None]) -> float | None:
    scored = [r for r in rewards if r is not None]
    return sum(scored) / len(scored) if scored else None
