"""Steps of TRL's RLOO trainer in a process of its own; prints the seconds of each as JSON (`benchmarks/step3.py`)."""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import RLOOConfig, RLOOTrainer

from benchmarks.clock import StepClock
from benchmarks.measuring import peer_options


def main() -> None:
    """Train for some steps."""
    options = peer_options("prompts", "samples", "answer_tokens")
    rows = [json.loads(line) for line in (options.folder / "prompts.jsonl").read_text().splitlines()]
    clock = StepClock()
    with tempfile.TemporaryDirectory() as output:
        trainer = RLOOTrainer(
            model=AutoModelForCausalLM.from_pretrained(options.folder / "sft", dtype=torch.float32),
            reward_funcs=lambda completions, **kwargs: [float(len(completion)) for completion in completions],
            args=RLOOConfig(
                output_dir=output, per_device_train_batch_size=options.batch,
                gradient_accumulation_steps=options.prompts * options.samples // options.batch,
                num_generations=options.samples, max_completion_length=options.answer_tokens, beta=0.05,
                learning_rate=1e-6, max_steps=options.steps, temperature=1.0, top_k=0, report_to="none", use_cpu=True,
                bf16=False, gradient_checkpointing=False, save_strategy="no", disable_tqdm=True, logging_steps=1000,
            ),
            train_dataset=Dataset.from_list(rows),
            processing_class=AutoTokenizer.from_pretrained(options.folder / "sft"),
            callbacks=[clock],
        )  # fmt: skip
        trainer.train()
    print(json.dumps(clock.seconds))


if __name__ == "__main__":
    main()
