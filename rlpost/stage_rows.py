"""Reads a stage's rows outside a run: to check and to show them before anything is trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import AutoConfig

from rlpost.data.codec import Codec
from rlpost.data.dataset import Dataset, open_dataset
from rlpost.data.fitting import Limit
from rlpost.data.formats import DataRole
from rlpost.data.params import Source, TooLong
from rlpost.data.part import Shelf
from rlpost.environments.tools import codec_with_tools
from rlpost.errors import RecipeError
from rlpost.policy.adapter_files import base_of, base_revision, is_adapter
from rlpost.policy.model_files import as_model_error
from rlpost.recipe.resolve import Resolved
from rlpost.stages.context import stage_seed
from rlpost.stages.references import readable_references
from rlpost.usercode.binding import bind

ROW_KEYS = ("data", "eval_data", "expert.data")
"""Keys of a stage that hold sources of rows."""


def open_rows(
    resolved: Resolved, name: str, codec: Codec, positions: int, shelf: Shelf | None = None, key: str = "data"
) -> Dataset:
    """The rows of stage `name`, without those that an earlier stage writes; there are some.

    Raises:
        DataError: a row is malformed or too long.
    """
    stage = resolved.config.stages[name]
    need = need_of(stage, key)
    return open_dataset(
        own_sources(stage, key),
        codec_with_tools(codec, stage, f"stages.{name}", resolved.folder),
        need=need,
        limit=_limit(stage, need, positions),
        seed=stage_seed(resolved.config.seed, name, key if "." in key else "data"),
        where=f"stages.{name}.{key}",
        stages=_no_stage,
        bind=bind,
        base=resolved.folder,
        shelf=shelf,
        check=None if "." in key else readable_references(stage, f"stages.{name}", need),
    )


def own_sources(stage: Any, key: str = "data") -> dict[str, Source]:
    """The sources at a key of the stage, without those that an earlier stage writes."""
    *above, last = key.split(".")
    for part in above:
        stage = getattr(stage, part, None)
    return {name: source for name, source in getattr(stage, last, {}).items() if source.stage is None}


def need_of(stage: Any, key: str) -> DataRole:
    """What the rows at a key of the stage are for."""
    section = getattr(stage, "expert", None) if key == "expert.data" else None
    need: DataRole = (section or stage).rows()
    return need


def _limit(stage: Any, need: DataRole, positions: int) -> Limit:
    """The length limit of the stage's rows; a stage that samples leaves room for completions."""
    wanted = getattr(stage, "max_length", positions)
    sampling = getattr(stage, "sampling", None)
    if sampling is not None and need is DataRole.prompts:
        wanted -= sampling.max_new_tokens
    return Limit.within(wanted, positions, getattr(stage, "too_long", TooLong.refuse))


def positions_of(model: str | Path, revision: str | None) -> int:
    """Tokens of the longest sequence that a model, or an adapter's base, has positions for."""
    base = model
    if is_adapter(Path(model)):
        base, revision = base_of(Path(model)), revision or base_revision(Path(model))
    with as_model_error(f"{base}: the model's config.json cannot be read"):
        config = AutoConfig.from_pretrained(base, revision=revision, trust_remote_code=False)
    limit = getattr(config.get_text_config(), "max_position_embeddings", None)
    return int(limit) if limit else 1 << 30


def _no_stage(name: str) -> Path:
    raise RecipeError(f"rows of stage {name} exist only in a run")
