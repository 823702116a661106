#!/usr/bin/env bash
# Step 3 on many machines; hostfile: scripts/hostfile.example: bash step3_tppo/launch/multi_node.sh [flags of main.py and of deepspeed; they win]
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../../scripts/environment.sh"

ACTOR=${ACTOR:-outputs/demo/step1_sft/model}
REWARD_MODEL=${REWARD_MODEL:-outputs/demo/step2_token_reward/reward/model}
DATA=${DATA:-outputs/demo/data}
OUTPUT=${OUTPUT:-outputs/demo/step3_tppo}
PRESET=${PRESET:-2x8x80gb_full}
HOSTFILE=${HOSTFILE:-hostfile}

install_requirements requirements.txt
use_cpu_ranks_without_gpu
launch deepspeed --hostfile "$HOSTFILE" "$ROOT/step3_tppo/main.py" \
    --config "$ROOT/step3_tppo/configs/recipe.yaml" "$ROOT/step3_tppo/configs/$PRESET.yaml" \
    --actor_path "$ACTOR" --reward_path "$REWARD_MODEL" --data_dir "$DATA" --output_dir "$OUTPUT" "$@"
