#!/usr/bin/env bash
# Step 2 on many machines; hostfile: scripts/hostfile.example: bash step2_token_reward/launch/multi_node.sh [flags of main.py and of deepspeed; they win]
# Before it: sample.sh beside this file draws the responses, step2_token_reward/label.py labels them.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../../scripts/environment.sh"

MODEL=${MODEL:-outputs/demo/step1_sft/model}
SAMPLES=${SAMPLES:-outputs/demo/step2_token_reward/samples/samples.jsonl}
LABELS=${LABELS:-outputs/demo/step2_token_reward/labels.jsonl}
OUTPUT=${OUTPUT:-outputs/demo/step2_token_reward/reward}
PRESET=${PRESET:-2x8x80gb_full}
HOSTFILE=${HOSTFILE:-hostfile}

install_requirements requirements.txt
use_cpu_ranks_without_gpu
launch deepspeed --hostfile "$HOSTFILE" "$ROOT/step2_token_reward/main.py" \
    --config "$ROOT/step2_token_reward/configs/recipe.yaml" "$ROOT/step2_token_reward/configs/$PRESET.yaml" \
    --model_name_or_path "$MODEL" --samples "$SAMPLES" --labels "$LABELS" --output_dir "$OUTPUT" "$@"
