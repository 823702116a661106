#!/usr/bin/env bash
# Step 2, the token-level reward model, of a run or on its own.
# bash scripts/run_step2.sh --help lists the flags; none is needed.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
install_requirements requirements.txt
exec python -m pipeline.main 2 "$@"
