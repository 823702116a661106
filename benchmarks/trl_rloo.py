"""Steps of TRL's RLOO trainer in a process of its own; prints seconds and memory as JSON (`benchmarks/step3.py`)."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import RLOOConfig, RLOOTrainer

from benchmarks.peers import peer_options, print_steps
from common.files import read_jsonl


def main() -> None:
    """Train for some steps."""
    options = peer_options("prompts", "samples", "answer_tokens")
    rows = [row for _, row in read_jsonl(options.folder / "prompts.jsonl")]
    print_steps(
        options,
        lambda arguments: RLOOTrainer(
            model=AutoModelForCausalLM.from_pretrained(options.folder / "sft", dtype=torch.float32),
            reward_funcs=lambda completions, **kwargs: [float(len(completion)) for completion in completions],
            args=RLOOConfig(
                gradient_accumulation_steps=options.prompts * options.samples // options.batch,
                num_generations=options.samples, max_completion_length=options.answer_tokens, beta=0.05,
                learning_rate=1e-6, temperature=1.0, top_k=0, **arguments,
            ),
            train_dataset=Dataset.from_list(rows),
            processing_class=AutoTokenizer.from_pretrained(options.folder / "sft"),
        ),
    )  # fmt: skip


if __name__ == "__main__":
    main()
