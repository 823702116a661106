"""The three steps end to end in bf16 under ZeRO-3 on the GPU (NCCL), and whether their numbers are those of CPUs.

The tiny model of the embedded log goes through every stage in miniature. Meanwhile CPU ranks train step 1 on the same
examples in fp32. Then the models made on the GPU are scored twice, on the GPU in bf16 and on the CPU in fp32. Without a
GPU all of it runs on the CPU, in both precisions.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu.part import Part, read_part
from common.errors import run_command
from common.files import read_json
from common.tracking import read_metrics
from pipeline.hardware import Hardware
from pipeline.options import PipelineOptions, settle
from pipeline.presets import Models
from pipeline.stages import Run, Stage

# What the stages that compute with a model are given beside their precision; step 1 ends with an evaluation.
FLAGS = {
    "step1_sft": ["--zero_stage", "3", "--max_steps", "24", "--eval_steps", "8"],
    "step2_sample": ["--max_train_examples", "96", "--max_dev_examples", "48"],
    "step2_reward": ["--zero_stage", "3"],
    "step3_tppo": ["--zero_stage", "3"],
}  # fmt: skip
# bf16 keeps 8 bits of a number, so that each operation rounds by up to 0.4 %.
TOLERANCES = {
    "sft_dev_loss_relative": 0.01, "sft_dev_loss_in_training_relative": 0.01, "sft_trained_on_cpu_relative": 0.03,
    "sft_logprobs_mean": 0.03, "word_auc": 0.02, "word_auc_in_training": 0.02, "probabilities_mean": 0.02,
    "tppo_dev_loss_relative": 0.01, "tppo_logprobs_mean": 0.03, "rollout_mismatch_mean": 0.03,
}  # fmt: skip


def main() -> None:
    """Run the stages, compare, save; fails if a number is off by more than its tolerance."""
    part = read_part("pipeline", __doc__)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        found: dict[str, Any] = {"seconds": {}}
        gpu, cpu = Path("outputs/gpu"), Path("outputs/cpu")
        other = None
        try:
            for stage in stages("gpu", torch.cuda.device_count()):
                if stage.name == "step1_sft":
                    shutil.copytree(folder / gpu, folder / cpu)
                    other = start(sft_stage("cpu"), folder, "fp32", on_cpu())
                begun = time.monotonic()
                finish(start(stage, folder, "bf16", dict(os.environ)), stage.name)
                found["seconds"][stage.name] = round(time.monotonic() - begun, 1)
                part.save(found)
            finish(other, "step 1 on CPU ranks")
        finally:
            if other is not None and other.poll() is None:
                other.terminate()
        compare(part, found, folder / gpu, folder / cpu)


def compare(part: Part, found: dict[str, Any], gpu: Path, cpu: Path) -> None:
    """Add the numbers of both machines and their distances to `found`, save it, and fail if they do not match."""
    scores = {}
    for dtype, environment in {"bf16": dict(os.environ), "fp32": on_cpu()}.items():
        file = gpu / f"{dtype}.pt"
        flags = ["--run", str(gpu), "--dtype", dtype, "--file", str(file)]
        subprocess.run([sys.executable, "-m", "benchmarks.gpu.scores", *flags], env=environment, check=True)
        scores[dtype] = torch.load(file)
    numbers = {
        "sft_dev_loss": {dtype: -float(score["sft_logprobs"].mean()) for dtype, score in scores.items()}
        | {"in_training": last_dev_loss(gpu), "trained_on_cpu": last_dev_loss(cpu)},
        "word_auc": {dtype: score["word_auc"] for dtype, score in scores.items()}
        | {"in_training": read_json(gpu / "step2_token_reward/reward/metrics.json")["word_auc"]},
        "tppo_dev_loss": {dtype: -float(score["tppo_logprobs"].mean()) for dtype, score in scores.items()},
        "rollout_mismatch": mismatch(gpu),
    }
    distances = distances_of(numbers) | {
        f"{name}_mean": float((scores["bf16"][name] - scores["fp32"][name]).abs().mean())
        for name in ("sft_logprobs", "probabilities", "tppo_logprobs")
    }
    rows = {
        name: {"distance": round(distances[name], 6), "tolerance": limit, "matches": distances[name] <= limit}
        for name, limit in TOLERANCES.items()
    }
    found |= {"numbers": numbers, "compared": rows, "matches": all(row["matches"] for row in rows.values())}
    print(*(f"{name}: {row}" for name, row in {**numbers, **rows}.items()), sep="\n")
    part.save(found)
    if not found["matches"]:
        sys.exit("off by more than its tolerance: " + ", ".join(n for n, row in rows.items() if not row["matches"]))


def distances_of(numbers: dict[str, dict[str, float]]) -> dict[str, float]:
    """How far the numbers of one machine are from those of the other."""
    sft, auc, tppo = (numbers[name] for name in ("sft_dev_loss", "word_auc", "tppo_dev_loss"))
    return {
        "sft_dev_loss_relative": abs(sft["bf16"] / sft["fp32"] - 1),
        "sft_dev_loss_in_training_relative": abs(sft["in_training"] / sft["fp32"] - 1),
        "sft_trained_on_cpu_relative": abs(sft["in_training"] / sft["trained_on_cpu"] - 1),
        "word_auc": abs(auc["bf16"] - auc["fp32"]),
        "word_auc_in_training": abs(auc["in_training"] - auc["fp32"]),
        "tppo_dev_loss_relative": abs(tppo["bf16"] / tppo["fp32"] - 1),
        "rollout_mismatch_mean": numbers["rollout_mismatch"]["mean"],
    }


def stages(name: str, gpus: int) -> list[Stage]:
    """The stages of a run in miniature up to step 3, on one GPU or one CPU rank."""
    options = settle(PipelineOptions(run_name=name, preset="tiny", miniature=True), anew=True)
    run = Run(options, Hardware(gpus, 1), Models("", ""), "tiny", None, [])
    return [stage for stage in run.stages() if stage.name != "evaluate"]


def sft_stage(name: str) -> Stage:
    """Step 1 of a run on one CPU rank."""
    return next(stage for stage in stages(name, 0) if stage.name == "step1_sft")


def start(stage: Stage, folder: Path, dtype: str, environment: dict[str, str]) -> subprocess.Popen:
    """Begin a stage of a run in `folder`/outputs; the steps' programs in this precision, under ZeRO-3."""
    more = ["--dtype", dtype, *FLAGS[stage.name]] if stage.name in FLAGS else []
    print(f"== {stage.name}", *more, flush=True)
    return subprocess.Popen([*stage.command, *more], cwd=folder, env=environment)


def finish(process: subprocess.Popen, name: str) -> None:
    """Wait for a process; its failure ends this one."""
    if status := process.wait():
        sys.exit(f"{name} failed with exit status {status}")


def on_cpu() -> dict[str, str]:
    """The environment of a process that must not see the GPU."""
    return os.environ | {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}


def last_dev_loss(run: Path) -> float:
    """Step 1's loss on the dev users after its last evaluation."""
    rows = [row for row in read_metrics(run / "step1_sft/metrics.jsonl") if "eval_loss" in row]
    return rows[-1]["eval_loss"]


def mismatch(run: Path) -> dict[str, float]:
    """How far log-probs of decoding were from those of training in step 3: the mean over its steps, the maximum."""
    rows = [row for row in read_metrics(run / "step3_tppo/metrics.jsonl") if "rollout/mismatch_mean" in row]
    return {
        "mean": sum(row["rollout/mismatch_mean"] for row in rows) / len(rows),
        "max": max(row["rollout/mismatch_max"] for row in rows),
    }


if __name__ == "__main__":
    run_command(main)
