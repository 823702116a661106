"""Steps of TRL's SFTTrainer in a process of its own; prints seconds and memory as JSON (`benchmarks/sft.py`)."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

from benchmarks.peers import peer_options, print_steps
from common.files import read_jsonl


def main() -> None:
    """Train for some steps on the token ids of `rows.jsonl`."""
    options = peer_options()
    rows = [row for _, row in read_jsonl(options.folder / "rows.jsonl")]
    examples = [
        {
            "input_ids": row["input_ids"],
            "completion_mask": [int(place >= row["prompt_length"]) for place in range(len(row["input_ids"]))],
        }
        for row in rows
    ]
    print_steps(
        options,
        lambda arguments: SFTTrainer(
            model=AutoModelForCausalLM.from_pretrained(options.folder / "model", dtype=torch.float32),
            args=SFTConfig(completion_only_loss=True, max_length=1024, learning_rate=1e-5, **arguments),
            train_dataset=Dataset.from_list(examples),
            processing_class=AutoTokenizer.from_pretrained(options.folder / "model"),
        ),
    )


if __name__ == "__main__":
    main()
