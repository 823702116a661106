"""Step 3 of a random 1.2B model at two shapes: seconds, share of the GEMM peak, and peak memory against the plan.

    python -m benchmarks.gpu.step3 --shape chat        DeepSpeed-Chat's setting: 256 tokens of prompt, 256 of answer
    python -m benchmarks.gpu.step3 --shape queries     512 and 48, four answers a prompt, prompts shared and not

All four models train or score under ZeRO-2, because a single GPU has nothing to shard. They are loaded once, then each
variant makes its own steps. Useful FLOPs are those of `benchmarks/flops.py`: each prompt read once.
"""

from __future__ import annotations

import statistics
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks.flops import Sizes, tppo_step_flops
from benchmarks.gpu.part import Part, compute_dtype, part_parser, start_alone
from benchmarks.measuring import gemm_peak
from benchmarks.step3 import Setup, Shape, make_trainer, prepare, step_config
from common.engine.memory import GIB, free_bytes
from common.errors import run_command
from common.models.loading import load_tokenizer
from common.planning.plan import Machine
from step3_tppo.config import Step3Config
from step3_tppo.models import Models, build_models
from step3_tppo.planning import plan_step3

TARGET = 0.28  # of the GEMM peak
STEPS, WARMUP = 2, 1
TOKENS = (16384, 8192, 4096, 2048, 1024)  # of a pass with gradients: the most that the plan has room for
ROOM = 0.75  # of the free memory, because the plan itself is on trial


class Variant(NamedTuple):
    """How passes read finished responses, and whether decoding is recorded as CUDA graphs."""

    layout: str
    graphs: bool


class Workload(NamedTuple):
    """A shape and what is measured at it."""

    shape: Shape
    variants: dict[str, Variant]


WORKLOADS = {
    "queries": Workload(
        Shape(32, 4, 512, 48),
        {"shared": Variant("shared", False), "padded": Variant("padded", False), "graphs": Variant("shared", True)},
    ),
    "chat": Workload(
        Shape(64, 1, 256, 256), {"padded": Variant("padded", False), "graphs": Variant("padded", True)}
    ),
}  # fmt: skip
SMALL_SHAPES = {"queries": Shape(2, 2, 64, 6), "chat": Shape(2, 1, 32, 16)}


def main() -> None:
    """Measure the variants of one shape one after another; the file is written after each."""
    parser = part_parser(__doc__)
    parser.add_argument("--shape", choices=list(WORKLOADS), required=True, help="Which of the two.")
    options = parser.parse_args()
    part = Part(f"step3_{options.shape}", options.small, options.output.resolve())
    workload = WORKLOADS[options.shape]
    shape = SMALL_SHAPES[options.shape] if part.small else workload.shape
    start_alone()
    with tempfile.TemporaryDirectory() as folder:
        prepare(Path(folder), shape, compute_dtype(), **part.sizes)
        first, *_ = workload.variants.values()
        config = fitted(step_config(folder, "run", Setup(stage=2, layout=first.layout), shape, STEPS))
        models = build_models(config, load_tokenizer(config.actor_path))
        found: dict[str, Any] = {
            "target_share": TARGET, "shape": shape._asdict(), "micro_batch_tokens": config.micro_batch_tokens,
            "gemm_peak_tflops": round(gemm_peak(compute_dtype()) / 1e12, 2), "variants": {},
        }  # fmt: skip
        for name, variant in workload.variants.items():
            row = measured(config, models, shape, variant)
            peak_flops = 1e12 * found["gemm_peak_tflops"]
            row["useful_flop_share"] = round(row["tflop"] * 1e12 / row["seconds"] / peak_flops, 4)
            row["meets_target"] = row["useful_flop_share"] >= TARGET
            found["variants"][name] = row
            print(f"{options.shape}, {name}: {row}", flush=True)
            part.save(found)


def fitted(config: Step3Config) -> Step3Config:
    """`config` with the largest passes that the plan, made for unshared prompts, leaves room for on this machine."""
    for tokens in TOKENS:
        config = replace(config, micro_batch_tokens=tokens, scoring_batch_tokens=2 * tokens)
        if plan_step3(replace(config, sequence_layout="padded"), machine()).peak <= ROOM * machine().memory:
            return config
    return config


def machine() -> Machine:
    """This machine as the planner sees it."""
    cuda = torch.cuda.is_available()
    return Machine(1, free_bytes(torch.device("cuda" if cuda else "cpu")), cuda)


def measured(config: Step3Config, models: Models, shape: Shape, variant: Variant) -> dict[str, Any]:
    """Median seconds of a step and of its phases, and the memory that was planned and taken."""
    config = replace(config, sequence_layout=variant.layout, cuda_graphs=variant.graphs)
    trainer = make_trainer(config, under(models, variant), shape)
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    rows = [trainer.step(number).scalars for number in range(WARMUP + STEPS)][WARMUP:]
    phases = {name: statistics.median(row[name] for row in rows) for name in rows[0] if name.startswith("seconds/")}
    plan = plan_step3(config, machine())
    taken = torch.cuda.max_memory_allocated() / GIB if cuda else None
    return {
        "variant": variant._asdict(),
        "seconds": round(phases["seconds/step"], 4),
        "phases": {name.removeprefix("seconds/"): round(value, 4) for name, value in phases.items()},
        "tflop": tppo_step_flops(Sizes.of(models.actor.module.config), *shape) / 1e12,
        "planned_gib": round(plan.peak / GIB, 3),
        "planned_in": plan.fullest.name,
        "taken_gib": taken and round(taken, 3),
        "planned_over_taken": taken and round(plan.peak / GIB / taken, 3),
    }


def under(models: Models, variant: Variant) -> Models:
    """The same models, set to read and to decode as `variant` says."""
    models.actor.graphs = variant.graphs
    models.critic.module.layout = variant.layout
    return models._replace(scoring=models.scoring._replace(layout=variant.layout))


if __name__ == "__main__":
    run_command(main)
