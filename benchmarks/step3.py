"""A whole TPPO step against a step of TRL's RLOO trainer, on the same model, prompts, samples and tokens.

    pip install -r benchmarks/requirements.txt
    python benchmarks/step3.py                 about 5 minutes on two cores
    python benchmarks/step3.py --profile       where the time of our step goes, kernel by kernel

Ours rolls out, scores with four models and updates two; RLOO rolls out, scores with two and updates one, its reward
being a Python function that costs nothing. Both take 8 prompts of up to 96 tokens, 4 samples of 32 tokens each, and
update once. TRL runs in one process of two threads; ours the same way, and once more on two ranks of one core under
ZeRO-3, as it would run on several GPUs.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch.profiler import ProfilerActivity, profile
from transformers import PreTrainedTokenizerBase

from benchmarks.flops import Sizes, tppo_step_flops
from benchmarks.measuring import gemm_peak, median_ratio, on_ranks, peak_memory, read_switches, save
from benchmarks.models import query_tokenizer, random_llama, save_reward_model
from common.data.examples import load_examples
from common.data.prompts import PromptBuilder
from common.data.records import Example, Record
from common.data.simulator import SimulatorConfig, simulate
from common.engine import distributed
from common.errors import run_command
from common.files import write_jsonl
from common.models.loading import load_tokenizer
from common.tracking import read_metrics
from step3_tppo.config import Step3Config
from step3_tppo.models import Models, build_models
from step3_tppo.rollout import RolloutMaker, reward_options
from step3_tppo.trainer import TPPOTrainer

RUNS, STEPS, WARMUP = 5, 4, 1
CORES = 2
# Ranks, threads of each, ZeRO stage.
SETUPS = {"ours": (1, CORES, 0), "ours_two_ranks": (2, 1, 3)}


class Shape(NamedTuple):
    """What a step reads and writes: prompts, samples of each, tokens of a prompt and of an answer."""

    prompts: int = 8
    samples: int = 4
    prompt_tokens: int = 96
    answer_tokens: int = 32


SHAPE = Shape()


def main() -> None:
    """Alternate whole runs of both, then save ratios and utilisation."""
    profile = read_switches(__doc__, profile="Show where the time of our step goes, kernel by kernel.").profile
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        prepare(folder, SHAPE)
        if profile:
            print(on_ranks(profiled_steps, 1, str(folder)))
            return
        found: dict[str, list[Any]] = {name: [] for name in (*SETUPS, "trl_rloo")}
        for run in range(RUNS):
            for name, (ranks, threads, stage) in SETUPS.items():
                found[name].append(on_ranks(tppo_steps, ranks, str(folder), f"{name}{run}", threads, stage, SHAPE))
            found["trl_rloo"].append({"seconds": trl_steps(folder)})
            medians = (f"{name} {statistics.median(runs[-1]['seconds']):.2f} s" for name, runs in found.items())
            print(f"run {run}, a step:", *medians, flush=True)
    seconds = {name: [statistics.median(run["seconds"]) for run in runs] for name, runs in found.items()}
    shares = {
        name: [run["flops"] / run["peak_flops"] / took for run, took in zip(found[name], seconds[name], strict=True)]
        for name in SETUPS
    }
    theirs = seconds["trl_rloo"]
    save("step3", {
        "ratios": {f"trl_rloo_seconds_over_{name}": median_ratio(theirs, seconds[name]) for name in SETUPS},
        "useful_flop_utilisation": round(statistics.median(shares["ours"]), 3),
        "useful_flop_utilisation_two_ranks": round(statistics.median(shares["ours_two_ranks"]), 3),
        "switch_share": round(statistics.median(run["switch_share"] for run in found["ours_two_ranks"]), 4),
        "shape": SHAPE._asdict(),
        "setups": SETUPS,
        "runs": found,
    })  # fmt: skip


def prepare(folder: Path, shape: Shape, **sizes: int) -> None:
    """Examples with histories longer than the prompt budget, and the models; `sizes` as in `random_llama`."""
    tokenizer = query_tokenizer()
    model = random_llama(tokenizer, mean_answer=1e9, **sizes)
    model.save_pretrained(folder / "sft")
    tokenizer.save_pretrained(folder / "sft")
    save_reward_model(folder / "sft", folder / "reward", tokenizer, shape.prompt_tokens, 2 * shape.answer_tokens)
    (folder / "data").mkdir()
    searches = min(shape.prompt_tokens // 4, 90)  # with their clicks enough to fill the budget
    users = simulate(SimulatorConfig(num_users=200, min_history=searches, max_history=searches + 4))
    examples = [_example(user.record) for user in users]
    write_jsonl(folder / "data" / "train.jsonl", (example.to_dict() for example in examples))
    builder = _prompts(tokenizer, shape)
    write_jsonl(folder / "prompts.jsonl", ({"prompt": builder.text(example.history)} for example in examples))


def tppo_steps(
    folder: str, run: str, threads: int, stage: int, shape: Shape, steps: int = STEPS
) -> dict[str, Any]:
    """Seconds of each step after the first, useful FLOPs of a step, and the machine's peak with all ranks at it."""
    torch.set_num_threads(threads)
    cuda = torch.cuda.is_available()
    trainer, config, models = _trainer(folder, run, stage, shape, steps)
    trainer.train()
    peak = gemm_peak(torch.bfloat16 if cuda else torch.float32)
    peak = distributed.sum_over_ranks(torch.tensor(peak, dtype=torch.float64, device=models.actor.module.device))
    rows = read_metrics(Path(config.output_dir) / "metrics.jsonl")[WARMUP:]
    phases = {name: statistics.median(row[name] for row in rows) for name in rows[0] if name.startswith("seconds/")}
    sizes = Sizes.of(models.actor.module.config)
    return {
        "seconds": [row["seconds/step"] for row in rows],
        "phases": phases,
        "switch_share": phases["seconds/switch"] / phases["seconds/step"],
        "flops": tppo_step_flops(sizes, *shape),
        "peak_flops": float(peak),
        "peak_memory_mib": round(peak_memory() / 2**20),
    }


def profiled_steps(folder: str) -> str:
    """A table of the kernels of some steps, by the time that is their own."""
    torch.set_num_threads(CORES)
    trainer, *_ = _trainer(folder, "profile", 0, SHAPE, STEPS)
    with profile(activities=[ProfilerActivity.CPU]) as found:
        trainer.train()
    return found.key_averages().table(sort_by="self_cpu_time_total", row_limit=20, max_name_column_width=45)


def _trainer(
    folder: str, run: str, stage: int, shape: Shape, steps: int
) -> tuple[TPPOTrainer, Step3Config, Models]:
    cuda = torch.cuda.is_available()
    config = Step3Config(
        output_dir=f"{folder}/{run}", actor_path=f"{folder}/sft", reward_path=f"{folder}/reward",
        critic_path=f"{folder}/reward", data_dir=f"{folder}/data", prompt_template="compact",
        max_prompt_tokens=shape.prompt_tokens, max_response_tokens=shape.answer_tokens,
        rollout_batch_size=shape.prompts, samples_per_prompt=shape.samples,
        mini_batch_size=shape.prompts * shape.samples, micro_batch_size=16, scoring_batch_size=16,
        total_steps=steps + WARMUP, critic_warmup_steps=0, save_steps=1_000, sample_steps=1_000, zero_stage=stage,
        tensorboard=False, dtype="bf16" if cuda else "fp32",
    )  # fmt: skip
    tokenizer = load_tokenizer(config.actor_path, False)
    models = build_models(config, tokenizer)
    prompts, device = _prompts(tokenizer, shape), models.actor.module.device
    make_rollout = RolloutMaker(models, prompts, reward_options(config, 4), config, device)
    examples = load_examples(config.data_dir, "train")
    return TPPOTrainer(config, models, make_rollout, examples, device), config, models


def trl_steps(folder: Path) -> list[float]:
    """Seconds of each of TRL's steps after the first."""
    command = [
        sys.executable, "benchmarks/trl_rloo.py", "--folder", str(folder), "--steps", str(STEPS + WARMUP),
        "--prompts", str(SHAPE.prompts), "--samples", str(SHAPE.samples),
        "--answer_tokens", str(SHAPE.answer_tokens), "--batch", str(SHAPE.prompts * SHAPE.samples),
    ]  # fmt: skip
    environment = os.environ | {"OMP_NUM_THREADS": str(CORES), "TOKENIZERS_PARALLELISM": "false"}
    ran = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if ran.returncode:
        sys.exit(f"TRL's trainer failed; is benchmarks/requirements.txt installed?\n{ran.stderr[-2000:]}")
    return json.loads(ran.stdout.splitlines()[-1])[WARMUP:]


def _example(record: Record) -> Example:
    events, targets = record.events[:-3], [event.query for event in record.events[-3:] if event.query]
    return Example(record.user_id, record.user_id, record.group, record.source, "train", events, tuple(targets))


def _prompts(tokenizer: PreTrainedTokenizerBase, shape: Shape) -> PromptBuilder:
    return PromptBuilder(tokenizer, "compact", shape.prompt_tokens, num_queries=3)


if __name__ == "__main__":
    run_command(main)
