"""Decoding of a random 1.2B model against the roofline of memory bandwidth, with and without CUDA graphs.

What a decoding pass cannot do without is reading every weight once and the keys and values of every row; these bytes
over its time, against the bandwidth of a large copy measured here.
"""

from __future__ import annotations

import statistics
import time
from typing import Any

import torch
from transformers import LlamaForCausalLM

from benchmarks.flops import Sizes
from benchmarks.gpu.machine import copy_bandwidth
from benchmarks.gpu.part import device, random_model, random_prompts, read_part, wait
from common.engine.memory import cache_bytes
from common.errors import run_command
from common.generation.sampling import Sampling, uniform_table
from common.generation.step import DecodeStep

TARGET = 0.6  # of the bandwidth of a copy
ROWS, PROMPT, PASSES, WARMUP = (1, 8, 32, 64, 128), 512, 40, 4  # the first passes warm up and record
SMALL_ROWS, SMALL_PROMPT, SMALL_PASSES = (1, 2), 32, 6


def main() -> None:
    """Decode at several numbers of rows; the file is written after each."""
    part = read_part("decoding", __doc__)
    model, _ = random_model(part)
    bandwidth = copy_bandwidth(device())
    found: dict[str, Any] = {"target_share": TARGET, "copy_bandwidth_gb_s": round(bandwidth / 1e9, 1), "rows": []}
    lengths = (SMALL_PROMPT, SMALL_PASSES) if part.small else (PROMPT, PASSES)
    for graphs in (False, True):
        for rows in SMALL_ROWS if part.small else ROWS:
            row = {"rows": rows, "graphs": graphs, **decoded(model, rows, *lengths, graphs, bandwidth)}
            found["rows"].append(row)
            found["best_share"] = max(row["bandwidth_share"] for row in found["rows"])
            found["meets_target"] = found["best_share"] >= TARGET
            print(row, flush=True)
            part.save(found)


@torch.no_grad()
def decoded(
    model: LlamaForCausalLM, rows: int, prompt: int, passes: int, graphs: bool, bandwidth: float
) -> dict[str, float]:
    """Median milliseconds of a pass over `rows` rows after `prompt` tokens, and its share of the roofline."""
    sampling = Sampling(passes + 2, samples=1)
    uniforms = uniform_table(sampling, rows).to(model.device)
    step = DecodeStep(model, sampling, uniforms, rows, prompt + passes + 1, graphs)
    for row, ids in enumerate(random_prompts(rows, prompt)):
        step.read([ids], 1, row, [row])
    seconds = []
    for number in range(passes):
        begun = time.perf_counter()
        step.draw(rows, prompt + 1 + number)
        wait()
        seconds.append(time.perf_counter() - begun)
    sizes = Sizes.of(model.config)
    needed = model.dtype.itemsize * (sizes.layer_weights + sizes.head_weights)
    needed += cache_bytes(model.config, rows, prompt + passes // 2, model.dtype)
    median = statistics.median(seconds[WARMUP:])
    return {"ms": round(1000 * median, 3), "bandwidth_share": round(needed / median / bandwidth, 4)}


if __name__ == "__main__":
    run_command(main)
