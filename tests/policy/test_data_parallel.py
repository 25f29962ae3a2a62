"""Two processes: gradients are synchronised only through the wrapper's own forward.

`DistributedDataParallel` arms its synchronisation in its forward. A pass through `wrapped.module`, or through the
transformers model inside, gives each rank the gradient of its own share, without an error.
"""

import gc
import json
from pathlib import Path

import torch
import torch.distributed as dist
from families import EndTokenOnly, tiny
from torch import multiprocessing
from torch.nn.parallel import DistributedDataParallel

from rlpost.groups import Completion, Group
from rlpost.objectives import Rows, nll, token_mean
from rlpost.policy.attention import FLAT
from rlpost.policy.policy import Policy

GROUPS = [
    Group((1, 2, 3), (Completion((4, 5, 6, 7), (True,) * 4), Completion((8,), (True,)))),
    Group((9, 10), (Completion((11, 12), (True, False)),)),
]
"""One a rank: 5 actions and 1."""
ACTIONS = 6


def make_policy() -> Policy:
    model = tiny("gpt2", torch.float64)
    model.set_attn_implementation(FLAT)
    return Policy(model, EndTokenOnly(), flat=True)


def gradient(module, policy: Policy, groups: list[Group], ranks: int) -> torch.Tensor:
    """Of the token mean over the whole update; the data-parallel mean over ranks is undone by their number."""
    policy.zero_grad()
    batch = policy.batch(groups)
    logp = module(batch).logp_N
    rows = Rows(batch.rows.lengths_S)
    (nll(logp) * token_mean(rows, ACTIONS)).sum().mul(ranks).backward()
    policy.backward_done()
    return torch.cat([p.grad.flatten() for p in policy.parameters()])


def worker(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    policy = make_policy()
    whole = gradient(policy, policy, GROUPS, 1)
    wrapped = DistributedDataParallel(policy)

    def error(module) -> float:
        found = gradient(module, policy, GROUPS[rank : rank + 1], 2)
        return float((found - whole).norm() / whole.norm())

    errors = {"wrapper": error(wrapped), "inner": error(wrapped.module), "wrapper again": error(wrapped)}
    Path(folder, f"rank{rank}.json").write_text(json.dumps(errors), "utf-8")
    # The wrapper must not be the last owner of the process group: its destructor joins gloo's thread while it
    # holds the interpreter's lock, which that thread may be waiting for.
    del wrapped
    gc.collect()
    dist.destroy_process_group()


def test_only_the_wrappers_forward_synchronises(tmp_path):
    multiprocessing.spawn(worker, (str(tmp_path),), nprocs=2)
    for rank in range(2):
        errors = json.loads((tmp_path / f"rank{rank}.json").read_text())
        assert errors["wrapper"] <= 1e-12
        assert errors["inner"] > 0.1
        assert errors["wrapper again"] <= 1e-12
