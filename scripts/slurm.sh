#!/usr/bin/env bash
# One run on several nodes of a Slurm cluster: sbatch scripts/slurm.sh RECIPE [KEY=VALUE ...]
# Submit it from where the recipe and its `runs` folder are; that folder must be on a disk that all nodes see. Resubmit it
# to go on: the run resumes from its last checkpoint, on as many nodes as there are then.
#SBATCH --job-name=rlpost
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --signal=TERM@300
set -euo pipefail

head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
# One task a node, which starts a process for each of the node's GPUs.
exec srun torchrun \
    --nnodes "$SLURM_NNODES" \
    --nproc-per-node "${SLURM_GPUS_ON_NODE:-1}" \
    --rdzv-backend c10d \
    --rdzv-id "$SLURM_JOB_ID" \
    --rdzv-endpoint "$head:29500" \
    -m rlpost train "$@"
