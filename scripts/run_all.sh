#!/usr/bin/env bash
# The main job, end to end: log -> examples -> SFT -> samples, labels, token reward model -> TPPO -> report.
# bash scripts/run_all.sh --help lists the flags; none is needed.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
install_requirements requirements.txt
exec python -m pipeline.main all "$@"
