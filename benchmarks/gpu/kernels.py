"""Step 3 with what only some machines have: fused AdamW, Liger's kernels, QLoRA (bitsandbytes), and FlexAttention.

Each runs on its own, beside a step without it, on a random model of 0.2B weights. A missing package leaves its variant
out; a variant that fails is recorded, and the others go on.
"""

from __future__ import annotations

import importlib.util
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks.gpu.part import SMALL, compute_dtype, read_part
from benchmarks.measuring import on_ranks, peak_memory
from benchmarks.step3 import Setup, Shape, make_trainer, prepare, step_config
from common.errors import run_command
from common.models.loading import load_tokenizer
from step3_tppo.models import build_models

MEDIUM = {"hidden_size": 1024, "intermediate_size": 2752, "num_hidden_layers": 16, "num_attention_heads": 16}
SHAPE, SMALL_SHAPE = Shape(16, 4, 512, 48), Shape(2, 2, 48, 6)
STEPS, WARMUP = 2, 1


class Variant(NamedTuple):
    """Step 3's flags, and the module that they need; '' for none. `cuda`: whether they need a GPU."""

    flags: dict[str, Any]
    module: str = ""
    cuda: bool = False


ADAPTERS = {"lora_r": 16, "critic_lora_r": 16}
VARIANTS = {
    "plain": Variant({}),
    "fused_adam": Variant({"fused_adam": True}),
    "liger": Variant({"liger": True}, "liger_kernel", cuda=True),
    "lora": Variant(ADAPTERS),
    "qlora": Variant(ADAPTERS | {"quantize": "nf4"}, "bitsandbytes", cuda=True),
    "flex_attention": Variant({"attn_implementation": "flex_attention"}, "triton", cuda=True),
}


def main() -> None:
    """Run every variant that can run here; the file is written after each."""
    part = read_part("kernels", __doc__)
    shape = SMALL_SHAPE if part.small else SHAPE
    found: dict[str, Any] = {"shape": shape._asdict(), "variants": {}}
    with tempfile.TemporaryDirectory() as folder:
        prepare(Path(folder), shape, compute_dtype(), **(SMALL if part.small else MEDIUM))
        for name, variant in VARIANTS.items():
            found["variants"][name] = row = tried(folder, name, variant, shape)
            print(f"{name}: {row}", flush=True)
            part.save(found)
    if failed := [name for name, row in found["variants"].items() if "error" in row]:
        sys.exit(f"failed: {', '.join(failed)}")


def tried(folder: str, name: str, variant: Variant, shape: Shape) -> dict[str, Any]:
    """What a variant takes, why it was left out, or how it failed."""
    if variant.cuda and not torch.cuda.is_available():
        return {"skipped": "needs a CUDA GPU"}
    if variant.module and importlib.util.find_spec(variant.module) is None:
        return {"skipped": f"needs {variant.module}, which is not installed"}
    try:
        return on_ranks(steps_of, 1, folder, name, variant.flags, shape)
    except Exception as error:  # of any library: the other variants are worth knowing all the same
        return {"error": str(error)[-2000:]}


def steps_of(folder: str, name: str, flags: dict[str, Any], shape: Shape) -> dict[str, Any]:
    """Median seconds of a step and of its updates, and what the process held at most."""
    torch.set_num_threads(1)
    config = step_config(folder, name, Setup(stage=2), shape, STEPS, **flags)
    models = build_models(config, load_tokenizer(config.actor_path))
    trainer = make_trainer(config, models, shape)
    rows = [trainer.step(number).scalars for number in range(WARMUP + STEPS)][WARMUP:]
    seconds = {name: statistics.median(row[f"seconds/{name}"] for row in rows) for name in ("step", "update")}
    return {
        **{f"{name}_seconds": round(value, 4) for name, value in seconds.items()},
        "peak_mib": round(peak_memory() / 2**20),
    }


if __name__ == "__main__":
    run_command(main)
