"""What a run will hold on each GPU, whether that fits, what to change if not, and how long it takes. Loads no weights.

    python scripts/plan.py --step 3 --config step3_tppo/configs/recipe.yaml step3_tppo/configs/8x80gb_full.yaml \\
        --gpus 8 --gpu_memory 80 --actor_path PATH_OR_HUB_NAME [any flag of the step]

Where models are named, a folder, a hub name, or a config.json will do: no weights are read. See docs/planning.md.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("DS_ACCELERATOR", "cpu")  # a plan needs no GPU

from common.config import parse_config
from common.engine.memory import GIB
from common.errors import InputError, run_command
from common.planning.advice import Change, advice_text, advise
from common.planning.plan import Machine, Plan, shown
from common.planning.trainer import trainer_changes
from step1_sft.config import SftConfig
from step1_sft.planning import plan_step1
from step2_token_reward.config import Step2Config
from step2_token_reward.planning import plan_step2
from step3_tppo.config import Step3Config
from step3_tppo.planning import plan_step3, step3_changes


class Step(NamedTuple):
    """A step's config, its plan, what can be changed in it, and the setting that names its model."""

    config: type
    plan: Callable[[Any, Machine], Plan]
    changes: Callable[[Any, Machine], Iterable[Change]]
    model: str


STEPS = {
    1: Step(SftConfig, plan_step1, trainer_changes, "model_name_or_path"),
    2: Step(Step2Config, plan_step2, trainer_changes, "model_name_or_path"),
    3: Step(Step3Config, plan_step3, step3_changes, "actor_path"),
}
LARGE_BUCKETS = 0.1  # of a GPU's memory
ELSEWHERE = ("output_dir", "data_dir", "samples", "labels")  # a run needs them, a plan does not


def main() -> None:
    """Print the plan, and advice where it does not fit."""
    options, flags = _parser().parse_known_args()
    step = STEPS[options.step]
    config = parse_config(step.config, flags)
    if not getattr(config, step.model):
        raise InputError(f"--{step.model} is missing: a model folder, a hub name, or a config.json")
    if min(options.gpus, options.nodes, options.gpu_memory, options.achieved_tflops, options.achieved_bandwidth) <= 0:
        raise InputError("--gpus, --nodes, --gpu_memory, --achieved_tflops and --achieved_bandwidth are above 0")
    config = _complete(config, step.model)
    machine = Machine(
        ranks=options.gpus * options.nodes,
        memory=int(options.gpu_memory * GIB),
        flops=options.achieved_tflops * 1e12,
        bandwidth=options.achieved_bandwidth * 1e9,
    )
    plan = step.plan(config, machine)
    print(f"{plan.title}\n\n{plan.table()}\n\n{plan.summary()}\n{plan.time()}")
    for note in (*plan.notes, *_note_on_buckets(plan)):
        print(note)
    if plan.host:
        print(f"host memory: {plan.host * options.gpus / GIB:.1f} GiB a node for what is offloaded")
    if plan.verdict != "fits":
        print(f"\n{advice_text(advise(config, machine, step.plan, step.changes(config, machine)))}")


def _note_on_buckets(plan: Plan) -> list[str]:
    """DeepSpeed's own buckets of half a billion gradients are large for a small GPU."""
    size = max(phase.parts.get("buckets", 0) for phase in plan.phases)
    if size < LARGE_BUCKETS * plan.machine.memory:
        return []
    return [f"gradients' buckets take {shown(size)}: set a smaller reduce_bucket_size in --deepspeed_config FILE.json"]


def _complete(config: Any, model: str) -> Any:
    """The config with stand-ins for what it lacks and a plan does not read."""
    names = {field.name for field in dataclasses.fields(config)}
    missing = {name: "-" for name in ELSEWHERE if name in names and not getattr(config, name)}
    if "reward_path" in names and not config.reward_path:
        missing["reward_path"] = getattr(config, model)
    if config.dtype == "auto":
        missing["dtype"] = "bf16"  # what it stands for on the GPUs that are planned
    return dataclasses.replace(config, **missing)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--step", type=int, choices=STEPS, required=True, help="Which step; its own flags follow.")
    parser.add_argument("--gpus", type=int, default=8, help="GPUs a node (8).")
    parser.add_argument("--nodes", type=int, default=1, help="Nodes (1).")
    parser.add_argument("--gpu_memory", type=float, default=80, help="GiB of each GPU (80).")
    parser.add_argument(
        "--achieved_tflops", type=float, default=200, help="TFLOP/s that a GPU achieves in training (200: about 20 %% "
        "of an H100's bf16 peak, 65 %% of an A100's).",
    )
    parser.add_argument(
        "--achieved_bandwidth", type=float, default=1500, help="GB/s at which a GPU reads weights and keys while it "
        "decodes (1500: about half of an H100's, three quarters of an A100's).",
    )
    return parser


if __name__ == "__main__":
    run_command(main)
