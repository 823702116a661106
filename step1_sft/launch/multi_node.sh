#!/usr/bin/env bash
# Step 1 on many machines; hostfile: scripts/hostfile.example: bash step1_sft/launch/multi_node.sh [flags of main.py and of deepspeed; they win]
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../../scripts/environment.sh"

MODEL=${MODEL:-Qwen/Qwen3-14B}
DATA=${DATA:-outputs/demo/data}
OUTPUT=${OUTPUT:-outputs/demo/step1_sft}
PRESET=${PRESET:-2x8x80gb_full}
HOSTFILE=${HOSTFILE:-hostfile}

install_requirements requirements.txt
use_cpu_ranks_without_gpu
launch deepspeed --hostfile "$HOSTFILE" "$ROOT/step1_sft/main.py" \
    --config "$ROOT/step1_sft/configs/recipe.yaml" "$ROOT/step1_sft/configs/$PRESET.yaml" \
    --model_name_or_path "$MODEL" --data_dir "$DATA" --output_dir "$OUTPUT" "$@"
