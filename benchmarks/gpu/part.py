"""What the parts share: their flags, their result files, and a random model on the GPU."""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from benchmarks.measuring import RESULTS, free_port, save
from benchmarks.models import query_tokenizer, random_llama
from common.engine import distributed

LARGE = {"hidden_size": 2048, "intermediate_size": 5504, "num_hidden_layers": 24, "num_attention_heads": 16}
SMALL = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}


class Part(NamedTuple):
    """A part of the measurements: its `name`, whether it runs `small`, and the folder of its results."""

    name: str
    small: bool
    output: Path

    @property
    def sizes(self) -> dict[str, int]:
        """Of the random model: 1.2 billion weights beside its embeddings, or a few thousand."""
        return SMALL if self.small else LARGE

    def save(self, content: Mapping[str, Any]) -> None:
        """Write the result file; a part that measures several things writes it after each."""
        command = f"python -m benchmarks.gpu.{Path(sys.argv[0]).stem} {' '.join(sys.argv[1:])}".strip()
        self.output.mkdir(parents=True, exist_ok=True)
        save("", {"command": command, "small": self.small, **content}, str(self.output / f"{self.name}.json"))


def part_parser(description: str | None) -> argparse.ArgumentParser:
    """The flags of every part."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="The same code on tiny models, also without a GPU.")
    parser.add_argument("--output", type=Path, default=RESULTS / "gpu", help="Folder of the result files.")
    return parser


def read_part(name: str, description: str | None) -> Part:
    """The part that the command line describes, where it has no flags of its own."""
    options = part_parser(description).parse_args()
    return Part(name, options.small, options.output.resolve())


def device() -> torch.device:
    """The GPU if there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def compute_dtype() -> torch.dtype:
    """bf16 on the GPU, fp32 without one."""
    return torch.bfloat16 if torch.cuda.is_available() else torch.float32


def random_model(part: Part) -> tuple[LlamaForCausalLM, PreTrainedTokenizerFast]:
    """A random Llama, made on the device, and its tokenizer; its answers hardly ever end.

    Its weights are in the precision of training; its buffers (rotary positions) stay in fp32, as DeepSpeed leaves them.
    """
    tokenizer = query_tokenizer()
    with device():
        model = random_llama(tokenizer, **part.sizes)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(compute_dtype())
    return model, tokenizer


def random_prompts(count: int, tokens: int) -> list[list[int]]:
    """Prompts of random tokens."""
    return torch.randint(5, 1000, (count, tokens), generator=torch.Generator().manual_seed(0)).tolist()


def start_alone() -> None:
    """A process group of this process alone: NCCL on a GPU."""
    os.environ["MASTER_PORT"] = str(free_port())
    distributed.start()


def wait() -> None:
    """Until the GPU has done all that it was given."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def seconds_of(action: Callable[[], Any], runs: int, warmup: int = 2) -> float:
    """Mean seconds of `runs` calls in a row, after some that do not count."""
    for _ in range(warmup):
        action()
    wait()
    begun = time.perf_counter()
    for _ in range(runs):
        action()
    wait()
    return (time.perf_counter() - begun) / runs
