#!/usr/bin/env bash
# Step 1 on one GPU: bash step1_sft/launch/single_gpu.sh [flags of main.py and of deepspeed; they win]
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../../scripts/environment.sh"

MODEL=${MODEL:-Qwen/Qwen2.5-1.5B}
DATA=${DATA:-outputs/demo/data}
OUTPUT=${OUTPUT:-outputs/demo/step1_sft}
PRESET=${PRESET:-1x24gb_lora}

install_requirements requirements.txt
launch deepspeed --num_gpus 1 "$ROOT/step1_sft/main.py" \
    --config "$ROOT/step1_sft/configs/recipe.yaml" "$ROOT/step1_sft/configs/$PRESET.yaml" \
    --model_name_or_path "$MODEL" --data_dir "$DATA" --output_dir "$OUTPUT" "$@"
