"""Two processes that share an update take the step that one process takes on all of it."""

from __future__ import annotations

import gc
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from exactness import sample_groups
from families import VOCABULARY, EndTokenOnly, tiny
from safetensors.torch import load_file, save_file
from torch import multiprocessing

from rlpost.experience import Experience
from rlpost.learner import Learner
from rlpost.objectives.weights import token_mean
from rlpost.policy.attention import FLAT
from rlpost.policy.check import use_attention
from rlpost.policy.load import remove_dropout
from rlpost.policy.policy import Policy

GROUPS = sample_groups(VOCABULARY)[:4]
SHARES = [[0, 1, 2], [3]]
"""Groups of each rank: three, cut into several parts, against one."""


def update(share: list[int], accelerator: Accelerator, idle: bool) -> tuple[Learner, list[dict[str, float]]]:
    """Two updates; with `idle`, the last group has nothing to teach in the second one."""
    model = tiny("gpt2", torch.float64)
    remove_dropout(model)
    use_attention(model, FLAT)
    policy = Policy(model, EndTokenOnly(), flat=True)
    learner = Learner(policy, accelerator, learning_rate=1e-2, max_grad_norm=0.1, tokens_per_pass=30)

    def loss(scores, part):
        return -(scores.logp_N * part["weight"]).sum(), {"nll": -scores.logp_N.detach()}

    lines = []
    for step in range(2):
        experience = Experience(tuple(GROUPS[g] for g in share))
        total = learner.totals(experience).actions
        experience = experience.with_actions(weight=token_mean(experience.rows, total))
        if idle and step:
            needed = tuple(g != 3 for g in share for _ in GROUPS[g].completions)
            experience = replace(experience, needed_S=needed)
        lines.append(learner.update(loss, experience))
    return learner, lines


def worker(rank: int, folder: str, idle: bool) -> None:
    torch.set_num_threads(1)
    environment = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1"}
    os.environ.update({name: str(value) for name, value in environment.items()})
    os.environ.update({"MASTER_PORT": Path(folder, "port").read_text(), "ACCELERATE_USE_CPU": "true"})
    accelerator = Accelerator()
    assert accelerator.num_processes == 2
    learner, lines = update(SHARES[rank], accelerator, idle)
    numbers = {f"metrics/{i}/{name}": torch.tensor(x) for i, line in enumerate(lines) for name, x in line.items()}
    save_file({**{n: w.clone() for n, w in learner.weights().items()}, **numbers}, Path(folder, f"rank{rank}"))
    accelerator.wait_for_everyone()
    # The wrapper must not be the last owner of the process group.
    del learner
    gc.collect()
    torch.distributed.destroy_process_group()


@pytest.mark.slow
@pytest.mark.parametrize("idle", [False, True])
def test_two_ranks_do_what_one_process_does(tmp_path, idle):
    import socket

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        (tmp_path / "port").write_text(str(free.getsockname()[1]))
    multiprocessing.spawn(worker, (str(tmp_path), idle), nprocs=2)
    learner, lines = update([0, 1, 2, 3], Accelerator(), idle)
    expected = {n: w.clone() for n, w in learner.weights().items()}
    for rank in range(2):
        found = load_file(tmp_path / f"rank{rank}")
        for name, w in expected.items():
            assert torch.allclose(found[name], w, rtol=1e-9, atol=1e-12), (rank, name)
        for i, line in enumerate(lines):
            for name, value in line.items():
                assert float(found[f"metrics/{i}/{name}"]) == pytest.approx(value, rel=1e-5), (rank, i, name)
