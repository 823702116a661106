"""Rollout generation under ZeRO-3: ours against what others do with the same model, prompts and memory.

    python benchmarks/generation.py            two CPU ranks (or one GPU), about 8 minutes

Peers: `generate` under ZeRO-3's hooks with synced ranks; weights gathered once, then `generate` (what TRL does);
DeepSpeed's own `HybridEngineRollout`. All decode a rank's whole share at once, sample at temperature 1 and stop at 48
tokens; a response ends with probability 1/12 after each token in every system.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import deepspeed
import torch
from deepspeed.runtime.rollout import HybridEngineRollout
from deepspeed.runtime.rollout.base import RolloutRequest, SamplingConfig
from transformers import GenerationConfig

from benchmarks.measuring import alternating, median_ratio, on_ranks, read_switches, save
from benchmarks.models import query_tokenizer, random_llama
from common.engine import distributed
from common.engine.hybrid import HybridEngine
from common.errors import run_command
from common.generation.sampling import Sampling

RUNS = 5
MEAN_ANSWER, MOST_TOKENS = 12, 48
# Prompts of a rank, their fewest and most tokens, samples of each.
WORKLOADS = {"equal_n1": (32, 256, 256, 1), "mixed_n1": (32, 64, 512, 1), "mixed_n4": (12, 64, 512, 4)}
OURS, PEERS = "ours", ("sharded_generate", "gathered_generate", "deepspeed_rollout")

Prompts = Sequence[Sequence[int]]


def main() -> None:
    """Measure every workload, print and save the ratios."""
    read_switches(__doc__)
    ranks = 1 if torch.cuda.is_available() else 2
    found = on_ranks(measure, ranks)
    ratios = {
        workload: {peer: median_ratio(seconds[peer], seconds[OURS]) for peer in PEERS}
        for workload, seconds in found["seconds"].items()
    }
    for workload, row in ratios.items():
        print(workload, *(f"{peer} / ours {ratio:.2f}" for peer, ratio in row.items()), sep="  ")
    save("generation", {"ranks": ranks, "ratios": ratios, **found})


def measure() -> dict[str, Any]:
    """Seconds of every run, and how long answers were in ours."""
    tokenizer = query_tokenizer()
    seconds, lengths = {}, {}
    for workload, (count, fewest, most, samples) in WORKLOADS.items():
        hybrid = HybridEngine(zero3_engine(random_llama(tokenizer, MEAN_ANSWER)))
        prompts = _prompts(count, fewest, most, len(tokenizer))
        systems = Systems(hybrid, tokenizer, prompts, samples)
        seconds[workload] = alternating({name: getattr(systems, name) for name in (OURS, *PEERS)}, RUNS)
        lengths[workload] = round(statistics.mean(systems.lengths), 2)
    return {"seconds": seconds, "mean_answer_tokens": lengths}


class Systems:
    """The four ways to answer this rank's prompts; each method takes the number of the run."""

    def __init__(self, hybrid: HybridEngine, tokenizer: Any, prompts: Prompts, samples: int) -> None:
        self._hybrid = hybrid
        self._tokenizer = tokenizer
        self._prompts = prompts
        self._samples = samples
        self._rollout = HybridEngineRollout(hybrid.engine, tokenizer)
        self.lengths: list[int] = []

    def ours(self, run: int) -> None:
        """The hybrid engine."""
        sampling = Sampling(MOST_TOKENS, samples=self._samples, seed=run + 1000 * distributed.rank())
        with self._hybrid.inference():
            made = self._hybrid.generate(
                self._tokenizer, self._prompts, sampling, rows=len(self._prompts) * self._samples
            )
        self.lengths += [len(response.ids) for response in made]

    def sharded_generate(self, run: int) -> None:
        """`generate` while every layer's weights are gathered anew for every token."""
        self._generate(run, synced=distributed.world_size() > 1)

    def gathered_generate(self, run: int) -> None:
        """Weights gathered once, then `generate`."""
        with self._hybrid.inference():
            self._generate(run, synced=False)

    def deepspeed_rollout(self, run: int) -> None:
        """DeepSpeed's rollout engine."""
        torch.manual_seed(run + 1000 * distributed.rank())
        ids, mask = _left_padded(self._prompts, self._tokenizer.pad_token_id, self._hybrid.module.device)
        self._rollout.generate(
            RolloutRequest(ids, mask),
            SamplingConfig(
                max_new_tokens=MOST_TOKENS, temperature=1.0, top_p=1.0, top_k=0, n_samples_per_prompt=self._samples
            ),
        )

    @torch.no_grad()
    def _generate(self, run: int, synced: bool) -> None:
        torch.manual_seed(run + 1000 * distributed.rank())
        rows = [prompt for prompt in self._prompts for _ in range(self._samples)]
        ids, mask = _left_padded(rows, self._tokenizer.pad_token_id, self._hybrid.module.device)
        config = GenerationConfig(
            max_new_tokens=MOST_TOKENS, do_sample=True, temperature=1.0, top_p=1.0, top_k=0,
            eos_token_id=self._tokenizer.eos_token_id, pad_token_id=self._tokenizer.pad_token_id,
        )  # fmt: skip
        self._hybrid.module.generate(ids, attention_mask=mask, generation_config=config, synced_gpus=synced)


def zero3_engine(model: torch.nn.Module, **zero: float) -> deepspeed.DeepSpeedEngine:
    """`model` under ZeRO-3 with AdamW and the settings `zero`."""
    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4),
        config={
            "train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 3, **zero},
            "steps_per_print": 1_000_000_000,
        },
    )  # fmt: skip
    return engine


def _prompts(count: int, fewest: int, most: int, vocabulary: int) -> list[list[int]]:
    """Random ids, lengths spread evenly, in a random order; others on every rank."""
    generator = torch.Generator().manual_seed(distributed.rank())
    lengths = torch.linspace(fewest, most, count).round().long()[torch.randperm(count, generator=generator)]
    return [torch.randint(2, vocabulary, (int(length),), generator=generator).tolist() for length in lengths]


def _left_padded(prompts: Prompts, pad: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    width = max(map(len, prompts))
    ids = torch.tensor([[pad] * (width - len(prompt)) + list(prompt) for prompt in prompts], device=device)
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=device)
    return ids, mask


if __name__ == "__main__":
    run_command(main)
