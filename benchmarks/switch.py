"""What it costs to step from ZeRO-3 training into generation and back, and what each mode holds in memory.

    python benchmarks/switch.py                two CPU ranks (or one GPU), about 2 minutes
"""

from __future__ import annotations

import ctypes
import gc
import statistics
import sys
import tempfile
from contextlib import nullcontext
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import psutil
import torch

from benchmarks.generation import zero3_engine
from benchmarks.measuring import on_ranks, read_switches, save, timed
from benchmarks.models import query_tokenizer, random_llama
from benchmarks.peers import peak_memory
from benchmarks.step3 import Setup, Shape, prepare, tppo_steps
from common.config import LoraOptions
from common.engine import distributed
from common.engine.adapters import merged_adapters
from common.engine.hybrid import HybridEngine
from common.engine.memory import gathered_bytes
from common.engine.offload import resting_optimizers
from common.errors import run_command
from common.models.loading import apply_lora

SWITCHES = 21
WIDE = {"hidden_size": 1024, "intermediate_size": 2752, "num_hidden_layers": 8, "num_attention_heads": 16}
# By default ZeRO-3 keeps a billion gathered weights, more than this model has: what is sharded would never be let go.
FEW_AT_A_TIME = {
    "stage3_max_live_parameters": 1.3e7, "stage3_max_reuse_distance": 1.3e7, "stage3_prefetch_bucket_size": 1e6,
}  # fmt: skip
MODES = ("training", "gathered", "sharded")
MIB = 2**20


def main() -> None:
    """Switches of a small model beside its whole step, then memory of a larger one in each mode."""
    read_switches(__doc__)
    ranks = 1 if torch.cuda.is_available() else 2
    switches = on_ranks(switch_seconds, ranks)
    with tempfile.TemporaryDirectory() as folder:
        prepare(Path(folder), Shape())
        step = on_ranks(tppo_steps, ranks, folder, "switch", Setup(ranks, 1, 3), Shape(), 4)
    memory = {mode: on_ranks(memory_of, ranks, mode) for mode in MODES}
    medians = {name: statistics.median(seconds) for name, seconds in switches.items()}
    step_seconds = statistics.median(step["seconds"])
    share = medians["plain"] / step_seconds
    print(f"a switch takes {1000 * medians['plain']:.1f} ms, {100 * share:.2f} % of a step of {step_seconds:.2f} s")
    for mode, row in memory.items():
        print(f"{mode}: {row}")
    save("switch", {
        "ranks": ranks, "switch_share": round(share, 4), "step_seconds": step_seconds,
        "median_ms": {name: round(1000 * value, 2) for name, value in medians.items()}, "memory_mib": memory,
        "seconds": switches,
    })  # fmt: skip


def switch_seconds() -> dict[str, list[float]]:
    """Seconds of entering and leaving inference; with optimisers put to rest; with adapters merged."""
    tokenizer = query_tokenizer()
    hybrid = HybridEngine(zero3_engine(random_llama(tokenizer)))
    _train_once(hybrid)
    found = {
        "plain": [timed(lambda: _switch(hybrid)) for _ in range(SWITCHES)],
        "with_resting_optimizer": [timed(lambda: _switch(hybrid, rest=True)) for _ in range(SWITCHES)],
    }
    adapted = HybridEngine(zero3_engine(apply_lora(random_llama(tokenizer), LoraOptions(lora_r=16))))
    found["with_merged_adapters"] = [timed(lambda: _switch(adapted)) for _ in range(SWITCHES)]
    return {name: [round(value, 6) for value in seconds[1:]] for name, seconds in found.items()}


def _switch(hybrid: HybridEngine, rest: bool = False) -> None:
    resting = resting_optimizers(hybrid.engine) if rest else nullcontext()
    with resting, hybrid.inference() as module, merged_adapters(module):
        pass


def memory_of(mode: str) -> dict[str, float]:
    """MiB of this rank at its highest, above what it held when the model was sharded; and what gathering adds."""
    hybrid = HybridEngine(zero3_engine(random_llama(query_tokenizer(), **WIDE), **FEW_AT_A_TIME), "sharded")
    _train_once(hybrid)
    forget_peak()
    before = held_memory()
    if mode == "training":
        _train_once(hybrid)
    else:
        hybrid.weights = mode
        with hybrid.inference() as module:
            module(input_ids=torch.arange(16, device=module.device).unsqueeze(0))
    return {
        "above_rest": round((peak_memory() - before) / MIB, 1),
        "at_rest": round(before / MIB, 1),
        "whole_weights": round(gathered_bytes(hybrid.engine) / MIB, 1),
    }


def _train_once(hybrid: HybridEngine) -> None:
    ids = torch.arange(2, 34, device=hybrid.module.device).view(2, 16) + distributed.rank()
    hybrid.engine.backward(hybrid.engine(input_ids=ids, labels=ids).loss)
    hybrid.engine.step()


def held_memory() -> int:
    """Bytes that this process holds now: on its GPU, or of the host's memory."""
    return torch.cuda.memory_allocated() if torch.cuda.is_available() else psutil.Process().memory_info().rss


def forget_peak() -> None:
    """Begin the high-water mark anew; on the CPU, after giving back what was freed."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    else:
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")


if __name__ == "__main__":
    run_command(main)
