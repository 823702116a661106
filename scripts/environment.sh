# Sourced by every script here: the repository's root, its virtual environment, and what ranks need to know.
# Paths that a user gives are relative to the folder in which the command is typed: nothing here changes it.
#
#   TPPO_VENV=/path    use this virtual environment instead of .venv (it is made when missing)
#   TPPO_VENV=none     use the Python that is active, and install nothing

ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
export PYTHONPATH="$ROOT${PYTHONPATH:+:$PYTHONPATH}"
export PYTHONSAFEPATH=1  # the folder where the user types may hold modules with the names of ours
export TOKENIZERS_PARALLELISM="${TOKENIZERS_PARALLELISM:-false}"

# takes_files FOLDER: whether a file can be written there; a full disk may still take an empty one.
takes_files() {
    local file status=0
    file="$(mktemp -p "$1" 2> /dev/null)" || return 1
    { echo > "$file"; } 2> /dev/null || status=1
    rm -f "$file"
    return "$status"
}

# Temporary files lie in TMPDIR or nowhere: Python would take another folder without a word. Without TMPDIR one of those
# that Python tries must do, as torch needs one already when it is imported.
check_scratch() {
    local folder folders=(/tmp /var/tmp /usr/tmp "$PWD")
    if [ -n "${TMPDIR:-}" ]; then folders=("$TMPDIR"); fi
    for folder in "${folders[@]}"; do
        if takes_files "$folder"; then return; fi
    done
    echo "error: no file can be written in ${TMPDIR:-/tmp, /var/tmp, /usr/tmp or here}; set TMPDIR to a folder with room" >&2
    exit 2
}

# install_requirements NAME: make the virtual environment when there is none, and install NAME.txt into it unless exactly
# this has been done before (a stamp holds the requirement files' checksum).
install_requirements() {
    local file="$ROOT/$1" venv="${TPPO_VENV:-$ROOT/.venv}"
    [ "$venv" = none ] && return
    if [ ! -x "$venv/bin/python" ]; then
        local python
        python="$(command -v python3.11 || command -v python3)" || { echo "error: no python3 found" >&2; exit 2; }
        echo "making the virtual environment $venv with $python"
        if ! mkdir -p "$venv" 2> /dev/null; then
            echo "error: $venv cannot be made here; set TPPO_VENV to an environment, or to a folder where one can be" >&2
            exit 2
        fi
        # Debian's python3 without its package python3-venv leaves a half-made folder behind.
        if ! "$python" -m venv "$venv" > /dev/null || ! "$venv/bin/python" -m pip --version > /dev/null 2>&1; then
            rm -rf "$venv"
            echo "error: $python cannot make a virtual environment with pip; install it (Debian: apt install" \
                "python3-venv), or set TPPO_VENV to an environment that has it" >&2
            exit 2
        fi
    fi
    local stamp="$venv/.$1.installed" sum
    sum="$(cat "$ROOT/requirements.txt" "$file" | cksum)"
    if [ ! -f "$stamp" ] || [ "$(cat "$stamp")" != "$sum" ]; then
        if ! "$venv/bin/python" -m pip --version > /dev/null 2>&1; then
            echo "error: $venv has no pip; delete it, so that it is made anew, or set TPPO_VENV to another" >&2
            exit 2
        fi
        echo "installing $1"
        "$venv/bin/python" -m pip install --quiet --disable-pip-version-check -r "$file"
        # An environment of somebody else's may hold all that is needed and still be read-only.
        { echo "$sum" > "$stamp"; } 2> /dev/null || echo "warning: $venv is read-only, so that each start installs anew" >&2
    fi
    export PATH="$venv/bin:$PATH"
}

# The ranks are CPU processes over gloo, each on its share of the cores.
use_cpu_ranks() {
    export DS_ACCELERATOR=cpu
    export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$(( $(nproc) > 2 ? $(nproc) / 2 : 1 ))}"
    # Forward and backward run in two threads. glibc gives each its own arena, and an arena cannot reuse what the other
    # one has freed: a rank of SmolLM2-135M grows to 9.2 GiB instead of 5.1 (docs/performance.md).
    export MALLOC_ARENA_MAX="${MALLOC_ARENA_MAX:-1}"
    # tcmalloc needs even less, so it is used where it is installed, as torch's own launcher for CPUs does.
    local find='s/.*libtcmalloc\(_minimal\)\?\.so\.4 .* => //p' tcmalloc
    if [ -z "${LD_PRELOAD:-}" ] && tcmalloc="$(/sbin/ldconfig -p 2> /dev/null | sed -n "$find" | head -n 1)" \
        && [ -n "$tcmalloc" ]; then
        export LD_PRELOAD="$tcmalloc" TCMALLOC_LARGE_ALLOC_REPORT_THRESHOLD=1099511627776  # no lines about large tensors
    fi
}

use_cpu_ranks_without_gpu() {
    python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' || use_cpu_ranks
}

# launch deepspeed FLAGS... SCRIPT FLAGS...: run the deepspeed launcher, hand signals on to its ranks, and say which ranks
# ended without a message. Launcher flags that stand behind SCRIPT (a user's "$@") are moved before it, where they win.
launch() {
    local launcher=("$1") script="" flags=() output="" hostfile="" gpus="" begun
    begun="$(date +%s)"
    shift
    while [ $# -gt 0 ]; do
        case "$1" in --hostfile) hostfile="${2:-}" ;; --hostfile=*) hostfile="${1#*=}" ;; esac
        case "$1" in
            --num_gpus|--num_nodes|--hostfile|--include|--exclude|--master_addr|--master_port|--launcher|--launcher_args)
                [ $# -ge 2 ] || { echo "error: $1 needs a value" >&2; exit 2; }
                if [ "$1" = --num_gpus ]; then gpus="$2"; else launcher+=("$1" "$2"); fi; shift 2 ;;
            --num_gpus=*) gpus="${1#*=}"; shift ;;
            --num_nodes=*|--hostfile=*|--include=*|--exclude=*|--master_addr=*|--master_port=*|--launcher=*|--launcher_args=*)
                launcher+=("$1"); shift ;;
            *.py) if [ -z "$script" ]; then script="$1"; else flags+=("$1"); fi; shift ;;
            *)
                case "$1" in --output_dir) output="${2:-}" ;; --output_dir=*) output="${1#*=}" ;; esac
                if [ -z "$script" ]; then launcher+=("$1"); else flags+=("$1"); fi; shift ;;
        esac
    done
    case " ${launcher[*]} " in *" --include"*|*" --exclude"*) gpus="" ;; esac # those choose GPUs by themselves
    # Given a number of GPUs, deepspeed ignores which ones the user allows: the first so many of those are named instead.
    if [ -z "$hostfile" ] && [ "${DS_ACCELERATOR:-}" != cpu ] && [[ "$gpus:${CUDA_VISIBLE_DEVICES:-}" =~ ^[0-9]+:[0-9,]+$ ]]
    then
        # No here-string anywhere: a bash before 5.1 writes a temporary file for each.
        launcher+=(--include "localhost:$(printf %s "$CUDA_VISIBLE_DEVICES" | cut -d, -f "-$gpus")")
    elif [ -n "$gpus" ]; then
        launcher+=(--num_gpus "$gpus")
    fi
    # Without this deepspeed would train on this machine alone.
    if [ -n "$hostfile" ] && [ ! -f "$hostfile" ]; then
        echo "error: --hostfile $hostfile: no such file; scripts/hostfile.example shows one" >&2
        exit 2
    fi
    if [ -n "$hostfile" ] && [ "$(head -c 3 "$hostfile")" = $'\xef\xbb\xbf' ]; then
        echo "error: $hostfile:1: begins with a byte order mark; save the file as UTF-8 without it" >&2
        exit 2
    fi
    case " ${flags[*]} " in *" --help "*|*" -h "*) python "$script" --help; return ;; esac # once, not once a rank
    case " ${launcher[*]} " in
        *--master_port*|*--hostfile*) ;;
        *) launcher+=(--master_port "$(free_port)") ;;
    esac
    local remote=""
    case " ${launcher[*]} " in
        *--hostfile*) remote="$(remote_environment)" || exit 2; [ -z "$remote" ] || export DS_ENV_FILE="$remote" ;;
    esac
    # Ranks are read from the environment, so that flags are the user's alone. In the background, because bash handles
    # signals only between commands.
    # The launcher repeats the command once a rank; of its own lines only errors are shown.
    "${launcher[@]}" --log_level error --no_local_rank "$script" "${flags[@]}" &
    local job=$! status=0
    trap 'signal_ranks "$job" "$script"' TERM USR1
    trap 'kill -TERM "$job" 2>/dev/null || true' INT
    while kill -0 "$job" 2>/dev/null; do wait "$job" || true; done
    wait "$job" || status=$?
    trap - TERM USR1 INT
    [ -z "$remote" ] || rm -f "$remote"
    case "$status" in
        0|2|3|4|70|75) ;; # every rank has printed its own message
        *) [ -z "$output" ] || python -c \
            'import sys; from common.engine.watchdog import silent_ends as s; print(s(sys.argv[1], float(sys.argv[2])))' \
            "$output" "$begun" >&2 ;;
    esac
    return "$status"
}

# remote_environment: a file with what ranks on other hosts must know, as ssh hands on no environment; deepspeed reads it.
# Nothing secret is in it. No file is made where the user has one (DS_ENV_FILE, .deepspeed_env). Fails without room for it.
remote_environment() {
    [ -z "${DS_ENV_FILE:-}" ] && [ ! -f .deepspeed_env ] && [ ! -f ~/.deepspeed_env ] || return 0
    local file name text=""
    for name in DS_ACCELERATOR OMP_NUM_THREADS MALLOC_ARENA_MAX TOKENIZERS_PARALLELISM \
        GLOO_SOCKET_IFNAME NCCL_SOCKET_IFNAME NCCL_DEBUG NCCL_IB_DISABLE HF_HOME HF_HUB_OFFLINE TPPO_DEBUG \
        TMPDIR XDG_CACHE_HOME TRITON_CACHE_DIR TORCHINDUCTOR_CACHE_DIR TORCH_EXTENSIONS_DIR MPLCONFIGDIR; do
        [ -z "${!name:-}" ] || text+="$name=${!name}"$'\n'
    done
    if ! { file="$(mktemp)" && printf '%s' "$text" > "$file"; } 2> /dev/null; then
        echo "error: no file can be written in ${TMPDIR:-/tmp}; set TMPDIR to a folder with room" >&2
        return 2
    fi
    echo "$file"
}

# signal_ranks PID SCRIPT: hand a scheduler's signal on to the processes below PID that run SCRIPT. They save and end with
# status 75, which becomes the launcher's; a signal to the launcher itself would make it kill them after 30 seconds.
signal_ranks() {
    local child
    for child in $(pgrep -P "$1"); do
        if tr '\0' '\n' < "/proc/$child/cmdline" | grep -qx -e "$2" && [ -z "$(pgrep -P "$child" -f "$2")" ]; then
            kill -USR1 "$child" 2>/dev/null || true
        fi
        signal_ranks "$child" "$2"
    done
}

# A free port, so that two runs on one machine do not meet.
free_port() {
    python -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])'
}

check_scratch
