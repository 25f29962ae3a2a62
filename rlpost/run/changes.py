"""What changed between the recipe a run was started with and the one it is continued with."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

FREE = ("run", "runs", "description", "threads", "vars", "evaluation.show")
"""Keys that change no weight: they may differ (`vars` counts where it is used)."""
FREE_IN_STAGES = ("log_every", "table_every", "checkpoint_every", "keep_checkpoints")
"""The same, in every stage."""
_SHOWN = 5
_WIDTH = 60
_ABSENT = "(absent)"


@dataclass(frozen=True)
class Change:
    """One setting that differs."""

    key: str
    """Full path, as in an override: `stages.sft.learning_rate`, `stages.grpo.rewards[0].weight`."""
    old: str
    new: str

    def __str__(self) -> str:
        return f"{self.key}: {_short(self.old)} -> {_short(self.new)}"


def one_line(changes: Sequence[Change]) -> str:
    """The first five changes, and how many there are more."""
    text = "; ".join(str(change) for change in changes[:_SHOWN])
    more = len(changes) - _SHOWN
    return f"{text} (+{more} more)" if more > 0 else text


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[Change]:
    """Every setting that differs and is not free, in the new recipe's order.

    A stage that only one of them has is one change; so is another order of stages or of a mixture's sources.
    """
    before, after = dict(_leaves(old)), dict(_leaves(new))
    lone = set(old.get("stages") or {}) ^ set(new.get("stages") or {})
    changes: dict[str, Change] = {}
    for key in [*after, *(key for key in before if key not in after)]:
        parts = key.split(".")
        if parts[0] == "stages" and parts[1] in lone:
            stage = f"stages.{parts[1]}"
            changes[stage] = Change(stage, _kind(old, parts[1]), _kind(new, parts[1]))
        elif not is_free(key) and before.get(key) != after.get(key):
            changes[key] = Change(key, before.get(key, _ABSENT), after.get(key, _ABSENT))
    return [*changes.values(), *_orders(old, new)]


def _orders(old: Mapping[str, Any], new: Mapping[str, Any], key: str = "") -> Iterator[Change]:
    """Changed order of what both have of stages, and of the sources of a mixture."""
    common = [name for name in new if name in old]
    if key == "stages" or key.endswith(".data"):
        before, after = [name for name in old if name in new], common
        if before != after:
            yield Change(f"order of {key}", ", ".join(before), ", ".join(after))
    for name in common:
        if isinstance(old[name], Mapping) and isinstance(new[name], Mapping):
            yield from _orders(old[name], new[name], f"{key}.{name}" if key else str(name))


def is_free(key: str) -> bool:
    """Whether the key may differ between the two recipes."""
    if any(key == free or key.startswith(f"{free}.") for free in FREE):
        return True
    parts = key.split(".")
    return len(parts) == 3 and parts[0] == "stages" and parts[2] in FREE_IN_STAGES


def _kind(recipe: Mapping[str, Any], stage: str) -> str:
    found = (recipe.get("stages") or {}).get(stage)
    return _ABSENT if found is None else f"a stage of kind {found.get('kind')}"


def _leaves(value: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """Key path -> value as JSON, for every leaf; empty mappings and lists have none."""
    if isinstance(value, Mapping):
        for name, item in value.items():
            yield from _leaves(item, f"{key}.{name}" if key else str(name))
    elif isinstance(value, list):
        for index, item in enumerate(value):
            yield from _leaves(item, f"{key}[{index}]")
    else:
        yield key, json.dumps(value, ensure_ascii=False, default=str)


def _short(text: str) -> str:
    return text if len(text) <= _WIDTH else f"{text[: _WIDTH - 1]}…"
