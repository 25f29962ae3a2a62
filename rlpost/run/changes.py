"""Compares the recipe that a run was started with to the one it is resumed with, and says which changes are allowed.

Three kinds of keys: FREE ones change no weight; others take effect from now on, and may change with --allow-change;
and those that earlier training depends on are refused, since the change could not be applied.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

FREE = ("run", "runs", "description", "threads", "vars", "evaluation.show", "logging", "parallel")
"""Keys that change no weight, or by rounding alone: they may differ (`vars` counts where it is used)."""
FREE_IN_STAGES = ("log_every", "table_every", "checkpoint_every", "keep_checkpoints")
"""The same, in every stage."""
LATER = (
    *("evaluation", "folder", "rollouts"),
    *("model.attention", "model.chat_template", "model.gradient_checkpointing", "model.precision"),
)
"""Keys outside the stages that take effect from now on; all others are refused once something was trained."""
FIXED_IN_STAGES = ("kind", "start", "optimizer", "refresh", "recorded", "critic.start", "critic.trunk")
"""Keys of a stage that its checkpoints depend on; the others take effect from its last checkpoint on."""
LENGTHS = ("steps", "epochs")
"""Keys that may make a finished stage longer."""
OF_FILES = ("code of ", "content of ")
"""Prefixes of changes to files that the recipe names; they too take effect from now on."""
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


@dataclass(frozen=True)
class Trained:
    """How far a stage has come."""

    done: bool
    begun: bool
    """There is a checkpoint or a result."""
    extendable: bool
    """There is a checkpoint of its last step."""
    step: int
    """Steps done by its newest checkpoint."""
    folder: str


def refusal(changes: Sequence[Change], stages: Mapping[str, Trained]) -> tuple[Change, str] | None:
    """The first change that cannot be applied, with its reason and remedy; None if all can be applied.

    Args:
        changes: all that differ and are not free.
        stages: how far each has come, those of both recipes, in order.
    """
    found = ((change, _refusal(change, stages)) for change in changes)
    return next(((change, reason) for change, reason in found if reason is not None), None)


def _refusal(change: Change, stages: Mapping[str, Trained]) -> str | None:
    parts = change.key.removeprefix("order of ").split(".")
    if change.key.startswith(OF_FILES) or _below(change.key, LATER):
        return None
    if parts[0] != "stages":
        return "all that was trained stands on it; choose another run=NAME"
    if len(parts) == 1:
        begun = [name for name, stage in stages.items() if stage.begun]
        return f"{', '.join(begun)} were trained in the old order; choose another run=NAME" if begun else None
    name = parts[1]
    stage = stages[name]
    after = _begun_after(name, stages)
    if len(parts) == 2 or parts[2:] == ["enabled"]:
        return f"{_them(after)} trained without this change; {_remove(after, stages)}" if after else None
    if stage.done and (change.key.startswith("order of ") or parts[2] not in LENGTHS or not _longer(change)):
        redo = [name, *after]
        return f"{name} is finished and was trained with the old value; {_remove(redo, stages)}"
    if stage.done and after:
        return f"{_them(after)} trained from {name} as it is; {_remove(after, stages)}"
    if stage.done and not stage.extendable:
        return f"{name} is finished and kept no state to go on from; {_remove([name], stages)}"
    own = ".".join(parts[2:])
    if stage.begun and own == "steps" and change.new != "null" and int(change.new) < stage.step:
        return f"{stage.step} steps are done; {_remove([name], stages)}"
    fixed = change.key.startswith("order of ") or _below(own, FIXED_IN_STAGES) or own.endswith(".direction")
    if stage.begun and fixed:
        return f"the checkpoints of {name} stand on it; {_remove([name], stages)}"
    return None


def _longer(change: Change) -> bool:
    """Whether a stage gets longer; a change from epochs to steps is checked when training starts."""
    old, new = json.loads(change.old), json.loads(change.new)
    return old is None or new is None or new > old


def _begun_after(name: str, stages: Mapping[str, Trained]) -> list[str]:
    order = list(stages)
    return [other for other in order[order.index(name) + 1 :] if stages[other].begun]


def _them(names: Sequence[str]) -> str:
    return f"{', '.join(names)} {'was' if len(names) == 1 else 'were'}"


def _remove(names: Sequence[str], stages: Mapping[str, Trained]) -> str:
    folders = " and ".join(stages[name].folder for name in names)
    return f"choose another run=NAME, or remove {folders} to train {'it' if len(names) == 1 else 'them'} again"


def _below(key: str, names: Sequence[str]) -> bool:
    return any(key == name or key.startswith((f"{name}.", f"{name}[")) for name in names)


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
    """Changes in the order of stages, and of the sources of a mixture, that both recipes have."""
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
