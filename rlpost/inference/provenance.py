"""Where a checkpoint comes from, read from its run: base model, stages, data, evaluation, licence."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from rlpost.policy.adapter_files import base_of, base_revision, is_adapter, read_json_object
from rlpost.policy.model_files import hub_file
from rlpost.run.files import read_json
from rlpost.run.lookup import read_config
from rlpost.run.names import ABOUT, BASE, CONFIG, EVALUATION, FINAL

UNKNOWN = "unknown"
_DEPTH = 20
"""Runs in a chain, each from the last one's result, at most."""


@dataclass(frozen=True)
class Provenance:
    """What is known of a checkpoint."""

    base: str
    """The model that training began with: its hub name, the name of its folder, or what it was made as."""
    on_hub: bool
    from_scratch: bool
    """It was made with random weights."""
    licence: str
    """Of the base, an identifier; `unknown` where neither its card nor its folder says."""
    stages: dict[str, dict[str, Any]] = field(default_factory=dict)
    """The stages that led to it, in order: name -> its section of the resolved recipe."""
    model: dict[str, Any] = field(default_factory=dict)
    """The resolved recipe's `model`."""
    results: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Evaluations of its run, of the base and of the stages up to it: name -> numbers."""
    evaluation: dict[str, Any] = field(default_factory=dict)
    """The resolved recipe's `evaluation`."""

    @property
    def datasets(self) -> list[str]:
        """The data sets on the hub that stages were trained on."""
        sources = [s for stage in self.stages.values() for s in sources_of(stage) if s.get("path")]
        return list(dict.fromkeys(str(s["path"]) for s in sources if is_hub_name(str(s["path"]))))


def provenance(checkpoint: Path) -> Provenance:
    """What the run of a checkpoint, and the runs it began with, say about it."""
    run, stage = _run_of(checkpoint)
    revision = base_revision(checkpoint) if is_adapter(checkpoint) else None
    if run is None:
        base = base_of(checkpoint) if is_adapter(checkpoint) else str(checkpoint)
        return Provenance(_shown(base), is_hub_name(base), False, licence_of(base, revision))
    config = read_config(run)
    base, earlier, from_scratch = _origin(run, config)
    names = list(_until(config["stages"], stage))
    own = {name: config["stages"][name] for name in names if name == stage or not _makes_rows(run, name)}
    measured = [BASE, *(n for n in names if n != stage or checkpoint.resolve().name == FINAL)]
    files = {name: run / EVALUATION / f"{name}.json" for name in measured}
    return Provenance(
        base=_shown(base),
        on_hub=is_hub_name(base),
        from_scratch=from_scratch,
        licence=licence_of(base, revision or (config.get("model") or {}).get("revision")),
        stages={**earlier, **own},
        model=config.get("model") or {},
        results={name: read_json(file) for name, file in files.items() if file.is_file()},
        evaluation=config.get("evaluation") or {},
    )


def sources_of(stage: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """The sources of rows in a stage's section."""
    data = stage.get("data")
    yield from (s for s in (data.values() if isinstance(data, dict) else ()) if isinstance(s, dict))


def is_hub_name(model: str) -> bool:
    """Whether it is `owner/name`, and no folder here."""
    parts = model.split("/")
    return len(parts) == 2 and all(parts) and not model.startswith((".", "~")) and not Path(model).exists()


def licence_of(base: str, revision: str | None = None) -> str:
    """The licence that a model's card names; `see LICENSE` beside such a file; else `unknown`."""
    folder = Path(base)
    found = folder / "README.md" if folder.is_dir() else None
    if found is None and is_hub_name(base):
        there = hub_file(base, "README.md", revision)
        found = Path(there) if there else None
    if found is not None and found.is_file():
        named = _front_matter(found).get("license")
        if isinstance(named, str) and named:
            return named
    if folder.is_dir() and any(folder.glob("LICENSE*")):
        return "see LICENSE"
    return UNKNOWN


def _front_matter(card: Path) -> dict[str, Any]:
    """The YAML at the head of a model card; empty where there is none that can be read."""
    parts = card.read_text("utf-8", errors="replace").split("---\n", 2)
    if len(parts) < 3 or parts[0].strip():
        return {}
    try:
        found = yaml.safe_load(parts[1])
    except yaml.YAMLError:
        return {}
    return found if isinstance(found, dict) else {}


def _run_of(checkpoint: Path) -> tuple[Path | None, str]:
    """The run that a checkpoint lies in, and its stage; (None, "") for one outside a run."""
    folder = checkpoint.resolve()
    for parent in folder.parents:
        if (parent / CONFIG).is_file():
            return parent, folder.relative_to(parent).parts[0]
    return None, ""


def _origin(run: Path, config: Mapping[str, Any], depth: int = 0) -> tuple[str, dict[str, dict[str, Any]], bool]:
    """The model that a chain of runs began with, the stages of the runs before this one, and whether it was random."""
    model = config.get("model") or {}
    path = model.get("path")
    if not path:
        family = (model.get("config") or {}).get("model_type", "model")
        return f"a {family} with random weights", {}, True
    folder = Path(path)
    before, stage = _run_of(folder) if folder.is_dir() else (None, "")
    if before is None and (folder / CONFIG).is_file():
        before, stage = folder, ""
    if before is None or before == run or depth >= _DEPTH:
        if folder.is_dir() and (folder / ABOUT).is_file():
            path = read_json_object(folder / ABOUT).get("base") or path
        return str(path), {}, False
    earlier = read_config(before)
    base, first, from_scratch = _origin(before, earlier, depth + 1)
    stages = {n: s for n, s in earlier["stages"].items() if n in _until(earlier["stages"], stage)}
    return (
        base,
        {**first, **{f"{before.name}/{n}": s for n, s in stages.items() if not _makes_rows(before, n)}},
        from_scratch,
    )


def _until(stages: Mapping[str, Any], last: str) -> list[str]:
    """The enabled stages up to `last`, or all of them where it is none of them."""
    names = [n for n, s in stages.items() if s.get("enabled", True) or n == last]
    return names[: names.index(last) + 1] if last in names else names


def _makes_rows(run: Path, stage: str) -> bool:
    return not any((run / stage / FINAL / name).exists() for name in ("config.json", "adapter_config.json"))


def _shown(base: str) -> str:
    """A hub name, or the last part of a path: a card tells nobody about folders of its author's."""
    return base if not Path(base).exists() else json.dumps(Path(base).resolve().name)[1:-1]
