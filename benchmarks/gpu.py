"""On one CUDA GPU: decoding against the memory-bandwidth roofline, and the useful share of a whole step's FLOPs.

    python benchmarks/gpu.py                   a 1.3B-class model in bf16
    python benchmarks/gpu.py --small           the same code on a small model, also without a GPU

What a decoding pass cannot do without is reading every weight once and the keys and values of every row; these bytes
over its time, against the bandwidth of a large copy measured here. DeepSpeed-Chat's setting is 256 tokens of prompt and
256 of answer; ours is 512 and up to 48, four answers a prompt.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from benchmarks.flops import Sizes
from benchmarks.measuring import on_ranks, read_switches, save
from benchmarks.models import query_tokenizer, random_llama
from benchmarks.step3 import Setup, Shape, prepare, tppo_steps
from common.engine.memory import cache_bytes
from common.errors import run_command
from common.generation.sampling import Sampling, uniform_table
from common.generation.step import DecodeStep

LARGE = {"hidden_size": 2048, "intermediate_size": 5504, "num_hidden_layers": 24, "num_attention_heads": 16}
SMALL = {"hidden_size": 128, "intermediate_size": 344, "num_hidden_layers": 2, "num_attention_heads": 4}
STEPS = {"deepspeed_chat_256_256": Shape(32, 1, 256, 256), "queries_512_48": Shape(16, 4, 512, 48)}
ROWS, PASSES = (1, 8, 32, 64, 128), 40


def main() -> None:
    """Decode at several numbers of rows, then run whole steps; save shares of the two limits."""
    small = read_switches(__doc__, small="The same code on a small model, also without a GPU.").small
    sizes = SMALL if small else LARGE
    found: dict[str, Any] = {"decode": on_ranks(decode_shares, 1, sizes), "steps": {}}
    for name, shape in STEPS.items():
        if small:
            shape = Shape(4, min(shape.samples, 2), shape.prompt_tokens // 8, 16)
        with tempfile.TemporaryDirectory() as folder:
            prepare(Path(folder), shape, **sizes)
            step = on_ranks(tppo_steps, 1, folder, "run", Setup(threads=torch.get_num_threads()), shape, 4)
        seconds = statistics.median(step["seconds"])
        share = step["flops"] / step["peak_flops"] / seconds
        found["steps"][name] = {"seconds": seconds, "useful_flop_share": round(share, 3), "phases": step["phases"]}
        print(f"{name}: {seconds:.2f} s a step, {100 * share:.1f} % of the GEMM peak")
    save("gpu_small" if small else "gpu", found)


@torch.no_grad()
def decode_shares(sizes: dict[str, int]) -> list[dict[str, float]]:
    """For each number of rows: milliseconds of a decoding pass after 512 tokens, and its share of the roofline."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    tokenizer = query_tokenizer()
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    model = random_llama(tokenizer, 1e9, **sizes).to(device, dtype)
    weights = Sizes.of(model.config)
    bandwidth = copy_bandwidth(device)
    rows_found = []
    for rows in ROWS:
        sampling = Sampling(PASSES + 2, samples=1)
        step = DecodeStep(model, sampling, uniform_table(sampling, rows).to(device), rows, 512 + PASSES + 1, True)
        step.read([[5 + place % 1000 for place in range(512)]] * rows, 1, 0, range(rows))
        seconds = []
        for number in range(PASSES):
            begun = time.perf_counter()
            step.draw(rows, 513 + number)
            if device.type == "cuda":
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - begun)
        read = dtype.itemsize * (weights.layer_weights + weights.head_weights)
        read += cache_bytes(model.config, rows, 512 + PASSES // 2, dtype)
        median = statistics.median(seconds[3:])  # the first passes warm up and record
        rows_found.append({"rows": rows, "ms": round(1000 * median, 3),
                           "bandwidth_share": round(read / median / bandwidth, 3)})  # fmt: skip
        print(rows_found[-1], flush=True)
    return rows_found


def copy_bandwidth(device: torch.device) -> float:
    """Bytes a second that a large copy reads and writes."""
    source = torch.zeros(2**30 if device.type == "cuda" else 2**26, dtype=torch.uint8, device=device)
    target, best = torch.empty_like(source), float("inf")
    for _ in range(10):
        begun = time.perf_counter()
        target.copy_(source)
        if device.type == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - begun)
    return 2 * source.numel() / best


if __name__ == "__main__":
    run_command(main)
