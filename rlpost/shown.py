"""What `show --rows` shows: the first rows of each stage as the model sees them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from statistics import median
from typing import Any

from transformers import AutoConfig

from rlpost import console
from rlpost.data.codec import make_codec
from rlpost.data.dataset import open_dataset
from rlpost.data.formats import Need
from rlpost.data.part import Limit
from rlpost.errors import RecipeError
from rlpost.groups import Group
from rlpost.pipeline import need_of, scratch_tokenizer
from rlpost.policy.adapter_files import ADAPTER_FILE, base_of
from rlpost.policy.model_files import load_tokenizer, told_as_model_error, with_chat_template
from rlpost.recipe.functions import bind
from rlpost.recipe.resolve import Resolved
from rlpost.recipe.schema import TooLong
from rlpost.run.lookup import find_checkpoint


def show_rows(resolved: Resolved, n: int) -> list[str]:
    """Lines that show the first `n` rows of each stage as it reads them, and lengths in tokens.

    What is trained is marked: in colour on a terminal, between » and « elsewhere. Completions that are compared, or
    judged, have their judgement before them.
    """
    lines: list[str] = []
    tokenizer: Any = None
    for name, stage in resolved.config.stages.items():
        sources = {k: s for k, s in stage.data.items() if s.stage is None}
        if not stage.enabled or not sources:
            continue
        tokenizer = tokenizer or _tokenizer(resolved)
        need = need_of(stage, name, resolved.folder)
        data = open_dataset(
            sources,
            make_codec(tokenizer),
            need=need,
            limit=_limit(stage, need, _positions(resolved)),
            seed=resolved.config.seed,
            where=f"stages.{name}.data",
            stages=_no_stage,
            bind=bind,
            base=resolved.folder,
        )
        lines += [f"stages.{name}", *(f"  {console.clean(line)}" for line in data.notices)]
        lines += _lines(tokenizer, data.all(), need, n)
    return lines


def _lines(tokenizer: Any, groups: Sequence[Group], need: Need, n: int) -> Iterator[str]:
    yield "  " + _lengths("prompt", [len(g.prompt) for g in groups])
    completions = [c for g in groups for c in g.completions]
    if completions:
        yield "  " + _lengths("completion", [len(c.ids) for c in completions])
        yield "  " + _lengths("trained", [c.actions for c in completions])
    for group in groups[:n]:
        yield from _shown(tokenizer, group, need)


def _shown(tokenizer: Any, group: Group, need: Need) -> Iterator[str]:
    prompt = console.clean(tokenizer.decode(list(group.prompt)), "⏎")
    if not group.completions:
        yield f"  {prompt}"
    for c, judged in zip(group.completions, _judgements(group, need), strict=True):
        text = prompt
        start = 0
        while start < len(c.ids):
            end = start
            while end < len(c.ids) and c.action[end] == c.action[start]:
                end += 1
            piece = console.clean(tokenizer.decode(list(c.ids[start:end])), "⏎")
            text += console.marked(piece) if c.action[start] else piece
            start = end
        yield f"  {judged}{text}"


def _judgements(group: Group, need: Need) -> list[str]:
    """What the row says of each completion, to stand before it."""
    row, several = group.example, len(group.completions)
    if need is Need.pairs:
        return ["chosen:   ", "rejected: "]
    if need is Need.ranked:
        return [f"score {'none' if score is None else f'{score:g}'}: " for score in row["scores"]]
    if need is Need.labelled:
        return [f"label {str(row['label']).lower()}: "]
    if need is Need.steps:
        return [f"labels {', '.join(f'{label:g}' for label in row['labels'])}: "]
    if need is Need.recorded:
        rewards = row["recorded_rewards"]
        return [f"reward {'none' if reward is None else f'{reward:g}'}: " for reward in rewards]
    return [f"{i}: " for i in range(1, several + 1)] if several > 1 else [""] * several


def _limit(stage: Any, need: Need, positions: int) -> Limit:
    """How long the stage's rows may be; where it samples, prompts leave room for what is sampled."""
    longest = min(getattr(stage, "max_length", positions), positions)
    sampling = getattr(stage, "sampling", None)
    if sampling is not None and need is Need.prompts:
        longest = min(getattr(stage, "max_length", positions) - sampling.max_new_tokens, positions)
    return Limit(longest, getattr(stage, "too_long", TooLong.refuse))


def _positions(resolved: Resolved) -> int:
    """Tokens of the longest sequence that the model has positions for."""
    model = resolved.config.model
    if model.path is None:
        limit = model.config.get("max_position_embeddings")
    else:
        folder = find_checkpoint(model.path) or model.path
        base = base_of(folder) if not isinstance(folder, str) and (folder / ADAPTER_FILE).is_file() else folder
        with told_as_model_error(f"{base}: the model's config.json cannot be read"):
            config = AutoConfig.from_pretrained(base, revision=model.revision, trust_remote_code=False)
        limit = getattr(config.get_text_config(), "max_position_embeddings", None)
    return int(limit) if limit else 1 << 30


def _lengths(what: str, lengths: Sequence[int]) -> str:
    return f"{what} tokens: least {min(lengths)}, median {median(lengths):g}, most {max(lengths)}"


def _tokenizer(resolved: Resolved) -> Any:
    model = resolved.config.model
    if model.path is None:
        return with_chat_template(scratch_tokenizer(resolved), model)
    return load_tokenizer(str(find_checkpoint(model.path) or model.path), model)


def _no_stage(name: str) -> Any:
    raise RecipeError(f"rows of stage {name} exist only in a run; show without that source")
