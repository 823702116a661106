"""How far the log-probs of decoding are from those of a training pass, in bf16, and both from fp32.

PPO's ratio compares two passes: what differs between them without any update is noise in the ratio.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from benchmarks.gpu.part import random_model, random_prompts, read_part
from common.errors import run_command
from common.generation.generate import Generated, generate_responses
from common.generation.sampling import Sampling
from common.models.layouts import Layout
from common.models.response_scores import ScoringOptions, response_scores
from common.models.sequences import SequenceBatch, pad_sequences, score_in_blocks

PROMPTS, PROMPT, ANSWER, SAMPLES = 16, 512, 48, 4
SMALL_PROMPTS, SMALL_PROMPT, SMALL_ANSWER = 2, 32, 6
BLOCK = 16  # responses a pass


def main() -> None:
    """Sample, score what was sampled in several ways, save the distances in nats; then sample with CUDA graphs."""
    part = read_part("mismatch", __doc__)
    model, tokenizer = random_model(part)
    prompts = random_prompts(SMALL_PROMPTS, SMALL_PROMPT) if part.small else random_prompts(PROMPTS, PROMPT)
    sampling = Sampling(SMALL_ANSWER if part.small else ANSWER, samples=SAMPLES)
    plain = generated(model, tokenizer, prompts, sampling, graphs=False)
    repeated = [prompt for prompt in prompts for _ in range(SAMPLES)]
    batch = pad_sequences(repeated, [response.ids for response in plain], 0, model.device, SAMPLES)
    mask = batch.response_mask
    sampled = torch.zeros(mask.shape, device=mask.device)
    sampled[mask] = torch.tensor([value for response in plain for value in response.logprobs], device=mask.device)
    padded, shared = (scores(model, batch, layout) for layout in ("padded", "shared"))
    found: dict[str, Any] = {
        "dtype": str(model.dtype).removeprefix("torch."),
        "tokens": int(mask.sum()),
        "decoding_from_padded": distance(sampled, padded, mask),
        "decoding_from_shared": distance(sampled, shared, mask),
        "shared_from_padded": distance(shared, padded, mask),
    }
    part.save(found)
    exact = scores(copy.deepcopy(model).float(), batch, "padded")
    found |= {
        "padded_from_fp32": distance(padded, exact, mask), "decoding_from_fp32": distance(sampled, exact, mask)
    }  # fmt: skip
    part.save(found)
    recorded = generated(model, tokenizer, prompts, sampling, graphs=True)
    found["same_tokens_with_graphs"] = share_of_equal(plain, recorded)
    print(*(f"{name}: {value}" for name, value in found.items()), sep="\n")
    part.save(found)


def generated(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, prompts: list[list[int]], sampling: Sampling,
    graphs: bool,
) -> list[Generated]:
    """Samples of the model, all decoded at once."""
    return generate_responses(model, tokenizer, prompts, sampling, len(prompts) * SAMPLES, graphs=graphs)


@torch.no_grad()
def scores(model: LlamaForCausalLM, batch: SequenceBatch, layout: Layout) -> torch.Tensor:
    """Log-probs (B, T) of the responses by a pass like the training's."""

    def forward(block: SequenceBatch) -> tuple[torch.Tensor]:
        return (response_scores(model, model, block, 1.0, ScoringOptions(layout)).logprobs,)

    return score_in_blocks(batch, list(blocks(batch)), forward)[0]


def blocks(batch: SequenceBatch) -> Iterator[torch.Tensor]:
    """All rows, a few at a time; the rows of a prompt stay together."""
    yield from torch.arange(len(batch.input_ids), device=batch.input_ids.device).split(BLOCK)


def distance(one: torch.Tensor, other: torch.Tensor, mask: torch.Tensor) -> dict[str, float]:
    """Mean and maximum of the absolute difference where `mask` is; all (B, T)."""
    gap = (one - other).abs()[mask]
    return {"mean": float(gap.mean()), "max": float(gap.max())}


def share_of_equal(one: list[Generated], other: list[Generated]) -> float:
    """Share of the responses that are the same, token by token."""
    return sum(a.ids == b.ids for a, b in zip(one, other, strict=True)) / len(one)


if __name__ == "__main__":
    run_command(main)
