#!/usr/bin/env bash
# Step 3 on its own: bash scripts/run_step3.sh [--num_gpus N | --hostfile FILE] --config step3_tppo/configs/NAME.yaml [flags]
# Launcher flags go to deepspeed, all others to step3_tppo/main.py (see its --help).
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
install_requirements requirements.txt
use_cpu_ranks_without_gpu
launch step3_tppo/main.py "$@"
