"""Steps of TRL's SFTTrainer in a process of its own; prints seconds and memory as JSON (`benchmarks/sft.py`)."""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

from benchmarks.clock import StepClock
from benchmarks.measuring import peak_memory, peer_options


def main() -> None:
    """Train for some steps on the token ids of `rows.jsonl`."""
    options = peer_options()
    rows = [json.loads(line) for line in (options.folder / "rows.jsonl").read_text().splitlines()]
    examples = [
        {
            "input_ids": row["input_ids"],
            "completion_mask": [int(place >= row["prompt_length"]) for place in range(len(row["input_ids"]))],
        }
        for row in rows
    ]
    clock = StepClock()
    with tempfile.TemporaryDirectory() as output:
        trainer = SFTTrainer(
            model=AutoModelForCausalLM.from_pretrained(options.folder / "model", dtype=torch.float32),
            args=SFTConfig(
                output_dir=output, per_device_train_batch_size=options.batch, max_steps=options.steps,
                completion_only_loss=True, max_length=1024, learning_rate=1e-5, report_to="none", use_cpu=True,
                bf16=False, gradient_checkpointing=False, save_strategy="no", disable_tqdm=True, logging_steps=1000,
            ),
            train_dataset=Dataset.from_list(examples),
            processing_class=AutoTokenizer.from_pretrained(options.folder / "model"),
            callbacks=[clock],
        )  # fmt: skip
        trainer.train()
    print(json.dumps({"seconds": clock.seconds, "peak_mib": round(peak_memory() / 2**20)}))


if __name__ == "__main__":
    main()
