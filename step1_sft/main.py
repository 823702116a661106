"""Step 1: supervised fine-tuning (SFT).

    deepspeed --num_gpus 8 step1_sft/main.py \\
        --config step1_sft/configs/recipe.yaml step1_sft/configs/8x80gb_lora.yaml \\
        --model_name_or_path ... --data_dir ... --output_dir outputs/my_run/step1_sft
"""

from __future__ import annotations

import time
from pathlib import Path

from common.config import parse_config
from common.data.examples import load_examples
from common.data.prompts import PromptBuilder
from common.engine import distributed
from common.engine.run_date import date_record, run_date
from common.engine.trainer import newest_checkpoint, prepare_to_load, run_callbacks
from common.engine.training_arguments import prepare_output, training_arguments
from common.engine.watchdog import Watchdog
from common.errors import run_rank_command
from common.files import write_json
from common.generation.decode import check_decodable
from common.models.kernels import settle_dtype
from common.models.loading import (
    apply_lora,
    causal_lm_skeleton,
    check_lengths,
    check_machine,
    check_vocabulary,
    load_causal_lm,
    load_tokenizer,
    save_model_folder,
)
from common.planning.models import ModelSpec, gives_own_logits
from step1_sft.config import SftConfig, check_config
from step1_sft.dataset import PadRight, Rows, build_rows
from step1_sft.trainer import SftTrainer


def main() -> None:
    """Fine-tune `model_name_or_path` on the responses of the train examples; write `<output_dir>/model`."""
    config = settle_dtype(parse_config(SftConfig))
    check_config(config)
    check_machine(config.model_name_or_path, config, config.quantize)
    start = time.monotonic()
    distributed.start(config.hang_timeout)
    distributed.seed_everything(config.seed)

    tokenizer = load_tokenizer(config.model_name_or_path, config.trust_remote_code, config.pad_token)
    skeleton = causal_lm_skeleton(config.model_name_or_path, config)
    check_decodable(skeleton)
    check_lengths(skeleton.config, config.max_prompt_tokens + config.max_response_tokens)
    # Before the Trainer's arguments: with ZeRO-3 these make transformers shard every model that is made after them.
    chunks = gives_own_logits(ModelSpec.of(config.model_name_or_path, "causal_lm", config, config))
    first_day = run_date(config.output_dir, config.resume)
    builder = PromptBuilder(tokenizer, config.prompt_template, config.max_prompt_tokens, config.num_queries, first_day)
    train, dev = (
        build_rows(load_examples(config.data_dir, split), builder, config.max_response_tokens)
        for split in ("train", "dev")
    )
    args = training_arguments(config, train_sampling_strategy="group_by_length")
    distributed.on_main_first(lambda: prepare_output(config, date_record(first_day)))
    checkpoint = newest_checkpoint(args.output_dir)
    prepare_to_load(checkpoint, args)
    args.eval_on_start = checkpoint is None  # the base model's perplexity, to compare with
    announce(config, train, dev, checkpoint)

    model = load_causal_lm(config.model_name_or_path, config, config.quantize)
    check_vocabulary(model, tokenizer)
    watchdog = Watchdog(config.output_dir, config.hang_timeout)
    trainer = SftTrainer(
        model=apply_lora(model, config),
        args=args,
        train_dataset=train.rows,
        eval_dataset=dev.rows,
        data_collator=PadRight(tokenizer.pad_token_id),
        processing_class=tokenizer,
        callbacks=run_callbacks(
            config.output_dir, tensorboard=config.tensorboard, checkpoint=checkpoint, watchdog=watchdog
        ),
        prompt_loss_weight=config.prompt_loss_weight,
        chunks=chunks,
    )
    with watchdog:
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    save(trainer, builder, config)
    if distributed.rank() == 0:
        write_json(Path(config.output_dir) / "timings.json", {"step1_sft": round(time.monotonic() - start, 1)})
        print(closing_words(config), flush=True)


def announce(config: SftConfig, train: Rows, dev: Rows, checkpoint: Path | None) -> None:
    """Say what is about to happen."""
    if distributed.rank() != 0:
        return
    for name, rows in (("train", train), ("dev", dev)):
        limit = config.max_response_tokens
        print(f"{name}: {len(rows.rows)} examples; {rows.too_long} left out, over {limit} response tokens", flush=True)
    print(f"resuming from {checkpoint}" if checkpoint else f"starting from {config.model_name_or_path}", flush=True)


def save(trainer: SftTrainer, builder: PromptBuilder, config: SftConfig) -> None:
    """Write the model folder on rank 0; all ranks give their shards."""
    weights = trainer.whole_weights()
    generation = {"max_new_tokens": config.max_response_tokens, "do_sample": True, "top_k": 0}
    distributed.on_main_first(
        lambda: save_model_folder(
            trainer.model, builder.tokenizer, Path(config.output_dir) / "model", generation, weights, builder
        )
    )


def closing_words(config: SftConfig) -> str:
    """Where everything lies and what comes next."""
    output = Path(config.output_dir)
    adapter = f" (merged; the adapter alone: {output}/model/adapter)" if config.lora_r else ""
    return (
        f"model:       {output}/model{adapter}\n"
        f"metrics:     {output}/metrics.jsonl\n"
        + (f"tensorboard: tensorboard --logdir {output}/tensorboard\n" if config.tensorboard else "")
        + "next:        bash step2_token_reward/launch/sample.sh "
        "--config step2_token_reward/configs/recipe_sample.yaml "
        f"--model_name_or_path {output}/model --data_dir {config.data_dir} "
        f"--output_dir {output.parent}/step2_token_reward/samples --prompt_template {config.prompt_template} "
        f"--num_queries {config.num_queries} --max_prompt_tokens {config.max_prompt_tokens} "
        f"--max_response_tokens {config.max_response_tokens}"
    )


if __name__ == "__main__":
    run_rank_command(main)
