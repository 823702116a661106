"""Steps of transformers' Trainer on a token classifier in a process of its own; prints seconds and memory as JSON
(`benchmarks/reward.py`)."""

from __future__ import annotations

import json
import sys
import tempfile
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

from benchmarks.clock import StepClock
from benchmarks.measuring import peak_memory, peer_options


def main() -> None:
    """Train for some steps on the token ids and labels of `rows.jsonl`."""
    options = peer_options()
    rows = [json.loads(line) for line in (options.folder / "rows.jsonl").read_text().splitlines()]
    clock = StepClock()
    with tempfile.TemporaryDirectory() as output:
        trainer = Trainer(
            model=AutoModelForTokenClassification.from_pretrained(options.folder / "model", dtype=torch.float32),
            args=TrainingArguments(
                output_dir=output, per_device_train_batch_size=options.batch, max_steps=options.steps,
                learning_rate=1e-5, report_to="none", use_cpu=True, save_strategy="no", disable_tqdm=True,
                logging_steps=1000,
            ),
            train_dataset=Dataset.from_list(rows),
            data_collator=DataCollatorForTokenClassification(AutoTokenizer.from_pretrained(options.folder / "model")),
            callbacks=[clock],
        )  # fmt: skip
        trainer.train()
    print(json.dumps({"seconds": clock.seconds, "peak_mib": round(peak_memory() / 2**20)}))


if __name__ == "__main__":
    main()
