#!/usr/bin/env bash
# The study: every system on every seed, and the figures (docs/results/README.md).
#
#   bash scripts/reproduce.sh                   the whole study on the embedded log, less than six hours on two cores
#   bash scripts/reproduce.sh --quick           a sketch of it, half an hour at most
#   bash scripts/reproduce.sh --forecast        how long it would take, by kinds of jobs, and how long what is left
#   bash scripts/reproduce.sh --report_only     tables and figures from the records that are there
#   bash scripts/reproduce.sh --real_log A B    with the comparison on your own or other real logs
#
# It goes on where it stopped: a run that left its record in docs/results/records is not made again. All flags go to
# study/main.py (see its --help).
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
install_requirements requirements.txt
use_cpu_ranks_without_gpu
# Each job has one core; large blocks stay with the process, which saves a tenth of a training step's time on a CPU.
export OMP_NUM_THREADS=1 MALLOC_MMAP_THRESHOLD_=4294967296 MALLOC_TRIM_THRESHOLD_=4294967296
# Paths are relative to the folder of the user, but the study's own commands run in the repository.
arguments=() names_a_path=""
for argument in "$@"; do
    case "$argument" in
        --real_log|--work_dir|--results_dir) names_a_path=yes ;;
        --*) names_a_path="" ;;
        *) [ -z "$names_a_path" ] || argument="$(realpath -m -- "$argument")" ;;
    esac
    arguments+=("$argument")
done
cd "$ROOT"
exec python -m study.main ${arguments[@]+"${arguments[@]}"}
