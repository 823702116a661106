#!/usr/bin/env bash
# Step 1 on the GPUs of one machine: bash step1_sft/launch/single_node.sh [flags of main.py and of deepspeed; they win]
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../../scripts/environment.sh"

MODEL=${MODEL:-mistralai/Mistral-7B-v0.3}
DATA=${DATA:-outputs/demo/data}
OUTPUT=${OUTPUT:-outputs/demo/step1_sft}
PRESET=${PRESET:-8x80gb_full}
NUM_GPUS=${NUM_GPUS:-8}

install_requirements requirements.txt
launch deepspeed --num_gpus "$NUM_GPUS" "$ROOT/step1_sft/main.py" \
    --config "$ROOT/step1_sft/configs/recipe.yaml" "$ROOT/step1_sft/configs/$PRESET.yaml" \
    --model_name_or_path "$MODEL" --data_dir "$DATA" --output_dir "$OUTPUT" "$@"
