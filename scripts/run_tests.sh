#!/usr/bin/env bash
# Install what the tests need and run them, two files at a time; arguments go to pytest, with paths from the repository's
# root. -n 0 runs them one after the other. Files start in their own order: by default those with few tests, which are
# the longest here, would start last and keep one core busy alone.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
cd "$ROOT"
install_requirements requirements-dev.txt
use_cpu_ranks_without_gpu
export OMP_NUM_THREADS=1
exec python -m pytest -n 2 --dist loadfile --no-loadscope-reorder "$@"
