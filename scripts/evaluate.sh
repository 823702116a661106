#!/usr/bin/env bash
# Compare systems on held-out users: bash scripts/evaluate.sh --data_dir DIR --systems sft=DIR tppo=DIR --output_dir DIR
# All flags go to common/evaluation/evaluate.py (see its --help).
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
install_requirements requirements.txt
use_cpu_ranks_without_gpu
exec python -m common.evaluation.evaluate "$@"
