"""A step of supervised fine-tuning against TRL's SFTTrainer, on the same model, examples and threads.

    pip install --no-deps -r benchmarks/requirements.txt
    python benchmarks/sft.py                   about 9 minutes on two cores

Both train all weights of a Llama with the widths of SmolLM2-135M and half of its layers in fp32, on 8 examples a step
of up to 224 tokens, with a loss on the responses alone. The vocabulary has 49k entries (SmolLM2's), and 152k (Qwen's).
Each runs as its users start it: ours has the allocator settings of `scripts/environment.sh`. How much of the difference
in memory is theirs shows one more run of TRL's with the same settings.
"""

from __future__ import annotations

import random
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.measuring import (
    allocator_settings,
    environment_with,
    median_ratio,
    on_ranks,
    peer,
    read_switches,
    save,
)
from benchmarks.models import query_tokenizer
from benchmarks.peers import StepClock, peak_memory
from common.engine.training_arguments import training_arguments
from common.errors import run_command
from common.files import read_jsonl, write_jsonl
from common.models.loading import load_causal_lm
from common.planning.models import ModelSpec, gives_own_logits
from step1_sft.config import SftConfig
from step1_sft.dataset import PadRight
from step1_sft.trainer import SftTrainer

RUNS, STEPS, WARMUP = 5, 1, 1
CORES = 2
BATCH, PROMPT, RESPONSE = 8, 192, 32
VOCABULARIES = {"49k": 49_152, "152k": 151_936}


def main() -> None:
    """Alternate runs of both with each vocabulary, then save the ratios."""
    read_switches(__doc__)
    found = {name: measure(name, size) for name, size in VOCABULARIES.items()}
    save("sft", {
        "ratios": {name: result["ratios"] for name, result in found.items()},
        "shape": {"batch": BATCH, "prompt_tokens": PROMPT, "response_tokens": RESPONSE},
        "vocabularies": {name: result["runs"] for name, result in found.items()},
        "our_allocator_settings": allocator_settings(),
    })  # fmt: skip


def measure(name: str, vocabulary: int) -> dict[str, Any]:
    """Alternating runs on one vocabulary: TRL's seconds over ours, our peak over TRL's, and the runs."""
    runs: dict[str, list[dict[str, Any]]] = {"ours": [], "trl": []}
    with tempfile.TemporaryDirectory() as folder:
        prepare(Path(folder), vocabulary)
        for run in range(RUNS):
            with environment_with(allocator_settings()):
                runs["ours"].append(on_ranks(our_steps, 1, folder, f"run{run}"))
            runs["trl"].append(trl_steps(folder))
            shown = (f"{of} {row[-1]['seconds'][-1]:.1f} s, {row[-1]['peak_mib']} MiB" for of, row in runs.items())
            print(f"vocabulary {name}, run {run}, a step:", *shown, flush=True)
        with environment_with(allocator_settings()):
            with_allocator = trl_steps(folder)
    seconds = {of: [min(row["seconds"][WARMUP:]) for row in rows] for of, rows in runs.items()}
    peaks = {of: [row["peak_mib"] for row in rows] for of, rows in runs.items()}
    ratios = {
        "trl_seconds_over_ours": median_ratio(seconds["trl"], seconds["ours"]),
        "our_peak_over_trl": median_ratio(peaks["ours"], peaks["trl"]),
    }
    return {"ratios": ratios, "runs": runs | {"trl_with_our_allocator": [with_allocator]}}


def trl_steps(folder: str) -> dict[str, Any]:
    """Seconds and peak of TRL's trainer on the same rows."""
    return peer("benchmarks/trl_sft.py", Path(folder), STEPS + WARMUP, BATCH, CORES)


def prepare(folder: Path, vocabulary: int) -> None:
    """A random model, a tokenizer and token ids: prompts of 96 to 192 tokens, responses of 16 to 32."""
    tokenizer = query_tokenizer()
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=576, intermediate_size=1536, num_hidden_layers=15, num_attention_heads=9,
        num_key_value_heads=3, tie_word_embeddings=True, max_position_embeddings=2048, bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    draw = random.Random(0)
    rows = []
    for number in range(BATCH * (STEPS + WARMUP)):
        # The first example of a step is as long as may be: the memory is that of the limit.
        shortest = 2 if number % BATCH else 1
        prompt, response = (draw.randint(most // shortest, most) for most in (PROMPT, RESPONSE))
        rows.append({
            "input_ids": [draw.randrange(2, vocabulary) for _ in range(prompt + response)], "prompt_length": prompt
        })  # fmt: skip
    write_jsonl(folder / "rows.jsonl", rows)


def our_steps(folder: str, run: str) -> dict[str, Any]:
    """Seconds of each step of step 1, and the most memory that it held."""
    torch.set_num_threads(CORES)
    config = SftConfig(
        model_name_or_path=f"{folder}/model", data_dir=folder, output_dir=f"{folder}/{run}", dtype="fp32", zero_stage=0,
        per_device_train_batch_size=BATCH, max_steps=STEPS + WARMUP, learning_rate=1e-5, max_response_tokens=RESPONSE,
        save_steps=1000, eval_steps=1000, tensorboard=False,
    )  # fmt: skip
    chunks = gives_own_logits(ModelSpec.of(config.model_name_or_path, "causal_lm", config))
    args = training_arguments(config)
    args.save_strategy = args.eval_strategy = "no"
    clock = StepClock()
    trainer = SftTrainer(
        model=load_causal_lm(config.model_name_or_path, config),
        args=args,
        train_dataset=[row for _, row in read_jsonl(Path(folder) / "rows.jsonl")],
        data_collator=PadRight(1),
        callbacks=[clock],
        chunks=chunks,
    )
    trainer.train()
    return {"seconds": clock.seconds, "peak_mib": round(peak_memory() / 2**20)}


if __name__ == "__main__":
    run_command(main)
