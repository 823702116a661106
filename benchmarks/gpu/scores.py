"""What the models of a run give on its held-out users: in bf16 on the GPU, or in fp32 on CPUs.

    python -m benchmarks.gpu.scores --run outputs/gpu --dtype bf16 --file scores.pt

Both are the same code, so that what differs is the arithmetic of two machines.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu.part import device
from common.config import ModelOptions
from common.data.examples import load_examples
from common.data.prompt_settings import load_prompt_settings
from common.errors import run_command
from common.feedback.labels import read_labels
from common.files import read_json
from common.models.loading import load_causal_lm, load_tokenizer
from common.models.response_scores import response_scores
from common.models.sequences import pad_sequences, score_in_blocks
from common.models.token_reward import SETTINGS_NAME, load_token_reward_scorer
from step1_sft.dataset import build_rows
from step2_token_reward.dataset import build_data
from step2_token_reward.evaluation import held_out_metrics

BLOCK = 32  # sequences a pass
MAX_RESPONSE_TOKENS = 32  # step 1's in the preset tiny


def main() -> None:
    """Score with the three models and save tensors and numbers in one file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, required=True, help="Folder of a run whose three steps are done.")
    parser.add_argument("--dtype", choices=["bf16", "fp32"], required=True, help="Precision.")
    parser.add_argument("--file", type=Path, required=True, help="Where the scores go.")
    options = parser.parse_args()
    models = ModelOptions(dtype=options.dtype)
    found = {
        "sft_logprobs": logprobs(options.run, options.run / "step1_sft/model", models),
        "tppo_logprobs": logprobs(options.run, options.run / "step3_tppo/model", models),
        **reward_scores(options.run, models),
    }
    torch.save(found, options.file)


@torch.no_grad()
def logprobs(run: Path, path: Path, options: ModelOptions) -> torch.Tensor:
    """Log-probs (M,) that the model in `path` gives the response tokens of the dev examples, one after another."""
    tokenizer = load_tokenizer(str(path))
    builder = load_prompt_settings(path).builder(tokenizer)
    rows = build_rows(load_examples(run / "data", "dev"), builder, MAX_RESPONSE_TOKENS).rows
    model = load_causal_lm(str(path), options).to(device()).eval()
    prompts = [row["input_ids"][: row["prompt_length"]] for row in rows]
    responses = [row["input_ids"][row["prompt_length"] :] for row in rows]
    batch = pad_sequences(prompts, responses, tokenizer.pad_token_id, device())
    blocks = torch.arange(len(rows), device=device()).split(BLOCK)
    (found,) = score_in_blocks(batch, blocks, lambda block: (response_scores(model, model, block, 1.0).logprobs,))
    return found[batch.response_mask].cpu()


@torch.no_grad()
def reward_scores(run: Path, options: ModelOptions) -> dict[str, Any]:
    """The reward model's class probabilities (M, 3) of the held-out tokens, and its AUC on words."""
    folder = run / "step2_token_reward"
    scorer = load_token_reward_scorer(str(folder / "reward/model"), options)
    module = scorer.module.to(device())
    labelled = read_labels(folder / "samples/samples.jsonl", folder / "labels.jsonl")
    held_out = build_data(labelled, scorer.encoder).held_out
    pairs = []
    for start in range(0, len(held_out), BLOCK):
        items = held_out[start : start + BLOCK]
        batch = scorer.encoder.collate([item.encoded.tokens for item in items])
        logits = module(**{name: value.to(device()) for name, value in batch.items()}).logits.float().cpu()
        pairs += [(row[: len(item.encoded.spans)], item) for row, item in zip(logits, items, strict=True)]
    settings = read_json(folder / "reward/model" / SETTINGS_NAME)
    metrics, _ = held_out_metrics(pairs, torch.tensor(settings["class_weights"]), settings["w"])
    return {"probabilities": torch.cat([row.softmax(-1) for row, _ in pairs]), "word_auc": float(metrics["word_auc"])}


if __name__ == "__main__":
    run_command(main)
