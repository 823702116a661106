#!/usr/bin/env bash
# Step 1 on CPU ranks: bash step1_sft/launch/cpu.sh [flags of main.py and of deepspeed; they win]
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../../scripts/environment.sh"

MODEL=${MODEL:-outputs/demo/base_model}
DATA=${DATA:-outputs/demo/data}
OUTPUT=${OUTPUT:-outputs/demo/step1_sft}
PRESET=${PRESET:-tiny}
RANKS=${RANKS:-2}

install_requirements requirements.txt
use_cpu_ranks
launch deepspeed --num_gpus "$RANKS" "$ROOT/step1_sft/main.py" \
    --config "$ROOT/step1_sft/configs/recipe.yaml" "$ROOT/step1_sft/configs/$PRESET.yaml" \
    --model_name_or_path "$MODEL" --data_dir "$DATA" --output_dir "$OUTPUT" "$@"
