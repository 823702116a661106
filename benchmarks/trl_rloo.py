"""Steps of TRL's RLOO trainer in a process of its own; prints the seconds of each as JSON (`benchmarks/step3.py`)."""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import RLOOConfig, RLOOTrainer


class Clock(TrainerCallback):
    """Seconds from the beginning of each optimiser step to the next one's."""

    def __init__(self) -> None:
        self.marks: list[float] = []

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        """The first mark."""
        self.marks.append(time.perf_counter())

    def on_step_end(self, args, state, control, **kwargs) -> None:
        """The end of a step: generation, scoring, update."""
        self.marks.append(time.perf_counter())


def main() -> None:
    """Train for some steps."""
    parser = argparse.ArgumentParser()
    for name in ("steps", "prompts", "samples", "answer_tokens", "batch"):
        parser.add_argument(f"--{name}", type=int, required=True)
    parser.add_argument("--folder", type=Path, required=True)
    options = parser.parse_args()
    rows = [json.loads(line) for line in (options.folder / "prompts.jsonl").read_text().splitlines()]
    clock = Clock()
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
    print(json.dumps([after - before for before, after in zip(clock.marks, clock.marks[1:], strict=False)]))


if __name__ == "__main__":
    main()
