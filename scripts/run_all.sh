#!/usr/bin/env bash
# The main job, end to end: log -> examples -> SFT -> samples, labels, token reward model -> TPPO -> report.
#
#   bash scripts/run_all.sh                                   the embedded search log, a tiny model, two CPU ranks
#   bash scripts/run_all.sh --log FILE [--log FILE ...]       your own logs (docs/data_formats.md), lexical annotator
#
#   --run_name NAME       folder outputs/NAME (default: demo, or log with --log)
#   --log_format FORMAT   of all logs (default: by file name)
#   --model PATH          base model: a folder or hub name (default: a tiny random one, made from the log)
#   --annotator NAME      simulated, lexical, llm, or a function of your own, FILE.py:FUNCTION, which is run as it stands
#                         (docs/own_annotator.md; default: simulated, or lexical with --log)
#   --base_url URL        with llm: the OpenAI-compatible endpoint, such as http://localhost:8000/v1 (docs/ai_feedback.md)
#   --annotator_model M   with llm: the model's name there
#   --judge_model M       with llm: the model that judges in the report (default: the annotator, which the report warns of)
#   --judge_url URL       with llm: the judge's endpoint (default: --base_url)
#   --llm_flags "FLAGS"   with llm: more flags for label.py and the report, such as "--concurrency 64 --allow_remote"
#   --num_gpus N, --hostfile FILE     passed to the deepspeed launcher
#   --seed N              of every random choice (default 0)
#   --miniature           a few minutes' check of every stage; its table means nothing
#   --resume              go on with a run that was stopped
#   --overwrite           replace a run of the same name
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

logs=() run_name="" log_format=auto model="" annotator="" base_url="" annotator_model="" judge_model="" judge_url="" llm_flags=() seed=0 miniature="" resume="" overwrite="" launcher=()
while [ $# -gt 0 ]; do
    case "$1" in
        --resume) resume=yes; shift; continue ;;
        --overwrite) overwrite=yes; shift; continue ;;
        --miniature) miniature=yes; shift; continue ;;
        -h|--help) sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p}' "${BASH_SOURCE[0]}"; exit 0 ;;
    esac
    [ $# -ge 2 ] || { echo "error: $1 is no flag of run_all.sh, or lacks its value (see --help)" >&2; exit 2; }
    case "$1" in
        --log) logs+=("$(realpath -m "$2")") ;;
        --run_name) run_name="$2" ;;
        --log_format) log_format="$2" ;;
        --model) model="$2" ;;
        --annotator)
            annotator="$2"
            case "$annotator" in *.py:*) annotator="$(realpath -m "${annotator%:*}"):${annotator##*:}" ;; esac ;;
        --base_url) base_url="$2" ;;
        --annotator_model) annotator_model="$2" ;;
        --judge_model) judge_model="$2" ;;
        --judge_url) judge_url="$2" ;;
        --llm_flags) read -r -a llm_flags <<< "$2" ;;
        --seed) seed="$2" ;;
        --num_gpus|--hostfile) launcher+=("$1" "$2") ;;
        *) echo "error: run_all.sh knows no flag $1 (see --help)" >&2; exit 2 ;;
    esac
    shift 2
done
[ -z "$resume" ] || [ -z "$overwrite" ] || { echo "error: give --resume or --overwrite, not both" >&2; exit 2; }
for log in ${logs[@]+"${logs[@]}"}; do
    [ -e "$log" ] || { echo "error: $log: no such log" >&2; exit 2; }
done
case "$annotator" in *.py:*) [ -f "${annotator%:*}" ] || { echo "error: ${annotator%:*}: no such file" >&2; exit 2; } ;; esac
if [ ${#logs[@]} -eq 0 ]; then
    run_name="${run_name:-demo}" annotator="${annotator:-simulated}"
else
    run_name="${run_name:-log}" annotator="${annotator:-lexical}"
    [ "$annotator" != simulated ] || { echo "error: only the embedded log has a truth for --annotator simulated" >&2; exit 2; }
fi
if [ "$annotator" = llm ]; then
    [ -n "$base_url" ] && [ -n "$annotator_model" ] || { echo "error: --annotator llm needs --base_url and --annotator_model" >&2; exit 2; }
    judge_model="${judge_model:-$annotator_model}" judge_url="${judge_url:-$base_url}"
elif [ -n "$base_url$annotator_model$judge_model$judge_url${llm_flags[*]-}" ]; then
    echo "error: --base_url, --annotator_model, --judge_model, --judge_url and --llm_flags are for --annotator llm" >&2
    exit 2
fi
[[ "$run_name" =~ ^[A-Za-z0-9][A-Za-z0-9._-]*$ ]] || { echo "error: --run_name may hold letters, digits, . _ -" >&2; exit 2; }

run="outputs/$run_name"
if [ -e "$run" ] && [ -z "$resume$overwrite" ]; then
    echo "error: $run exists; add --resume to go on with it, --overwrite to replace it, or another --run_name" >&2
    exit 2
fi
install_requirements requirements.txt
use_cpu_ranks_without_gpu
[ -z "$overwrite" ] || rm -rf "$run"
mkdir -p "$run/stages"

# stage NAME COMMAND...: run a stage once; its seconds stay in stages/NAME.json, which also says that it is done.
stage() {
    local name="$1"; shift
    if [ -f "$run/stages/$name.json" ]; then
        echo "== $name: done before"
        return
    fi
    echo "== $name"
    local begun=$SECONDS
    "$@"
    echo "{\"$name\": $((SECONDS - begun))}" > "$run/stages/$name.json"
}

# What each kind of run needs. Real logs have longer queries and few users, so every window of a history is an example;
# corrupted responses are longer than sampled ones, and the reward model must read them whole.
preset=tiny
data_flags=() log_flags=(--num_users 6000) sft_flags=() sample_flags=(--max_train_examples 2000) reward_flags=() ppo_flags=() report_flags=(--max_examples 500) label_flags=()
prompt_tokens=160 response_tokens=32
if [ ${#logs[@]} -gt 0 ]; then
    prompt_tokens=256 response_tokens=96
    data_flags+=(--windows 0)
fi
[ "$annotator" = simulated ] || reward_flags+=(--query_rule learned)  # what a good query is, is the annotator's to say
if [ -n "$miniature" ]; then
    log_flags=(--num_users 160)
    sft_flags+=(--num_train_epochs 1)
    sample_flags+=(--max_train_examples 48 --max_dev_examples 16)
    reward_flags+=(--num_train_epochs 1)
    ppo_flags+=(--total_steps 3 --critic_warmup_steps 1 --rollout_batch_size 16 --mini_batch_size 16 --micro_batch_size 8 --save_steps 2)
    report_flags+=(--max_examples 24 --resamples 200)
fi
lengths=(--max_prompt_tokens "$prompt_tokens" --max_response_tokens "$response_tokens")
truth=()
if [ "$annotator" = simulated ]; then
    truth=(--truth "$run/log/truth.jsonl")
    # People agreed with the paper's annotator on 91.18 % of the words.
    label_flags+=(--word_error_rate 0.09)
fi
reward_annotator="$annotator" judge_flags=()
if [ "$annotator" = llm ]; then
    reward_annotator="$annotator_model"
    label_flags+=(--base_url "$base_url" --model "$annotator_model" ${llm_flags[@]+"${llm_flags[@]}"})
    judge_flags=(--base_url "$judge_url" --model "$judge_model" ${llm_flags[@]+"${llm_flags[@]}"})
    for who in "$base_url $annotator_model" "$judge_url $judge_model"; do
        python -m common.feedback.llm.check --base_url "${who%% *}" --model "${who#* }" ${llm_flags[@]+"${llm_flags[@]}"}
    done
fi

if [ ${#logs[@]} -eq 0 ]; then
    stage simulate python -m common.data.simulator --output_dir "$run/log" --seed "$seed" --overwrite "${log_flags[@]}"
    logs=("$run/log/sessions.jsonl")
fi
stage prepare python -m common.data.prepare --log "${logs[@]}" --log_format "$log_format" --output_dir "$run/data" \
    --seed "$seed" --overwrite ${data_flags[@]+"${data_flags[@]}"}
if [ -z "$model" ]; then
    stage base_model python -m common.models.tiny --data_dir "$run/data" --output_dir "$run/base_model" \
        --prompt_template compact --seed "$seed" --overwrite
    model="$run/base_model"
fi
stage step1_sft launch step1_sft/main.py ${launcher[@]+"${launcher[@]}"} --config "step1_sft/configs/$preset.yaml" \
    --model_name_or_path "$model" --data_dir "$run/data" --output_dir "$run/step1_sft" --seed "$seed" --resume \
    "${lengths[@]}" ${sft_flags[@]+"${sft_flags[@]}"}
stage step2_sample launch step2_token_reward/sample.py ${launcher[@]+"${launcher[@]}"} \
    --config "step2_token_reward/configs/${preset}_sample.yaml" \
    --model_name_or_path "$run/step1_sft/model" --data_dir "$run/data" --output_dir "$run/step2_token_reward/samples" \
    --seed "$seed" --resume "${lengths[@]}" ${sample_flags[@]+"${sample_flags[@]}"}
samples="$run/step2_token_reward/samples/samples.jsonl" labels="$run/step2_token_reward/labels.jsonl"
stage step2_label python -m step2_token_reward.label --samples "$samples" --labels "$labels" --seed "$seed" \
    --annotator "$annotator" ${truth[@]+"${truth[@]}"} ${label_flags[@]+"${label_flags[@]}"}
if [ "$annotator" = llm ]; then
    # How steady the annotator is: a twentieth of the samples in other words.
    second="$run/step2_token_reward/labels_second.jsonl"
    stage step2_label_second python -m step2_token_reward.label --samples "$samples" --labels "$second" --seed "$seed" \
        --annotator llm --template label_terse_v1 --share 0.05 "${label_flags[@]}"
    stage step2_agreement python -m step2_token_reward.agreement --samples "$samples" --labels "$labels" \
        --reference "$second" --output "$run/step2_token_reward/agreement.json"
fi
stage step2_reward launch step2_token_reward/main.py ${launcher[@]+"${launcher[@]}"} \
    --config "step2_token_reward/configs/$preset.yaml" --model_name_or_path "$run/step1_sft/model" \
    --samples "$samples" --labels "$labels" --output_dir "$run/step2_token_reward/reward" --seed "$seed" --resume \
    --max_prompt_tokens "$prompt_tokens" --max_response_tokens $((2 * response_tokens)) ${reward_flags[@]+"${reward_flags[@]}"}
stage step3_tppo launch step3_tppo/main.py ${launcher[@]+"${launcher[@]}"} --config "step3_tppo/configs/$preset.yaml" \
    --actor_path "$run/step1_sft/model" --reward_path "$run/step2_token_reward/reward/model" \
    --critic_path "$run/step2_token_reward/reward/model" --data_dir "$run/data" --output_dir "$run/step3_tppo" \
    --seed "$seed" --resume "${lengths[@]}" ${ppo_flags[@]+"${ppo_flags[@]}"}
rm -f "$run/stages/evaluate.json" # a report is cheap, and it takes the other stages' times in
stage evaluate python -m common.evaluation.evaluate --data_dir "$run/data" --output_dir "$run" --overwrite \
    --systems "sft=$run/step1_sft/model" "tppo=$run/step3_tppo/model" --prompt_template compact --seed "$seed" \
    --max_prompt_tokens "$prompt_tokens" --max_new_tokens "$response_tokens" --temperature 0.7 --timings "$run"/stages/*.json \
    --annotator "$annotator" --reward_annotator "$reward_annotator" ${truth[@]+"${truth[@]}"} \
    ${judge_flags[@]+"${judge_flags[@]}"} \
    ${report_flags[@]+"${report_flags[@]}"}

python -m common.pages.report --run "$run" || echo "warning: $run/report.html could not be drawn" >&2

cat <<END

models       SFT $run/step1_sft/model, reward $run/step2_token_reward/reward/model, TPPO $run/step3_tppo/model
report       $run/report.html (curves, warnings, examples), $run/report.md, $run/report.json
TensorBoard  tensorboard --logdir $run
next         read the report and its warnings; docs/tuning.md says what healthy curves look like
END
