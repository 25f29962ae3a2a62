"""Refuse launchers of several processes: a run is one process on one device; each other process would repeat it."""

from __future__ import annotations

from collections.abc import Mapping

from rlpost.errors import RecipeError

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
_RENDEZVOUS = {"ACCELERATE_MIXED_PRECISION", "MASTER_ADDR", "MASTER_PORT"}


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
        f"started as {what}, but a run is one process on one device - start it without a launcher and choose the GPU "
        f"with CUDA_VISIBLE_DEVICES (runs of their own in each process: `env -u {variable} rlpost ... run=NAME`)"
    )
