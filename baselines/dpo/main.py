"""Baseline: DPO from the sentence labels of step 2's samples, on the model of step 1.

    deepspeed --num_gpus 8 baselines/dpo/main.py --model_name_or_path outputs/my_run/step1_sft/model \\
        --samples outputs/my_run/step2_token_reward/samples/samples.jsonl \\
        --labels outputs/my_run/step2_token_reward/labels.jsonl --output_dir outputs/my_run/dpo
"""

from __future__ import annotations

from pathlib import Path

from baselines.dpo.config import DpoConfig, check_config
from baselines.dpo.pairs import PairCollator, build_pairs
from baselines.dpo.trainer import DpoTrainer, add_reference
from common.config import parse_config
from common.data.prompts import PromptBuilder
from common.engine import distributed
from common.engine.run_date import date_record, run_date
from common.engine.trainer import newest_checkpoint, prepare_to_load, run_callbacks
from common.engine.training_arguments import prepare_output, training_arguments
from common.engine.watchdog import Watchdog
from common.errors import run_rank_command
from common.feedback.labels import read_labels
from common.models.kernels import settle_dtype
from common.models.loading import (
    check_machine,
    check_vocabulary,
    load_causal_lm,
    load_model_config,
    load_tokenizer,
    save_model_folder,
    without_dropout,
)


def main() -> None:
    """Tune `model_name_or_path` on preference pairs; write `<output_dir>/model`."""
    config = settle_dtype(parse_config(DpoConfig))
    check_config(config)
    check_machine(config.model_name_or_path, config)
    device = distributed.start(config.hang_timeout)
    distributed.seed_everything(config.seed)
    tokenizer = load_tokenizer(config.model_name_or_path, config.trust_remote_code, config.pad_token)
    first_day = run_date(config.output_dir, config.resume)
    builder = PromptBuilder(tokenizer, config.prompt_template, config.max_prompt_tokens, config.num_queries, first_day)
    labelled = read_labels(config.samples, config.labels)
    train, dev = (build_pairs(labelled, builder, split) for split in ("train", "dev"))
    distributed.on_main_first(lambda: prepare_output(config, date_record(first_day)))

    collator = PairCollator(tokenizer.pad_token_id)
    reference = load_causal_lm(config.model_name_or_path, config).to(device).eval()
    check_vocabulary(reference, tokenizer)
    add_reference(train + dev, reference, collator, config.per_device_eval_batch_size, config.temperature)
    del reference

    policy_config = load_model_config(config.model_name_or_path, config.trust_remote_code)
    args = training_arguments(config)
    checkpoint = newest_checkpoint(args.output_dir)
    prepare_to_load(checkpoint, args)
    watchdog = Watchdog(config.output_dir, config.hang_timeout)
    trainer = DpoTrainer(
        model=load_causal_lm(config.model_name_or_path, config, config=without_dropout(policy_config)),
        args=args,
        train_dataset=train,
        eval_dataset=dev,
        data_collator=collator,
        processing_class=tokenizer,
        callbacks=run_callbacks(
            config.output_dir, tensorboard=config.tensorboard, checkpoint=checkpoint, watchdog=watchdog
        ),
        beta=config.beta,
        temperature=config.temperature,
    )
    with watchdog:
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    weights = trainer.whole_weights()
    folder = Path(config.output_dir) / "model"
    settings = {"do_sample": True, "top_k": 0}
    distributed.on_main_first(
        lambda: save_model_folder(trainer.model, tokenizer, folder, settings, weights, builder)
    )
    closing_words = (
        f"{len(train)} pairs; model: {folder}\n"
        f"next: bash scripts/evaluate.sh --systems before={config.model_name_or_path} dpo={folder} --data_dir ... "
        "--output_dir ..."
    )
    distributed.on_main_first(lambda: print(closing_words, flush=True))


if __name__ == "__main__":
    run_rank_command(main)
