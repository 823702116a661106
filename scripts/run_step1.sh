#!/usr/bin/env bash
# Step 1 on its own: bash scripts/run_step1.sh [--num_gpus N | --hostfile FILE] --config step1_sft/configs/NAME.yaml [flags]
# Launcher flags go to deepspeed, all others to step1_sft/main.py (see its --help).
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
install_requirements requirements.txt
use_cpu_ranks_without_gpu
launch step1_sft/main.py "$@"
