#!/usr/bin/env bash
# Step 2 on one GPU: bash step2_token_reward/launch/single_gpu.sh [flags of main.py and of deepspeed; they win]
# Before it: sample.sh beside this file draws the responses, step2_token_reward/label.py labels them.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../../scripts/environment.sh"

MODEL=${MODEL:-allenai/longformer-base-4096}
SAMPLES=${SAMPLES:-outputs/demo/step2_token_reward/samples/samples.jsonl}
LABELS=${LABELS:-outputs/demo/step2_token_reward/labels.jsonl}
OUTPUT=${OUTPUT:-outputs/demo/step2_token_reward/reward}
PRESET=${PRESET:-1x24gb_encoder}

install_requirements requirements.txt
launch deepspeed --num_gpus 1 "$ROOT/step2_token_reward/main.py" \
    --config "$ROOT/step2_token_reward/configs/recipe.yaml" "$ROOT/step2_token_reward/configs/$PRESET.yaml" \
    --model_name_or_path "$MODEL" --samples "$SAMPLES" --labels "$LABELS" --output_dir "$OUTPUT" "$@"
