"""Step 2: train the token-level reward model.

    deepspeed --num_gpus 8 step2_token_reward/main.py \\
        --config step2_token_reward/configs/recipe.yaml step2_token_reward/configs/1x24gb_encoder.yaml \\
        --samples outputs/my_run/step2_token_reward/samples/samples.jsonl \\
        --labels outputs/my_run/step2_token_reward/labels.jsonl \\
        --model_name_or_path ... --output_dir outputs/my_run/step2_token_reward/reward
"""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from common.config import parse_config
from common.engine import distributed
from common.engine.trainer import newest_checkpoint, prepare_to_load, run_callbacks
from common.engine.training_arguments import prepare_output, training_arguments
from common.engine.watchdog import Watchdog
from common.errors import InputError, run_rank_command
from common.feedback.labels import read_labels
from common.files import write_json
from common.models.kernels import settle_dtype
from common.models.loading import check_machine, has_attention, load_fast_tokenizer, no_attention
from common.models.reward_encoder import RewardEncoder
from common.models.reward_losses import inverse_class_frequency
from common.models.token_reward import (
    load_token_reward_model,
    reads_both_ways,
    save_token_reward_model,
    token_classifier_skeleton,
)
from step2_token_reward.attention import settle_attention
from step2_token_reward.config import Step2Config, check_config
from step2_token_reward.dataset import RewardCollator, RewardData, build_data
from step2_token_reward.trainer import RewardTrainer


def main() -> None:
    """Train a token classifier on labelled responses; write `<output_dir>/model`."""
    config = settle_dtype(parse_config(Step2Config))
    check_config(config)
    check_machine(config.model_name_or_path, config)
    skeleton = token_classifier_skeleton(config.model_name_or_path, config)
    if not has_attention(skeleton, config.attn_implementation):
        raise InputError(f"{config.model_name_or_path}: {no_attention(skeleton, config.attn_implementation)}")
    bidirectional, prefix = settle_attention(config, skeleton)
    config = replace(config, prefix_attention=str(prefix).lower())
    start = time.monotonic()
    distributed.start(config.hang_timeout)
    distributed.seed_everything(config.seed)

    labelled = read_labels(config.samples, config.labels)
    tokenizer = load_fast_tokenizer(config.model_name_or_path, config.trust_remote_code)
    args = training_arguments(config)
    distributed.on_main_first(lambda: prepare_output(config))
    checkpoint = newest_checkpoint(args.output_dir)
    prepare_to_load(checkpoint, args)

    model = load_token_reward_model(config.model_name_or_path, config, bidirectional, config.heads)
    encoder = RewardEncoder(tokenizer, config.inputs, model)
    data = build_data(labelled, encoder)
    class_weights = config.class_weights or inverse_class_frequency(data.class_counts)
    announce(config, data, class_weights, checkpoint)

    watchdog = Watchdog(config.output_dir, config.hang_timeout)
    trainer = RewardTrainer(
        model=model,
        args=args,
        train_dataset=data.train,
        held_out=data.held_out,
        data_collator=RewardCollator(encoder),
        processing_class=tokenizer,
        callbacks=run_callbacks(
            config.output_dir, tensorboard=config.tensorboard, checkpoint=checkpoint, watchdog=watchdog
        ),
        w=config.w,
        class_weights=class_weights,
        class_keep_ratios=config.class_keep_ratios,
        learns_query_rule=config.query_rule == "learned",
    )
    with watchdog:
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    metrics = trainer.final_metrics()
    facts = {
        "heads": config.heads,
        "w": config.w,
        "class_weights": class_weights,
        "class_keep_ratios": config.class_keep_ratios,
        "bidirectional": reads_both_ways(model),
        "query_rule": trainer.query_rule._asdict() if trainer.query_rule else None,
        "metrics": metrics,
    }
    save(trainer, config, facts)
    if distributed.rank() == 0:
        write_json(Path(config.output_dir) / "timings.json", {"step2_token_reward": round(time.monotonic() - start, 1)})
        print(closing_words(config, metrics), flush=True)


def announce(config: Step2Config, data: RewardData, class_weights: list[float], checkpoint: Path | None) -> None:
    """Say what is about to happen."""
    if distributed.rank() != 0:
        return
    weights = ", ".join(f"{weight:.3f}" for weight in class_weights)
    print(
        f"responses: {len(data.train)} to train on, {len(data.held_out)} held out; {data.without_words} left out, they "
        f"have no word; {data.cut} cut at {config.max_response_tokens} tokens\n"
        f"training tokens of class 0, 1, 2: {data.class_counts}; class weights: {weights}",
        flush=True,
    )
    print(f"resuming from {checkpoint}" if checkpoint else f"starting from {config.model_name_or_path}", flush=True)


def save(trainer: RewardTrainer, config: Step2Config, facts: dict[str, Any]) -> None:
    """Write the model folder and the metrics on rank 0; all ranks give their shards."""
    weights = trainer.whole_weights()
    output_dir = Path(config.output_dir)

    def write() -> None:
        save_token_reward_model(
            output_dir / "model", trainer.model, trainer.processing_class, config.inputs, facts, weights
        )
        write_json(output_dir / "metrics.json", facts["metrics"])

    distributed.on_main_first(write)


def closing_words(config: Step2Config, metrics: dict[str, float | None]) -> str:
    """How good the model is, where everything lies and what comes next."""
    output = Path(config.output_dir)
    shown = ("token_auc", "word_auc", "word_accuracy", "sentence_mse", "sentence_spearman", "sentence_auc")
    figures = ", ".join(f"{name} {'undefined' if metrics[name] is None else f'{metrics[name]:.3f}'}" for name in shown)
    return (
        f"held-out users: {figures}\n"
        f"model:       {output}/model\n"
        f"metrics:     {output}/metrics.json, {output}/metrics.jsonl\n"
        + (f"tensorboard: tensorboard --logdir {output}/tensorboard\n" if config.tensorboard else "")
        + f"next:        bash scripts/run_step3.sh --reward_path {output}/model --actor_path ... --data_dir ... "
        "--output_dir ..."
    )


if __name__ == "__main__":
    run_rank_command(main)
