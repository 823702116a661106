#!/usr/bin/env bash
# Make a checkpoint readable by any number of ranks: bash scripts/convert_checkpoint.sh --checkpoint FOLDER [--workers N]
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
install_requirements requirements.txt
use_cpu_ranks_without_gpu
exec python -m common.engine.universal "$@"
