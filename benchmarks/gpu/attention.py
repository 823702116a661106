"""Shared prompts under SDPA with a mask and under FlexAttention, beside prompts that are read once for each answer.

Passes of a random 1.2B model over four prompts of 512 tokens with four answers of 48: scoring without gradients, and a
forward and backward pass. FlexAttention is compiled at its first call, which does not count.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from transformers import LlamaForCausalLM

from benchmarks.gpu.part import random_model, random_prompts, read_part, seconds_of
from common.engine.memory import GIB
from common.errors import run_command
from common.models.layouts import Layout
from common.models.response_scores import ScoringOptions, response_scores
from common.models.sequences import SequenceBatch, pad_sequences

PROMPTS, PROMPT, ANSWER, SAMPLES, RUNS = 4, 512, 48, 4, 10
SMALL_PROMPTS, SMALL_PROMPT, SMALL_ANSWER, SMALL_RUNS = 2, 32, 6, 1


class Way(NamedTuple):
    """An attention kernel and how sequences are laid out."""

    kernel: str
    layout: Layout


def main() -> None:
    """Time each way, and compare its log-probs with the first one's; the file is written after each."""
    part = read_part("attention", __doc__)
    model, _ = random_model(part)
    prompts, tokens, answer = (
        (SMALL_PROMPTS, SMALL_PROMPT, SMALL_ANSWER) if part.small else (PROMPTS, PROMPT, ANSWER)
    )
    repeated = [prompt for prompt in random_prompts(prompts, tokens) for _ in range(SAMPLES)]
    batch = pad_sequences(repeated, random_prompts(len(repeated), answer), 0, model.device, SAMPLES)
    ways = [Way("sdpa", "padded"), Way("sdpa", "shared")]
    if torch.cuda.is_available():
        ways.append(Way("flex_attention", "shared"))
    else:
        print("flex_attention: skipped, it needs a CUDA GPU")
    found: dict[str, Any] = {"ways": {}}
    reference = None
    for way in ways:
        row, logprobs = measured(model, batch, way, SMALL_RUNS if part.small else RUNS)
        reference = logprobs if reference is None else reference
        row["logprobs_from_first_max"] = float((logprobs - reference).abs().max())
        found["ways"][f"{way.layout}, {way.kernel}"] = row
        print(f"{way}: {row}", flush=True)
        part.save(found)


def measured(
    model: LlamaForCausalLM, batch: SequenceBatch, way: Way, runs: int
) -> tuple[dict[str, float], torch.Tensor]:
    """Seconds of both passes and the memory that they add; and the log-probs (B, T)."""
    model.set_attn_implementation(way.kernel)
    at_rest = 0
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        at_rest = torch.cuda.memory_allocated()

    def score() -> torch.Tensor:
        return response_scores(model, model, batch, 1.0, ScoringOptions(way.layout)).logprobs

    def train() -> None:
        score().mean().backward()
        model.zero_grad()

    with torch.no_grad():
        logprobs = score()
        scoring = seconds_of(score, runs)
    model.train()
    training = seconds_of(train, runs)
    model.eval()
    row = {"scoring_seconds": round(scoring, 5), "training_seconds": round(training, 5)}
    if torch.cuda.is_available():
        row["added_gib"] = round((torch.cuda.max_memory_allocated() - at_rest) / GIB, 3)
    return row, logprobs


if __name__ == "__main__":
    run_command(main)
