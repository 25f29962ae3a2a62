"""Preference pairs from any checkpoint's own samples: `rlpost pairs`."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

from rlpost.data.codec import make_codec
from rlpost.data.dataset import open_dataset
from rlpost.data.fitting import Limit
from rlpost.data.formats import DataRole
from rlpost.errors import RecipeError
from rlpost.inference.checkpoint import frozen_policy, join_ranks, judges_of, located
from rlpost.recipe.resolve import resolve
from rlpost.recipe.specs.pairs import Pairs
from rlpost.run.files import encode_line, write_atomic
from rlpost.stage_evaluation import judges
from rlpost.stages.context import make_engine, make_scorer
from rlpost.stages.pairs import must_have_pairs, preference_rows
from rlpost.usercode.binding import bind


def write_pairs(checkpoint: str, recipe: str, out: str, overrides: Sequence[str]) -> str:
    """Write preference pairs from a checkpoint's samples, as the recipe's first `pairs` stage says; returns `out`.

    Raises:
        RecipeError: the recipe has no enabled `pairs` stage.
    """
    resolved = resolve(recipe, overrides)
    stages = resolved.config.stages
    name = next((n for n, s in stages.items() if isinstance(s, Pairs) and s.enabled), None)
    if name is None:
        raise RecipeError(f"{resolved.file}: it has no enabled stage of kind pairs, which says how to sample them")
    cfg: Pairs = stages[name]
    model = located(checkpoint)
    join_ranks(resolved, model)
    policy = frozen_policy(model, resolved.config.model)
    limit = Limit(policy.max_positions - cfg.sampling.max_new_tokens)
    data = open_dataset(
        cfg.data,
        make_codec(policy.tokenizer),
        need=DataRole.prompts,
        limit=limit,
        seed=resolved.config.seed,
        where=f"stages.{name}.data",
        stages=_no_stage,
        bind=bind,
        base=resolved.folder,
    )
    prompts = data.next(cfg.prompts or len(data))
    scorer = make_scorer(
        cfg.rewards, f"stages.{name}", resolved.folder, judges(resolved, policy, judges_of(resolved, None))
    )
    made = make_engine(policy, cfg.rollouts, resolved.config.rollouts, f"stages.{name}", resolved.folder)
    with closing(made) as engine:
        rows = list(preference_rows(engine, policy, prompts, scorer, cfg, resolved.config.seed, name))
    must_have_pairs(rows, prompts, cfg, name)
    write_atomic(Path(out), b"".join(encode_line(row) for row in rows))
    return out


def _no_stage(name: str) -> Path:
    raise RecipeError(f"rows of stage {name} exist only in a run; sample without that source")
