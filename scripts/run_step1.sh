#!/usr/bin/env bash
# Step 1, supervised fine-tuning, of a run or on its own.
# bash scripts/run_step1.sh --help lists the flags; none is needed.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
install_requirements requirements.txt
exec python -m pipeline.main 1 "$@"
