"""Weights in shards: whether an update stays the same, and what each rank keeps.

    python scripts/sharding.py              # every stage's gradient on 2, 3 and 6 ranks, and bytes on 1, 2 and 4
    python scripts/sharding.py --bytes      # bytes alone

Ranks are processes that meet by gloo, each with one thread. The expected gradient is that of one process with whole
weights, in one pass.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from families import COMMON, EndTokenOnly
from invariance import PROCESSES, budget, gap, in_shards, on_processes, whole, worst
from stage_updates import CASES, Case, Measured, gradient
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM
from worlds import World

from rlpost.objectives.weights import token_mean
from rlpost.policy.policy import Policy
from rlpost.policy.sharded import local
from rlpost.policy.sharded import whole as gathered
from rlpost.train.experience import Experience
from rlpost.train.learner import Learner

COUNTS = (1, 2, 4)
FAMILIES = ("gpt2", "llama")


def update_of(case: Case, world: World, *, sharded: bool = True) -> tuple[Learner, Any]:
    """A learner of the case's model, and the update, in parts of about three completions."""
    model = world.scalar("shared") if case.scalar else world.policy("shared")
    if sharded:
        in_shards(model)
    tokens = budget(case, 3, model.shares_prompts)
    learner = Learner(model, learning_rate=1e-2, max_tokens_per_microbatch=tokens, whole_groups=case.whole_groups)
    return learner, case.prepare(list(range(len(case.groups))), learner)


def names_of_gradients() -> list[str]:
    """The cases whose measure is the gradient."""
    world = World("gpt2", torch.float64)
    return [name for name, make in CASES.items() if make(world).measure is gradient]


def gradients(
    names: Sequence[str], families: Sequence[str] = FAMILIES, dtype: torch.dtype = torch.float64
) -> dict[tuple[str, str], Measured]:
    """By family and case: the gradient of whole tensors, and the metrics."""
    found = {}
    for family in families:
        for name in names:
            world = World(family, dtype)
            learner, update = update_of(CASES[name](world), world)
            metrics = learner.gradient(update.loss, update.experience, update.stats)
            vector = torch.cat([gathered(p.grad).flatten() for p in learner.model.trained().values()])
            found[family, name] = vector, metrics
    return found


def steps(family: str, dtype: torch.dtype, count: int, *, sharded: bool = True) -> tuple[Tensor, dict[str, float]]:
    """Whole weights after some updates by AdamW with clipping, and the metrics of all."""
    world = World(family, dtype)
    policy = World(family, dtype).policy()
    learner = Learner(
        in_shards(policy) if sharded else policy, learning_rate=1e-3, max_grad_norm=0.1, max_tokens_per_microbatch=30
    )

    def loss(scores: Any, part: Experience) -> Any:
        return -(scores.logp_N * part["weight"]).sum(), {"nll": -scores.logp_N.detach()}

    lines: dict[str, float] = {}
    experience = Experience(tuple(world.groups))
    rows = experience.rows
    experience = experience.with_actions(weight=token_mean(rows, rows.actions))
    for step in range(count):
        lines |= {f"{name}/{step}": x for name, x in learner.update(loss, experience).items()}
    return torch.cat([gathered(p.detach()).flatten() for p in learner.model.trained().values()]), lines


def llama(width: int, layers: int) -> Any:
    """A Llama of that size."""
    sizes = {"hidden_size": width, "intermediate_size": 4 * width, "num_hidden_layers": layers}
    return AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **{**COMMON, **sizes}))


def bytes_kept(width: int = 256, layers: int = 6) -> dict[str, int]:
    """Of a Llama: bytes of weights, gradients and optimiser state that this rank keeps after an update."""
    policy = in_shards(Policy(llama(width, layers), EndTokenOnly(), flat=False))
    learner = Learner(policy, learning_rate=1e-3)
    experience = Experience(tuple(World("llama", torch.float32).groups))
    rows = experience.rows
    experience = experience.with_actions(weight=token_mean(rows, rows.actions))
    learner.update(lambda scores, part: (-(scores.logp_N * part["weight"]).sum(), {}), experience)
    kinds = {
        "weights": list(policy.parameters()),
        "gradients": [p.grad for p in policy.parameters() if p.grad is not None],
        "optimiser": list(learner.optimizer_state().values()),
    }
    return {kind: sum(local(x).numel() * x.element_size() for x in every) for kind, every in kinds.items()}


def print_bytes() -> None:
    found = {count: on_processes(count, bytes_kept) for count in COUNTS}
    print(f"{'largest rank, MiB':20}" + "".join(f"{f'{count} ranks':>12}" for count in COUNTS))
    for kind in found[1][0]:
        row = [max(kept[kind] for kept in found[count]) / 2**20 for count in COUNTS]
        print(f"{kind:20}" + "".join(f"{mib:12.2f}" for mib in row))


def print_gradients() -> None:
    names = names_of_gradients()
    every = [found for count in PROCESSES for found in on_processes(count, partial(gradients, names))]
    print(f"{'worst relative error':24}" + "".join(f"{family:>18}" for family in FAMILIES))
    print(f"{'':24}" + len(FAMILIES) * f"{'gradient':>10}{'metrics':>8}")
    for name in names:
        line = f"{name:24}"
        for family in FAMILIES:
            world = World(family, torch.float64)
            expected = whole(CASES[name](world), world)
            error = worst([gap(found[family, name], expected) for found in every])
            line += f"{error.gradient:10.0e}{error.metrics:8.0e}"
        print(line, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bytes", action="store_true", help="only what each rank keeps")
    if not parser.parse_args().bytes:
        print_gradients()
        print()
    print_bytes()


if __name__ == "__main__":
    main()
