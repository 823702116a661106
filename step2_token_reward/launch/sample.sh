#!/usr/bin/env bash
# Step 2, the responses: bash step2_token_reward/launch/sample.sh [flags of sample.py and of deepspeed; they win]
# On all GPUs of this machine, on two CPU ranks without one, or on many machines with --hostfile FILE.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../../scripts/environment.sh"

MODEL=${MODEL:-outputs/demo/step1_sft/model}
DATA=${DATA:-outputs/demo/data}
OUTPUT=${OUTPUT:-outputs/demo/step2_token_reward/samples}
PRESET=${PRESET:-tiny_sample}

install_requirements requirements.txt
use_cpu_ranks_without_gpu
ranks=()
case "${DS_ACCELERATOR:-} $* " in cpu*--hostfile*) ;; cpu*) ranks=(--num_gpus 2) ;; esac
launch deepspeed ${ranks[@]+"${ranks[@]}"} "$ROOT/step2_token_reward/sample.py" \
    --config "$ROOT/step2_token_reward/configs/recipe_sample.yaml" "$ROOT/step2_token_reward/configs/$PRESET.yaml" \
    --model_name_or_path "$MODEL" --data_dir "$DATA" --output_dir "$OUTPUT" "$@"
