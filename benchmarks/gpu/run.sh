#!/usr/bin/env bash
# Everything worth knowing on one CUDA GPU, most valuable first, in at most eight minutes and without a network.
# bash benchmarks/gpu/run.sh --help lists the flags; README.md beside this file says what each part measures.
set -uo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../../scripts/environment.sh"

PARTS="machine pipeline step3_queries decoding mismatch step3_chat attention kernels pretrained"
# Seconds that a part may take at most; the whole run ends after --minutes all the same.
declare -A LIMITS=(
    [machine]=60 [pipeline]=180 [step3_queries]=120 [decoding]=60 [mismatch]=60 [step3_chat]=100 [attention]=90
    [kernels]=100 [pretrained]=3600
)
LEAST=10 # seconds that a part is begun with
GRACE=5  # seconds from TERM to KILL

usage() {
    cat << END
usage: bash benchmarks/gpu/run.sh [flags]
  --small          the same code on tiny models, also without a GPU
  --model FOLDER   a pretrained model: the last part trains it, on as many seeds as the time allows
  --log FILE       the log that the last part takes (examples/logs/cast_ikat.jsonl)
  --wheels DIR     install what is in this folder first, without a network
  --output DIR     where results and logs go (benchmarks/results/gpu)
  --minutes N      the whole run's limit (8)
  --parts "A B"    only these parts, of: $PARTS
END
}

small="" model="" log="$ROOT/examples/logs/cast_ikat.jsonl" wheels="" output="$ROOT/benchmarks/results/gpu" minutes=8
while [ $# -gt 0 ]; do
    case "$1" in
        --small) small=--small; shift ;;
        --model|--log|--wheels|--output|--minutes|--parts)
            [ $# -ge 2 ] || { echo "error: $1 needs a value" >&2; exit 2; }
            case "$1" in
                --model) model="$2" ;; --log) log="$2" ;; --wheels) wheels="$2" ;; --output) output="$2" ;;
                --minutes) minutes="$2" ;; --parts) PARTS="$2" ;;
            esac
            shift 2 ;;
        --help|-h) usage; exit 0 ;;
        *) echo "error: no flag $1 (--help lists them)" >&2; exit 2 ;;
    esac
done
for part in $PARTS; do
    [ -n "${LIMITS[$part]:-}" ] || { echo "error: --parts $part: there are ${!LIMITS[*]}" >&2; exit 2; }
done
for folder in "$model" "$wheels"; do
    [ -z "$folder" ] || [ -d "$folder" ] || { echo "error: $folder: no such folder" >&2; exit 2; }
done
[ -f "$log" ] || { echo "error: --log $log: no such file" >&2; exit 2; }
[[ "$minutes" =~ ^[1-9][0-9]*$ ]] || { echo "error: --minutes is a whole number above 0, not '$minutes'" >&2; exit 2; }
mkdir -p "$output" || exit 2
output="$(cd "$output" && pwd)"
end=$(( SECONDS + 60 * minutes - GRACE ))

# What is downloaded elsewhere goes into the Python that is active; without it the project's own environment is used.
if [ -n "$wheels" ]; then
    export TPPO_VENV=none
fi
install_requirements requirements.txt
python="$(command -v python3 || command -v python)"
# The folder of its programs (python, deepspeed) first: the active python3 may be a link from another folder.
PATH="$("$python" -c 'import os, sys; print(os.path.dirname(sys.executable))'):$PATH"
if [ -n "$wheels" ]; then
    python -m pip install --quiet --disable-pip-version-check --no-index --no-deps --find-links "$wheels" \
        "$wheels"/*.whl > "$output/wheels.log" 2>&1 || { echo "wheels: not installed"; tail -n 5 "$output/wheels.log"; }
fi
export TPPO_VENV=none TPPO_DEBUG=1 PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1
# The ranks of a try without a GPU share few cores.
[ -z "$small" ] || use_cpu_ranks_without_gpu
cd "$ROOT" || exit 2

# flags_of PART: its module and what it is given.
flags_of() {
    case "$1" in
        step3_*) echo "benchmarks.gpu.step3 --shape ${1#step3_}" ;;
        *) echo "benchmarks.gpu.$1" ;;
    esac
}

# run_part PART SECONDS: run it with a limit, its output in PART.log, and print how it ended. TERM, then KILL: a hanging
# kernel hears neither Python nor TERM.
run_part() {
    local part="$1" limit="$2" module
    read -ra module <<< "$(flags_of "$part")"
    local flags=(--output "$output" $small)
    [ "$part" != pretrained ] || flags+=(--model "$model" --log "$log" --seconds "$(( limit - 5 ))")
    timeout --kill-after="$GRACE" "$limit" python -m "${module[@]}" "${flags[@]}" > "$output/$part.log" 2>&1
}

status=0 table=""
for part in $PARTS; do
    begun=$SECONDS
    left=$(( end - SECONDS ))
    limit=$(( LIMITS[$part] < left ? LIMITS[$part] : left ))
    if [ "$part" = pretrained ] && [ -z "$model" ]; then
        how="skipped, no --model"
    elif [ "$limit" -lt "$LEAST" ]; then
        how="no time left" status=1
    elif run_part "$part" "$limit"; then
        how=ok
    else
        code=$?
        how="failed ($code)" status=1
        echo "$part failed with exit status $code; the end of $output/$part.log:"
        tail -n 8 "$output/$part.log" | cut -c 1-300 | sed 's/^/    /'
    fi
    table+="$(printf '%-14s  %-20s  %5d' "$part" "$how" "$(( SECONDS - begun ))")"$'\n'
    echo "$part: $how, $(( SECONDS - begun )) s"
done
printf '\n%-14s  %-20s  %5s\n%s' part status s "$table"
exit "$status"
