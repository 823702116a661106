#!/usr/bin/env bash
# Step 2 on its own: bash scripts/run_step2.sh [--num_gpus N | --hostfile FILE] --config step2_token_reward/configs/NAME.yaml [flags]
# Launcher flags go to deepspeed, all others to step2_token_reward/main.py (see its --help).
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
install_requirements requirements.txt
use_cpu_ranks_without_gpu
launch step2_token_reward/main.py "$@"
