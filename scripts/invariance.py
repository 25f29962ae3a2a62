"""How exactly an update's gradient and metrics stay the same however the update is cut: stage by stage.

    python scripts/invariance.py                # every stage
    python scripts/invariance.py grpo kto
    python scripts/invariance.py --shards       # one process against several with weights in shards
    python scripts/invariance.py --ranks        # one process against two and three, as a table

Cut by max_tokens_per_microbatch into parts of about 1, 3 or 8 completions, its groups in another order, prompts
computed once or again for each completion, on flat or padded rows, and spread over two, three and more processes than
there is work for; against one pass over all of it.
"""

from __future__ import annotations

import argparse
import random
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from multiprocessing import set_forkserver_preload
from pathlib import Path
from typing import Any, NamedTuple

import torch
from stage_updates import CASES, Case, Measured, Update
from torch import Tensor, multiprocessing
from torch.distributed.tensor import DTensor
from worlds import Memory, World

from rlpost import ranks
from rlpost.objectives.weights import token_mean
from rlpost.policy import sharded
from rlpost.policy.sharded import Shards
from rlpost.policy.value_head import ValueHeadModel
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
    shards: bool = False
    """The trained weights are in shards over the ranks."""


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
RATE = 1e-3
"""Learning rate, where weights are changed."""
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
    learner, update = _prepared(case, world, cut)
    shared = learner.model.shares_prompts
    tokens = budget(case, cut.at_once, shared)
    parts = update.experience.cut(tokens, whole_groups=case.whole_groups, shared_prompts=shared)
    vector, metrics = case.measure(learner, update)
    return (of_all_ranks(learner, vector), metrics), len(parts)


def in_shards(model: Any) -> Any:
    """The model with its weights in shards over all ranks."""
    device = torch.device("cpu")
    Shards(ranks.mesh(device), device).apply(model.trunk if isinstance(model, ValueHeadModel) else model)
    return model


def of_all_ranks(learner: Learner, vector: Tensor) -> Tensor:
    """A vector as the learner gives it, of whole weights: where they are in shards, it has this rank's parts."""
    parameters = list(learner.model.trained().values())
    pieces = vector.split([sharded.local(p).numel() for p in parameters])
    return torch.cat([_whole(piece, p).flatten() for piece, p in zip(pieces, parameters, strict=True)])


def _whole(piece: Tensor, of: Tensor) -> Tensor:
    if not isinstance(of, DTensor):
        return piece
    own = piece.view_as(of.to_local())
    return DTensor.from_local(own, of.device_mesh, of.placements, shape=of.shape, stride=of.stride()).full_tensor()


def _prepared(case: Case, world: World, cut: Cut) -> tuple[Learner, Update]:
    model = world.scalar(cut.layout) if case.scalar else world.policy(cut.layout)
    if cut.shards:
        in_shards(model)
    tokens = budget(case, cut.at_once, model.shares_prompts)
    learner = Learner(model, learning_rate=RATE, max_tokens_per_microbatch=tokens, whole_groups=case.whole_groups)
    everyone = list(range(len(case.groups)))
    order = random.Random(1).sample(everyone, len(everyone)) if cut.shuffled else everyone
    return learner, case.prepare(order, learner)


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


def moved(case: Case, world: World, cut: Cut) -> Tensor:
    """How the weights have changed after five updates with the same tokens, as one vector; the world stays as it is."""
    learner, update = _prepared(case, world, cut)
    before = learner.flat_weights()
    for _ in range(5):
        case.step(learner, update)
    change = of_all_ranks(learner, learner.flat_weights() - before)
    learner.set_weights(before)
    return change


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


class Way(NamedTuple):
    """One column of the table, full or with LoRA."""

    dtype: torch.dtype
    lora: bool

    @property
    def world(self) -> World:
        """Its models."""
        return World("gpt2", self.dtype, lora=self.lora)


WAYS = tuple(Way(dtype, lora) for lora in (False, True) for dtype in (torch.float64, torch.float32))


def _rank(rank: int, count: int, folder: str, work: Callable[[], Any]) -> None:
    """One of some processes: what it finds, in a file."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", f"file://{folder}/meeting", rank=rank, world_size=count)
    ranks.join()
    torch.save(work(), Path(folder, f"rank{rank}"))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def on_processes(count: int, work: Callable[[], Any]) -> list[Any]:
    """What each of some processes finds that share the work."""
    with tempfile.TemporaryDirectory() as folder:
        # Forked from a server that has imported what takes long.
        set_forkserver_preload(["rlpost.pipeline"])
        multiprocessing.start_processes(_rank, (count, folder, work), nprocs=count, start_method="forkserver")
        return [torch.load(Path(folder, f"rank{rank}")) for rank in range(count)]


def every_gradient(names: Sequence[str]) -> dict[str, Measured]:
    """The gradient of every case and two steps: GPT-2 in float64."""
    world = World("gpt2", torch.float64)
    found = {name: measured(CASES[name](world), world, Cut(3))[0] for name in names}
    found["steps"] = two_steps(world)
    if ranks.count() == 2:
        found["short"] = two_steps(world, memory=SHORT if ranks.index() else None)
    return found


def every_way(names: Sequence[str], ways: Sequence[Way], cut: Cut) -> dict[tuple[str, int], tuple[Measured, Tensor]]:
    """By case and number of the way: its gradient and metrics, and the change by five updates."""
    found = {}
    for number, way in enumerate(ways):
        world = way.world
        for name in names:
            case = CASES[name](world)
            found[name, number] = (measured(case, world, cut)[0], moved(case, world, cut))
    return found


class Distance(NamedTuple):
    """How far several processes are from one."""

    gradient: float
    """Of the gradient, as a share of its norm."""
    weights: float
    """Of the weights after five updates, as a share of how far they moved."""


def distances(
    names: Sequence[str], ways: Sequence[Way], counts: Sequence[int], *, shards: bool = False
) -> dict[tuple[str, int], Distance]:
    """The worst over all ranks of so many processes, by case and number of the way."""
    expected = every_way(names, ways, WHOLE)
    work = partial(every_way, names, ways, Cut(3, shards=shards))
    found = [one for count in counts for one in on_processes(count, work)]
    far: dict[tuple[str, int], Distance] = {}
    for key, (known, change) in expected.items():
        gradients = [gap(one[key][0], known).gradient for one in found]
        weights = [float((one[key][1] - change).norm() / change.norm()) for one in found]
        far[key] = Distance(max(gradients), max(weights))
    return far


def table(names: Sequence[str], *, shards: bool) -> str:
    """A row a stage, full and with LoRA: the worst of its cases."""
    far = distances(names, WAYS, (2, 3), shards=shards)
    lines = [
        "| stage | trained | gradient, float64 | gradient, float32 | weights, float64 | weights, float32 |",
        "|---|---|---|---|---|---|",
    ]
    for stage in dict.fromkeys(name.split()[0] for name in names):
        own = [name for name in names if name.split()[0] == stage]
        for lora in (False, True):
            numbers = [number for number, way in enumerate(WAYS) if way.lora == lora]
            cells = [max(far[name, n][what] for name in own) for what in range(2) for n in numbers]
            lines.append(f"| `{stage}` | {'LoRA' if lora else 'all'} | " + " | ".join(f"{x:.0e}" for x in cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    stages = sorted({name.split()[0] for name in CASES})
    parser.add_argument("stages", nargs="*", default=stages, help=", ".join(stages))
    parser.add_argument("--ranks", action="store_true", help="the table of one process against several")
    parser.add_argument("--shards", action="store_true", help="that table with weights in shards")
    args = parser.parse_args()
    names = [name for name in CASES if name.split()[0] in args.stages]
    if args.ranks or args.shards:
        # That case's vector is drawn by each rank for its own part.
        print(table([name for name in names if not (args.shards and name == "trpo fisher")], shards=args.shards))
        return
    worlds = [World("gpt2", torch.float64), World("llama", torch.float64), World("llama", torch.float32)]
    headings = ["gpt2 float64", "processes", "llama float64", "llama float32"]
    print(f"{'worst relative error':24}" + "".join(f"{heading:>18}" for heading in headings))
    print(f"{'':24}" + len(headings) * f"{'gradient':>10}{'metrics':>8}")
    found = [one for count in PROCESSES for one in on_processes(count, partial(every_gradient, names))]
    for name in names:
        expected = whole(CASES[name](worlds[0]), worlds[0])
        gaps = [worst_gap(CASES[name](world), world, CUTS) for world in worlds]
        gaps.insert(1, worst([gap(everything[name], expected) for everything in found]))
        print(f"{name:24}" + "".join(f"{g.gradient:10.0e}{g.metrics:8.0e}" for g in gaps), flush=True)


if __name__ == "__main__":
    main()
