#!/usr/bin/env bash
# Stages as separate commands, chained by the paths they print: each `rlpost train` writes its last checkpoint's
# path, and nothing else, to stdout.
#
#   scripts/pipeline.sh CONVERSATIONS.jsonl PAIRS.jsonl [key=value ...]     (overrides go to every stage)
# The checkpoints carry their LoRA adapter, so all three recipes must say the same model.lora.
#
set -euo pipefail

if [ $# -lt 2 ]; then
    echo "usage: scripts/pipeline.sh CONVERSATIONS.jsonl PAIRS.jsonl [key=value ...]" >&2
    exit 2
fi
conversations=$1 pairs=$2
shift 2

# The last word on a key counts: what is given here comes first, so that a model.path is the first stage's alone.
sft=$(rlpost train sft_chat "$@" vars.data="$conversations" run=chain_sft)
dpo=$(rlpost train dpo_pairs "$@" vars.data="$pairs" model.path="$sft" run=chain_dpo)
rl=$(rlpost train grpo_math "$@" model.path="$dpo" run=chain_grpo)

rlpost eval "$rl" >&2
echo "$rl"
