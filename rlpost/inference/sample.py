"""Completions of one prompt: `rlpost sample`."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

from rlpost.data.codec import Codec, make_codec
from rlpost.data.direction import before_what, in_reading_order
from rlpost.data.formats import Format, encode
from rlpost.engine.api import Engine
from rlpost.engine.collect import best_of as best_of_each
from rlpost.engine.collect import collect
from rlpost.engine.door import engine_for, frozen_engine
from rlpost.engine.params import EngineChoice, Sampling
from rlpost.errors import ModelError, RecipeError
from rlpost.inference.best_of import check_row, rewards_of
from rlpost.inference.checkpoint import frozen_policy, judges_of, located
from rlpost.policy.judge import load_judge
from rlpost.policy.load import is_backwards
from rlpost.policy.params import Model
from rlpost.policy.policy import Policy
from rlpost.recipe.resolve import Resolved, resolve
from rlpost.rewards.score import Scorer
from rlpost.run.lookup import find_checkpoint
from rlpost.stage_evaluation import judges
from rlpost.stages.context import make_engine, make_scorer
from rlpost.types import Group
from rlpost.usercode.binding import bind_engine


def sample(
    checkpoint: str,
    prompt: str,
    *,
    sampling: Sampling,
    n: int = 1,
    seed: int = 0,
    best_of: int | None = None,
    recipe: str | None = None,
    example: Mapping[str, str] | None = None,
    judge: str | None = None,
    engine: str | None = None,
) -> list[str]:
    """`n` completions of a prompt; with `best_of`, the best of so many by the recipe's rewards or `judge`.

    The prompt goes through the model's chat template, if it has one. A model of reversed text gets the end of a text
    and returns what comes before it. `example` are further columns of the prompt's row, for rewards that read them.
    `engine` is `file.py:function`; by default the recipe's engine, or the local one.
    """
    row = {**(example or {}), "prompt": prompt}
    resolved = resolve(recipe) if recipe is not None else None
    if resolved is not None:
        check_row(resolved, row)
    folder = located(checkpoint)
    if is_backwards(folder):
        if best_of or sampling.stop or engine:
            raise ModelError(f"{checkpoint}: it reads backwards; leave out --best-of, --stop and --engine")
        return _before(folder, prompt, sampling, n, seed)
    policy = frozen_policy(folder)
    group = prompt_group(row, make_codec(policy.tokenizer))
    sampling = within(sampling, policy.max_positions - len(group.prompt))
    with closing(_engine(engine, resolved, policy)) as sampler:
        sampler.update_weights(policy, 0)
        groups = collect(sampler, [group], best_of or n, sampling, seed=seed)
    if best_of is not None and judge is not None:
        found = load_judge(find_checkpoint(judge) or Path(judge), Model(), policy)
        groups = best_of_each(groups, found.by_group(groups))
    elif best_of is not None:
        assert resolved is not None
        groups = best_of_each(groups, _scorer_of(resolved, policy).score(groups).total)
    return [c.text for c in groups[0].completions]


def prompt_group(row: Mapping[str, Any], codec: Codec) -> Group:
    """A row with a `prompt` as tokens; with a chat template, the prompt is the user's message."""
    prompt = row["prompt"]
    prompt_column = [{"role": "user", "content": prompt}] if codec.template else prompt
    return encode({**row, "prompt": prompt_column}, Format.prompt, codec, "the prompt")


def within(sampling: Sampling, room: int) -> Sampling:
    """The sampling with `max_new_tokens` limited to `room`, and at least 1."""
    return sampling.model_copy(update={"max_new_tokens": max(min(sampling.max_new_tokens, room), 1)})


def _engine(named: str | None, resolved: Resolved | None, policy: Policy) -> Engine:
    """The engine that the command line names, or the recipe's."""
    if named is not None:
        chosen = EngineChoice(engine=named)
        try:
            return engine_for(policy, chosen, bind_engine(chosen, "-", Path.cwd()))
        except RecipeError as error:
            raise RecipeError(str(error).replace("-.", "--", 1)) from error
    if resolved is None:
        return engine_for(policy)
    evaluation, top = resolved.config.evaluation, resolved.config.rollouts
    return make_engine(policy, evaluation.rollouts if evaluation else None, top, "evaluation", resolved.folder)


def _before(folder: str, text: str, sampling: Sampling, n: int, seed: int) -> list[str]:
    """Samples of a model of reversed text: what comes before `text`, in reading order."""
    policy = frozen_policy(folder, backwards=True)
    codec = make_codec(policy.tokenizer)
    group = Group(before_what(codec.ids(text, "the prompt"), policy.tokenizer), ())
    sampling = within(sampling, policy.max_positions - len(group.prompt))
    (found,) = collect(frozen_engine(policy), [group], n, sampling, seed=seed)
    return [policy.tokenizer.decode(list(in_reading_order(c.ids.tolist(), codec.end))) for c in found.completions]


def _scorer_of(resolved: Resolved, policy: Policy) -> Scorer:
    rewards, where = rewards_of(resolved)
    return make_scorer(rewards, where, resolved.folder, judges(resolved, policy, judges_of(resolved, None)))
