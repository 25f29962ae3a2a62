"""How exactly an update's gradient and metrics stay the same however the update is cut: stage by stage.

    python scripts/invariance.py                # every stage
    python scripts/invariance.py grpo kto

Cut by max_tokens_per_microbatch into parts of about 1, 3 or 8 completions, its groups in another order, prompts
computed once or again for each completion, on flat or padded rows, and spread over two, three and more processes than
there is work for; against one pass over all of it.
"""

from __future__ import annotations

import argparse
import random
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from multiprocessing import set_forkserver_preload
from pathlib import Path
from typing import Any, NamedTuple

import torch
from stage_updates import CASES, Case, Measured
from torch import multiprocessing
from worlds import Memory, World

from rlpost import ranks
from rlpost.objectives.weights import token_mean
from rlpost.train.experience import Experience
from rlpost.train.learner import Learner
from rlpost.types import completions


@dataclass(frozen=True)
class Cut:
    """One way to compute an update."""

    at_once: int | None = None
    """Completions a pass, about; None for all of them."""
    layout: str = "shared"
    shuffled: bool = False


WHOLE = Cut()
CUTS = (
    Cut(1, shuffled=True),
    Cut(3),
    Cut(8, shuffled=True),
    Cut(8, "apart"),
    Cut(3, "padded", shuffled=True),
    Cut(None, "padded"),
)
FEWER = (Cut(8, "apart", shuffled=True), Cut(8, "padded"))
"""For models whose rounding is coarser anyway."""
PROCESSES = (2, 3, 6)
"""Of the last ones some have nothing to do."""
SHORT = 30
"""Tokens that fit into the memory of the second of two processes, half of what it is asked for."""
LONE_GROUP = 1
"""The group of which all rewards are equal."""


class Gap(NamedTuple):
    """How far one way is from the other."""

    gradient: float
    """‖difference‖ / ‖gradient‖ over all parameters."""
    metrics: float
    """Largest difference of a metric, relative to those above 1."""


def gap(found: Measured, expected: Measured) -> Gap:
    """The errors of `found`; metrics must have the same names."""
    (vector, metrics), (right, known) = found, expected
    assert metrics.keys() == known.keys(), metrics.keys() ^ known.keys()
    errors = [abs(metrics[name] - x) / max(abs(x), 1.0) for name, x in known.items()]
    return Gap(float((vector - right).norm() / right.norm()), max(errors))


def budget(case: Case, at_once: int | None, shares_prompts: bool) -> int:
    """Tokens of so many completions of mean length, with their prompts; one token stands for one completion."""
    repeats = [1 if shares_prompts else len(g.completions) for g in case.groups]
    prompts = sum(n * len(g.prompt) for n, g in zip(repeats, case.groups, strict=True))
    every = completions(case.groups)
    tokens = prompts + sum(len(c.ids) for c in every)
    return tokens if at_once is None else 1 if at_once == 1 else at_once * tokens // len(every)


def measured(case: Case, world: World, cut: Cut) -> tuple[Measured, int]:
    """The gradient and the metrics of the update; and the passes of one process."""
    model = world.scalar(cut.layout) if case.scalar else world.policy(cut.layout)
    tokens = budget(case, cut.at_once, model.shares_prompts)
    learner = Learner(model, learning_rate=1.0, max_tokens_per_microbatch=tokens, whole_groups=case.whole_groups)
    everyone = list(range(len(case.groups)))
    order = random.Random(1).sample(everyone, len(everyone)) if cut.shuffled else everyone
    update = case.prepare(order, learner)
    parts = update.experience.cut(tokens, whole_groups=case.whole_groups, shared_prompts=model.shares_prompts)
    return case.measure(learner, update), len(parts)


def whole(case: Case, world: World) -> Measured:
    """What every cut is compared with."""
    return measured(case, world, WHOLE)[0]


def worst(gaps: Sequence[Gap]) -> Gap:
    """The largest of each error."""
    return Gap(*(max(column) for column in zip(*gaps, strict=True)))


def worst_gap(case: Case, world: World, cuts: Sequence[Cut]) -> Gap:
    """Over the cuts, in one process."""
    expected = whole(case, world)
    return worst([gap(measured(case, world, cut)[0], expected) for cut in cuts])


def two_steps(world: World, memory: int | None = None) -> Measured:
    """Weights after two updates and the metrics of both; some groups have nothing to teach in the second one.

    With `memory` passes over more tokens fail, and the budget is lowered for it.
    """
    policy = World(world.family, world.dtype).policy()
    limit = None if memory is None else Memory(policy, memory)
    learner = Learner(policy, learning_rate=1e-2, max_grad_norm=0.1, max_tokens_per_microbatch=60)
    lines: dict[str, float] = {}

    def loss(scores: Any, part: Experience) -> Any:
        return -(scores.logp_N * part["weight"]).sum(), {"nll": -scores.logp_N.detach()}

    for step in range(2):
        experience = Experience(tuple(world.groups))
        rows = experience.rows
        experience = experience.with_actions(weight=token_mean(rows, rows.actions))
        if step:
            needed = tuple(g != LONE_GROUP for g, group in enumerate(world.groups) for _ in group.completions)
            experience = replace(experience, needed_S=needed)
        lines |= {f"{name}/{step}": x for name, x in learner.update(loss, experience).items()}
    assert limit is None or limit.failed == 1, "the smaller budget stays"
    return learner.flat_weights(), lines


def _rank(rank: int, count: int, folder: str, names: Sequence[str]) -> None:
    """One of some processes: what it finds of every case, in a file."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", f"file://{folder}/meeting", rank=rank, world_size=count)
    ranks.join()
    world = World("gpt2", torch.float64)
    found = {name: measured(CASES[name](world), world, Cut(3))[0] for name in names}
    found["steps"] = two_steps(world)
    if count == 2:
        found["short"] = two_steps(world, memory=SHORT if rank else None)
    torch.save(found, Path(folder, f"rank{rank}"))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def on_processes(count: int, names: Sequence[str]) -> list[dict[str, Measured]]:
    """What each of some processes that share the updates finds: GPT-2 in float64, by case."""
    with tempfile.TemporaryDirectory() as folder:
        # Forked from a server that has imported what takes long.
        set_forkserver_preload(["rlpost.pipeline"])
        multiprocessing.start_processes(_rank, (count, folder, list(names)), nprocs=count, start_method="forkserver")
        return [torch.load(Path(folder, f"rank{rank}")) for rank in range(count)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    stages = sorted({name.split()[0] for name in CASES})
    parser.add_argument("stages", nargs="*", default=stages, help=", ".join(stages))
    wanted = parser.parse_args().stages
    names = [name for name in CASES if name.split()[0] in wanted]
    worlds = [World("gpt2", torch.float64), World("llama", torch.float64), World("llama", torch.float32)]
    headings = ["gpt2 float64", "processes", "llama float64", "llama float32"]
    print(f"{'worst relative error':24}" + "".join(f"{heading:>18}" for heading in headings))
    print(f"{'':24}" + len(headings) * f"{'gradient':>10}{'metrics':>8}")
    found = [everything for count in PROCESSES for everything in on_processes(count, names)]
    for name in names:
        expected = whole(CASES[name](worlds[0]), worlds[0])
        gaps = [worst_gap(CASES[name](world), world, CUTS) for world in worlds]
        gaps.insert(1, worst([gap(everything[name], expected) for everything in found]))
        print(f"{name:24}" + "".join(f"{g.gradient:10.0e}{g.metrics:8.0e}" for g in gaps), flush=True)


if __name__ == "__main__":
    main()
