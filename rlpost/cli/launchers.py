"""Launchers of several processes: some commands share their work among them; each would repeat any other command."""

from __future__ import annotations

import ctypes
import logging
import os
import signal
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import typer

from rlpost.cli.importing import importing
from rlpost.errors import RankError, RecipeError
from rlpost.results import given_to_children

_COUNTS = {
    "WORLD_SIZE": "torchrun, accelerate launch or deepspeed",
    "LOCAL_WORLD_SIZE": "torchrun",
    "OMPI_COMM_WORLD_SIZE": "mpirun",
    "PMI_SIZE": "mpirun",
    "MV2_COMM_WORLD_SIZE": "mpirun",
    # Of the step, not of the job: a batch script has SLURM_NTASKS too, and is one process.
    "SLURM_STEP_NUM_TASKS": "srun",
}
"""Variable with the number of processes -> who sets it."""
_RANKS = ("RANK", "LOCAL_RANK")
_PR_SET_PDEATHSIG = 1
"""Of Linux: the signal that a process gets when its parent ends."""
LAUNCHED = "RLPOST_LAUNCHED"
"""Set for the ranks that `on_ranks` starts: it says which of them was lost."""
_OF_RANKS = {"RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"}
_RENDEZVOUS = {"ACCELERATE_MIXED_PRECISION", "MASTER_ADDR", "MASTER_PORT"}


ON_RANKS = ("train", "eval", "pairs")
"""The commands that share their work."""


def is_rank(environment: Mapping[str, str]) -> bool:
    """Whether a launcher started this process as one of several that can reach each other."""
    count = environment.get("WORLD_SIZE", "")
    return count.isdecimal() and int(count) > 1 and environment.keys() >= _OF_RANKS


def on_ranks(count: int) -> None:
    """Leave the command to so many processes, unless that is one or this is one of them.

    Raises:
        typer.Exit: they have run it.
    """
    if count > 1 and not is_rank(os.environ):
        raise typer.Exit(_run_on_ranks(count, sys.argv[1:]))


def _run_on_ranks(count: int, words: Sequence[str]) -> int:
    """Run `rlpost WORDS` as so many processes of one run, by torch's launcher; returns the exit code.

    Each prints as it likes: the first one alone does. All of them end when one does.
    """
    with importing():
        from torch.distributed.elastic.multiprocessing import SignalException
        from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
        from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    logging.disable()  # torch reports at length what one line says
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=count,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
        monitor_interval=0.1,
    )
    os.environ[LAUNCHED] = "1"
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # the ranks' too
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // count)))
    try:
        with given_to_children():
            elastic_launch(config, sys.executable)("-m", "rlpost", *words)
    except ChildFailedError as failed:
        del os.environ[LAUNCHED]
        return _outcome(failed.failures, count)
    except SignalException as stopped:  # the ranks were sent the signal too, and have ended
        return 128 + stopped.sigval
    return 0


def end_with_launcher() -> None:
    """Of a rank that `on_ranks` started: stop after the step, as by SIGTERM, should the launcher be killed."""
    if LAUNCHED in os.environ and sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def _outcome(failures: Mapping[int, Any], count: int) -> int:
    """The exit code of a run whose ranks failed, torch's ProcessFailure by rank.

    Raises:
        RankError: one was killed. That others then lost it is not worth a word.
    """
    for rank, failure in sorted(failures.items()):
        if failure.exitcode < 0 and -failure.exitcode != signal.SIGTERM:
            name = signal.Signals(-failure.exitcode).name
            raise RankError(
                f"rank {rank} of {count} (process {failure.pid}) was ended by {name}; "
                "run the same command to go on from the last checkpoint"
            )
    codes = [int(failure.exitcode) for failure in failures.values()]
    codes.sort(key=lambda code: code == RankError.exit_code)
    return codes[0] if codes[0] >= 0 else 128 - codes[0]


def refuse_several_processes(environment: Mapping[str, str]) -> None:
    """Refuse to run as one of several processes that a launcher started.

    Raises:
        RecipeError: the environment names several.
    """
    for name, launcher in _COUNTS.items():
        if environment.get(name, "").isdecimal() and int(environment[name]) > 1:
            raise _refusal(f"{environment[name]} processes by {launcher} ({name}={environment[name]})", name)
    for name in _RANKS:
        if environment.get(name, "").isdecimal() and int(environment[name]) > 0:
            raise _refusal(f"process {environment[name]} of several ({name}={environment[name]})", name)
    # On a CPU, `accelerate launch --num_processes 2` starts one process, with a rendezvous address.
    if environment.keys() >= _RENDEZVOUS and "WORLD_SIZE" not in environment:
        raise _refusal("several processes by accelerate launch, which started one (MASTER_PORT is set)", "MASTER_PORT")


def _refusal(what: str, variable: str) -> RecipeError:
    return RecipeError(
        f"started as {what}, which cannot reach each other or have nothing to share - start `rlpost train`, eval or "
        "pairs by torchrun (torchrun --nproc-per-node N -m rlpost train ...), or a process by itself: "
        f"`env -u {variable} rlpost ...`"
    )
