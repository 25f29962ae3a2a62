"""Rows from a model's own samples, ranked by rewards: pairs, rankings or labels. The bridge from SFT to DPO."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from rlpost import console
from rlpost.data.formats import DataRole
from rlpost.data.messages import opening
from rlpost.data.params import TooLong
from rlpost.engine.api import Engine
from rlpost.engine.collect import collect
from rlpost.errors import DataError, Interrupted
from rlpost.objectives.baselines import optimal_value
from rlpost.policy.policy import Policy
from rlpost.recipe.specs.pairs import Pairs
from rlpost.rewards.score import Scorer
from rlpost.stages.context import Context
from rlpost.stages.params import PairChoice
from rlpost.types import Group

AT_ONCE = 64
"""Prompts sampled at a time."""


def pairs(context: Context, cfg: Pairs) -> Path:
    """Sample, score and pair; returns the folder with the rows.

    Raises:
        DataError: if no prompt gave two completions of different reward.
        Interrupted: when a signal asked to stop.
    """
    policy = context.policy(trains=False)
    limit = policy.max_positions - cfg.sampling.max_new_tokens
    data = context.data(policy, cfg.data, DataRole.prompts, limit, TooLong.refuse)
    prompts = data.next(cfg.prompts or len(data))
    scorer = context.scorer(cfg.rewards, policy)
    rows = []
    engine = context.engine(policy, cfg.rollouts)
    for row in preference_rows(engine, policy, prompts, scorer, cfg, context.seed_for("sample"), context.name):
        rows.append(row)
        if (signal := context.interrupts.agreed()) is not None:
            raise Interrupted(
                f"{context.name} stopped while it sampled, and keeps nothing; run the same command to begin it again",
                signal,
            )
    must_have_pairs(rows, prompts, cfg, context.name)

    return context.finish_dataset(rows, cfg.kind)


def must_have_pairs(rows: Sequence[Any], prompts: Sequence[Group], cfg: Pairs, name: str) -> None:
    """Say how many pairs there are.

    Raises:
        DataError: there are none.
    """
    console.say(f"{name}: {len(rows)} rows from {len(prompts)} prompts")
    if not rows and cfg.choice is PairChoice.valued:
        above = "" if cfg.solved_above is None else f" above {cfg.solved_above:g}"
        raise DataError(f"stages.{name}: no prompt has a reward{above}; raise group_size, or check the rewards")
    if not rows:
        raise DataError(
            f"stages.{name}: no prompt gave two completions whose rewards differ by more than "
            f"{cfg.min_gap:g}; raise group_size or temperature, or check the rewards"
        )


def preference_rows(
    engine: Engine, policy: Policy, prompts: Sequence[Group], scorer: Scorer, cfg: Pairs, seed: int, title: str
) -> Iterator[dict[str, Any]]:
    """Rows as `cfg.choice` says, with the prompt's own columns."""
    with console.Progress(title, len(prompts)) as progress:
        for first in range(0, len(prompts), AT_ONCE):
            some = prompts[first : first + AT_ONCE]
            engine.update_weights(policy, first // AT_ONCE)
            groups = collect(engine, some, cfg.group_size, cfg.sampling, seed=seed, first=first)
            totals = scorer.score(groups).total
            for group, rewards in zip(groups, totals, strict=True):
                if cfg.choice is PairChoice.valued:
                    yield from valued_row(group, rewards, cfg.beta or 1.0, cfg.solved_above)
                else:
                    yield from rows_of_group(group, rewards, cfg.choice, cfg.min_gap)
            progress.advance(n=len(some))


def valued_row(
    group: Group, rewards: Sequence[float | None], beta: float, solved_above: float | None
) -> Iterator[dict[str, Any]]:
    """The prompt's row with its `optimal_value`, of all of its scored completions; none without a reward above that."""
    scored = [reward for reward in rewards if reward is not None]
    if not scored or (solved_above is not None and max(scored) <= solved_above):
        return
    value = optimal_value(torch.tensor([scored], dtype=torch.float64), beta=beta)
    yield {"prompt": prompt_of(group), **group.example, "optimal_value": float(value)}


def prompt_of(group: Group) -> Any:
    """The prompt as its row has it: text, or a conversation up to its last answer."""
    return group.example.get("prompt", opening(group.example.get("messages", [])))


def rows_of_group(
    group: Group, rewards: Sequence[float | None], choice: PairChoice, min_gap: float
) -> Iterator[dict[str, Any]]:
    """Rows of one prompt's completions, each text once, unfinished and unscored ones left out.

    So are blank answers to a conversation, where chat formats know no empty turn; after a plain text they may stand.
    A prompt whose rewards do not differ by more than `min_gap` gives nothing.
    """
    prompt = prompt_of(group)
    scored: dict[str, float] = {}
    for completion, reward in zip(group.completions, rewards, strict=True):
        blank = not isinstance(prompt, str) and not completion.text.strip()
        if reward is not None and completion.finish == "stop" and not blank:
            scored.setdefault(completion.text, reward)
    if not scored or max(scored.values()) - min(scored.values()) <= min_gap:
        return
    row = {"prompt": prompt, **group.example}
    if choice is PairChoice.ranked:
        yield {**row, "completions": list(scored), "scores": list(scored.values())}
    elif choice is PairChoice.labelled:
        mean = sum(scored.values()) / len(scored)
        # The labelled format has no empty completions.
        answers = {text: reward for text, reward in scored.items() if text.strip()}
        yield from ({**row, "completion": text, "label": reward > mean} for text, reward in answers.items())
    else:
        yield from ({**row, **pair} for pair in _pairs(scored, choice, min_gap))


def _pairs(scored: Mapping[str, float], choice: PairChoice, min_gap: float) -> Iterator[dict[str, Any]]:
    """The best with the worst (the first of each), or every better/worse combination."""
    ranked = sorted(scored, key=lambda text: -scored[text])
    candidates = itertools.combinations(ranked, 2) if choice is PairChoice.all else [(ranked[0], ranked[-1])]
    for chosen, rejected in candidates:
        if scored[chosen] - scored[rejected] > min_gap:
            yield {
                "chosen": chosen,
                "rejected": rejected,
                "chosen_reward": scored[chosen],
                "rejected_reward": scored[rejected],
            }
