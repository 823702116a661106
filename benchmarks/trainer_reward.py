"""Steps of transformers' Trainer on a token classifier in a process of its own; prints seconds and memory as JSON
(`benchmarks/reward.py`)."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from datasets import Dataset
from transformers import (
    AutoModelForTokenClassification,
    AutoTokenizer,
    DataCollatorForTokenClassification,
    Trainer,
    TrainingArguments,
)

from benchmarks.peers import peer_options, print_steps
from common.files import read_jsonl


def main() -> None:
    """Train for some steps on the token ids and labels of `rows.jsonl`."""
    options = peer_options()
    rows = [row for _, row in read_jsonl(options.folder / "rows.jsonl")]
    print_steps(
        options,
        lambda arguments: Trainer(
            model=AutoModelForTokenClassification.from_pretrained(options.folder / "model", dtype=torch.float32),
            args=TrainingArguments(learning_rate=1e-5, **arguments),
            train_dataset=Dataset.from_list(rows),
            data_collator=DataCollatorForTokenClassification(AutoTokenizer.from_pretrained(options.folder / "model")),
        ),
    )


if __name__ == "__main__":
    main()
