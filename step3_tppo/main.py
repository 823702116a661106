"""Step 3: token-level PPO.

    deepspeed --num_gpus 8 step3_tppo/main.py \\
        --config step3_tppo/configs/recipe.yaml step3_tppo/configs/8x80gb_full.yaml \\
        --actor_path outputs/my_run/step1_sft/model --reward_path outputs/my_run/step2_token_reward/reward/model \\
        --data_dir outputs/my_run/data --output_dir outputs/my_run/step3_tppo
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from datetime import date
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from common.config import parse_config
from common.data.examples import load_examples
from common.data.prompts import PromptBuilder
from common.data.records import Example
from common.engine import distributed
from common.engine.claim import claim_run
from common.engine.environment import write_environment
from common.engine.run_date import date_record, run_date
from common.errors import InputError, run_rank_command
from common.feedback.load import load_annotator
from common.files import write_json
from common.models.kernels import settle_dtype
from common.models.loading import check_machine, load_tokenizer
from common.pages.drawing import draw_or_tell
from common.pages.report import PAGE_NAME, write_report
from step3_tppo.config import Step3Config
from step3_tppo.export import export_models
from step3_tppo.models import build_models
from step3_tppo.monitor import RolloutMonitor
from step3_tppo.planning import check_memory
from step3_tppo.rollout import RolloutMaker, reward_options
from step3_tppo.trainer import TPPOTrainer

MAY_DIFFER_ON_RESUME = frozenset(
    {
        "output_dir", "resume", "overwrite", "total_steps", "save_steps", "keep_checkpoints", "sample_steps",
        "tensorboard", "hang_timeout", "plan",
        # How much a pass holds at once changes nothing but rounding.
        "micro_batch_size", "micro_batch_tokens", "scoring_batch_size", "scoring_batch_tokens", "decode_rows",
    }
)


def main() -> None:
    """Parse, load, train, save."""
    begun = time.perf_counter()
    config = settle_dtype(parse_config(Step3Config))
    device = distributed.start(config.hang_timeout)
    config.validate(distributed.world_size())
    check_machine(config.actor_path, config, config.quantize)
    if config.baseline == "critic":
        check_machine(config.critic_path or config.actor_path, config)
    check_memory(config, device)
    first_day = run_date(config.output_dir, config.resume)
    distributed.on_main_first(lambda: claim(config, first_day))
    distributed.seed_everything(config.seed)

    tokenizer = load_tokenizer(config.actor_path, config.trust_remote_code, config.pad_token)
    prompts = PromptBuilder(tokenizer, config.prompt_template, config.max_prompt_tokens, config.num_queries, first_day)
    examples = load_examples(config.data_dir, "train")
    length = config.suggested_length or median_query_tokens(tokenizer, examples)

    annotator = load_annotator(config.monitor, truth_path=config.truth) if config.monitor else None
    monitor = RolloutMonitor(annotator, config.num_queries) if annotator else None

    models = build_models(config, tokenizer)
    judge = annotator if config.reward_from == "monitor" else None
    make_rollout = RolloutMaker(models, prompts, reward_options(config, length), config, device, judge)
    TPPOTrainer(config, models, make_rollout, examples, device, monitor).train()

    export_models(models, prompts, config)
    distributed.on_main_first(lambda: report(config, time.perf_counter() - begun))


def claim(config: Step3Config, first_day: date) -> None:
    """Take the output folder for this run, which began on a day, or refuse; note what it runs on."""
    claim_run(config, MAY_DIFFER_ON_RESUME, date_record(first_day), splits=("train",))
    write_environment(config.output_dir, config)


def median_query_tokens(tokenizer: PreTrainedTokenizerBase, examples: Sequence[Example]) -> int:
    """The paper's suggested length: the median number of tokens of all target queries."""
    queries = [query for example in examples for query in example.targets]
    if not queries:
        raise InputError("the training examples have no targets; make them again with common.data.prepare")
    lengths = [len(ids) for ids in tokenizer(queries, add_special_tokens=False)["input_ids"]]
    return round(statistics.median(lengths))


def report(config: Step3Config, seconds: float) -> None:
    """Draw the run's page and say where everything lies."""
    folder = Path(config.output_dir)
    write_json(folder / "timings.json", {"step3_tppo": round(seconds, 1)})
    draw_or_tell(str(folder / PAGE_NAME), lambda: write_report(folder))
    critic = f"  critic        {folder / 'critic'}\n" if config.baseline == "critic" else ""
    print(
        f"\nstep 3 took {seconds:.0f} s\n"
        f"  tuned model   {folder / 'model'}\n"
        f"{critic}"
        f"  checkpoints   {folder / 'checkpoints'}\n"
        f"  metrics       {folder / 'metrics.jsonl'}\n"
        f"  report        {folder / PAGE_NAME} (curves, warnings, sampled answers)\n"
        f"  TensorBoard   tensorboard --logdir {folder}\n"
        f"try it: python scripts/predict.py --model {folder / 'model'}\n"
        f"next: bash scripts/evaluate.sh --data_dir {config.data_dir} --output_dir {folder}/evaluation "
        f"--systems before={config.actor_path} tppo={folder / 'model'} --prompt_template {config.prompt_template} "
        f"--max_prompt_tokens {config.max_prompt_tokens} --max_new_tokens {config.max_response_tokens} "
        f"--num_queries {config.num_queries} --temperature {config.temperature:g}",
        flush=True,
    )


if __name__ == "__main__":
    run_rank_command(main)
