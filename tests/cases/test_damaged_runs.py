"""Every file that a run has, cut, changed, removed, swapped or taken from elsewhere: found and said, or without effect.

Without effect means that the weights of every stage, its logs and its evaluation come out as those of the undamaged
run, bit for bit.
"""

from __future__ import annotations

import collections
import itertools
import random
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from tiny_recipes import DPO, GRPO, LORA, PAIRS, PPO, SFT, sha256, write
from tiny_world import Ran, rlpost

from rlpost.run.manifest import is_note
from rlpost.run.stage import StageDirectory

EVERY = {"steps": 3, "checkpoint_every": 1, "keep_checkpoints": 2}
STAGES = {
    "sft": {**SFT, **EVERY},
    "pairs": {**PAIRS, "prompts": 16},
    "dpo": {**DPO, **EVERY, "data": {"own": {"stage": "pairs"}}},
    "grpo": {**GRPO, **EVERY, "reference": "sft", "kl": {"beta": 0.05}},
    "ppo": {**PPO, **EVERY, "prompts_per_step": 4},
}
EVALUATION = {
    "data": {"held_out": {"task": {"fn": "addition.held_out"}, "limit": 4}},
    "rewards": [{"fn": "rewards.py:digits"}],
    "sampling": {"max_new_tokens": 3},
    "samples": 0,
    "show": 0,
}
WAYS = {"full": (), "lora": (LORA,)}
SHORT = {"sft": STAGES["sft"], "pairs": STAGES["pairs"], "dpo": STAGES["dpo"]}
BYTES = ("cut to 0", "cut to 1", "cut to half", "cut by 1", "a bit flipped", "removed")


@dataclass(frozen=True)
class Damage:
    title: str
    do: Callable[[], None]
    touched: tuple[str, ...]
    """Paths within the run, of files or folders."""


@dataclass
class World:
    """A run in several states, and another of the same recipe with another seed."""

    folder: Path
    words: tuple[object, ...]
    expected: dict[str, str]

    @property
    def run(self) -> Path:
        return self.folder / "runs/run"

    @property
    def other(self) -> Path:
        return self.folder / "runs/other"

    def restore(self, state: str) -> None:
        shutil.rmtree(self.run)
        shutil.copytree(self.folder / "states" / state, self.run)

    def train(self) -> Ran:
        return rlpost(*self.words)


def left(run: Path) -> dict[str, str]:
    """sha256 of what a run is for: results, logs, rollouts, evaluations; and of its records. Model cards are notes."""
    patterns = (
        "*/final/*",
        "base/*",
        "*/metrics.jsonl",
        "*/rollouts/*",
        "evaluation/*.json*",
        "*.yaml",
        "*.json",
        "*.txt",
    )
    found = {path for pattern in patterns for path in run.glob(pattern) if path.is_file() and not is_note(path.name)}
    return {path.relative_to(run).as_posix(): sha256(path) for path in sorted(found)}


def make_world(folder: Path, way: str, stages: dict, stop_in: tuple[str, ...], **top) -> World:
    file = write(folder, stages, **top)
    words = ("train", file, *WAYS[way])
    assert rlpost(*words, "run=other", "seed=1").code == 0
    (folder / "states").mkdir()
    for stage in stop_in:
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(StageDirectory, "log", stopping(StageDirectory.log, stage))
            assert rlpost(*words).code == 130
        shutil.copytree(folder / "runs/run", folder / "states" / stage)
    assert rlpost(*words).code == 0
    shutil.copytree(folder / "runs/run", folder / "states/finished")
    return World(folder, words, left(folder / "runs/run"))


def stopping(log, stage: str):
    """Ctrl-C in the last step of a stage."""

    def stop(self, step, metrics):
        if self.path.name == stage and step == EVERY["steps"]:
            raise KeyboardInterrupt
        log(self, step, metrics)

    return stop


def in_bytes(run: Path, path: Path, draw: random.Random) -> Iterator[Damage]:
    """One file damaged in every way."""
    data = path.read_bytes()
    bit = draw.randrange(max(len(data), 1) * 8)
    flipped = bytearray(data)
    if data:
        flipped[bit // 8] ^= 1 << bit % 8
    contents = {"cut to 0": b"", "cut to 1": data[:1], "cut to half": data[: len(data) // 2], "cut by 1": data[:-1]}
    contents["a bit flipped"] = bytes(flipped)
    name = path.relative_to(run).as_posix()
    for title in BYTES:
        if title == "removed":
            yield Damage(f"{name} {title}", path.unlink, (name,))
        elif contents[title] != data:
            yield Damage(f"{name} {title}", lambda title=title: path.write_bytes(contents[title]) and None, (name,))


def swapped(run: Path, one: Path, two: Path) -> Damage:
    def swap() -> None:
        aside = one.with_name("aside")
        one.rename(aside)
        two.rename(one)
        aside.rename(two)

    names = tuple(p.relative_to(run).as_posix() for p in (one, two))
    return Damage(f"{names[0]} swapped with {names[1]}", swap, names)


def copied(run: Path, source: Path, target: Path) -> Damage:
    def copy() -> None:
        if target.is_dir():
            shutil.rmtree(target)
        if source.is_dir():
            shutil.copytree(source, target)
        else:
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(source, target)

    name = target.relative_to(run).as_posix()
    return Damage(f"{name} replaced by {source.relative_to(run.parent)}", copy, (name,))


def from_elsewhere(run: Path, other: Path) -> Iterator[Damage]:
    """Files and folders swapped within the run, copied within it, and taken from the other run."""
    folders = [*run.glob("*/checkpoints/step-*"), *run.glob("*/final"), run / "base"]
    files = [p for p in run.rglob("*") if p.is_file() and not p.name.startswith(".")]
    by_name = collections.defaultdict(list)
    for path in sorted(files):
        by_name[path.name].append(path)
    for paths in [sorted(folders), *by_name.values()]:
        for one, two in itertools.pairwise(paths):
            if one.is_dir() or one.read_bytes() != two.read_bytes():
                yield swapped(run, one, two)
                yield copied(run, one, two)
    evaluations = sorted(run.glob("evaluation/*.jsonl"))
    for one, two in itertools.pairwise(evaluations):
        for ending in (".json", ".jsonl", ".proof"):
            yield swapped(run, one.with_suffix(ending), two.with_suffix(ending))
    for path in [*sorted(folders), *sorted(files)]:
        source = other / path.relative_to(run)
        if source.exists() and (source.is_dir() or source.read_bytes() != path.read_bytes()):
            yield copied(run, source, path)


def damages(world: World, seed: int) -> list[Damage]:
    """All of them, of the run as it lies there."""
    draw = random.Random(seed)
    files = [p for p in sorted(world.run.rglob("*")) if p.is_file() and p.name not in (".lock", ".pid")]
    found = [d for path in files for d in in_bytes(world.run, path, draw)]
    return found + list(from_elsewhere(world.run, world.other))


def judged(world: World, damage: Damage) -> str:
    """`right`, `refused`, or what went wrong without a word."""
    damage.do()
    ran = world.train()
    if "Traceback" in ran.err:
        return f"{damage.title}: {ran.err[-600:]}"
    if ran.code != 0:
        return "refused" if ran.code in (2, 3, 4, 5) and ran.refused(ran.code, ": ") else f"{damage.title}: {ran}"
    now = left(world.run)
    changed = {name for name in {*now, *world.expected} if now.get(name) != world.expected.get(name)}
    if not changed:
        return "right"
    # A log cannot be made anew: it is told instead.
    told = all(name in ran.err for name in damage.touched if name in changed)
    logs = {name for name in damage.touched if name.endswith("metrics.jsonl") or "/rollouts/" in name}
    if changed <= logs and told:
        return "right"
    return f"{damage.title}: {sorted(changed)} came out different; it said {ran.err[-1500:]}"


def judge(world: World, state: str, number: int, tally) -> None:
    """So many damages of the run in a state, drawn at random; `state` is `finished`, or the stage it stopped in."""
    world.restore(state)
    every = len(damages(world, 0))
    counts: collections.Counter[str] = collections.Counter()
    wrong = []
    for at in random.Random(f"{state}/{every}").sample(range(every), number):
        world.restore(state)
        found = judged(world, damages(world, 0)[at])
        counts[found] += 1
        wrong += [] if found in ("right", "refused") else [f"{state}: {found}"]
    assert not wrong, "\n".join(wrong)
    tally("damaged run files", right=counts["right"], refused=counts["refused"])


def test_some_damages_of_files_of_a_run(tmp_path, tally):
    world = make_world(tmp_path, "full", {"dpo": {**DPO, **EVERY}, "more": {**DPO, **EVERY}}, ("more",))
    judge(world, "more", 10, tally)
    judge(world, "finished", 10, tally)


@pytest.fixture(scope="module", params=WAYS)
def long(request, tmp_path_factory) -> World:
    return make_world(tmp_path_factory.mktemp(request.param), request.param, STAGES, ("ppo",), evaluation=EVALUATION)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize(("state", "number"), [("finished", 70), ("ppo", 45)])
def test_damages_of_every_file_of_a_run(long, state, number, tally):
    judge(long, state, number, tally)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("way", WAYS)
def test_damages_of_a_run_that_has_just_begun(tmp_path, way, tally):
    world = make_world(tmp_path, way, SHORT, ("sft",))
    judge(world, "sft", 40, tally)
