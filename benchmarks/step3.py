"""A whole TPPO step against a step of TRL's RLOO trainer, on the same model, prompts, samples and tokens.

    pip install --no-deps -r benchmarks/requirements.txt
    python benchmarks/step3.py                 about 9 minutes on two cores
    python benchmarks/step3.py --profile       where the time of our step goes, kernel by kernel

Ours rolls out, scores with four models and updates two; RLOO rolls out, scores with two and updates one, its reward
being a Python function that costs nothing. Both take 8 prompts with 4 samples each and update once: prompts of 96
tokens with samples of 32, and (`query_shape`) prompts of 512 with samples of 24. TRL runs in one process of two
threads. Ours runs the same way, and once more with padded rows, which repeat a prompt for each of its samples. The
first shape also runs on two ranks of one core under ZeRO-3, as it would run on several GPUs.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch.profiler import ProfilerActivity, profile
from transformers import PreTrainedTokenizerBase

from benchmarks.flops import Sizes, tppo_step_flops
from benchmarks.measuring import gemm_peak, median_ratio, on_ranks, peer, read_switches, save
from benchmarks.models import query_tokenizer, random_llama, save_reward_model
from benchmarks.peers import peak_memory
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

RUNS, WARMUP = 5, 1
CORES = 2


class Shape(NamedTuple):
    """What a step reads and writes: prompts, samples of each, tokens of a prompt and of an answer."""

    prompts: int = 8
    samples: int = 4
    prompt_tokens: int = 96
    answer_tokens: int = 32


class Setup(NamedTuple):
    """How our step runs: ranks, threads of each, ZeRO stage, and how passes read finished responses."""

    ranks: int = 1
    threads: int = CORES
    stage: int = 0
    layout: str = "shared"


class Workload(NamedTuple):
    """A shape, the steps of a run that count, and how our step runs."""

    shape: Shape
    steps: int
    setups: dict[str, Setup]


OURS, UNSHARED = Setup(), Setup(layout="padded")
WORKLOADS = {
    "answers": Workload(Shape(), 3, {"ours": OURS, "unshared": UNSHARED, "ours_two_ranks": Setup(2, 1, 3)}),
    "queries": Workload(Shape(8, 4, 512, 24), 1, {"ours": OURS, "unshared": UNSHARED}),
}


def main() -> None:
    """Alternate whole runs of both, then save ratios and utilisation."""
    profile = read_switches(__doc__, profile="Show where the time of our step goes, kernel by kernel.").profile
    if profile:
        for workload in WORKLOADS.values():
            with tempfile.TemporaryDirectory() as folder:
                prepare(Path(folder), workload.shape)
                print(on_ranks(profiled_steps, 1, folder, workload.shape))
        return
    found = {name: measure(name, workload) for name, workload in WORKLOADS.items()}
    save("step3", found["answers"] | {"query_shape": found["queries"]})


def measure(name: str, workload: Workload) -> dict[str, Any]:
    """Alternating runs of every setup and of TRL on one workload: ratios, utilization, and the runs themselves."""
    runs: dict[str, list[Any]] = {setup: [] for setup in (*workload.setups, "trl_rloo")}
    with tempfile.TemporaryDirectory() as folder:
        prepare(Path(folder), workload.shape)
        for run in range(RUNS):
            for label, setup in workload.setups.items():
                arguments = (folder, f"{label}{run}", setup, workload.shape, workload.steps)
                runs[label].append(on_ranks(tppo_steps, setup.ranks, *arguments))
            runs["trl_rloo"].append({"seconds": trl_steps(Path(folder), workload)})
            medians = (f"{label} {statistics.median(of[-1]['seconds']):.2f} s" for label, of in runs.items())
            print(f"{name}, run {run}, a step:", *medians, flush=True)
    seconds = {label: [statistics.median(run["seconds"]) for run in of] for label, of in runs.items()}
    ratios = {f"trl_rloo_seconds_over_{label}": median_ratio(seconds["trl_rloo"], seconds[label])
              for label in workload.setups}  # fmt: skip
    ratios["unshared_seconds_over_ours"] = median_ratio(seconds["unshared"], seconds["ours"])
    return {
        "ratios": ratios,
        "seconds": {label: round(statistics.median(of), 3) for label, of in seconds.items()},
        "useful_flop_utilisation": _utilization(runs["ours"], seconds["ours"]),
        "switch_share": round(statistics.median(run["switch_share"] for run in runs[list(workload.setups)[-1]]), 4),
        "shape": workload.shape._asdict(),
        "setups": {label: setup._asdict() for label, setup in workload.setups.items()},
        "runs": runs,
    }


def _utilization(runs: list[Any], seconds: list[float]) -> float:
    """Share of the GEMM peak that useful operations reach, the median over the runs."""
    shares = (run["flops"] / run["peak_flops"] / took for run, took in zip(runs, seconds, strict=True))
    return round(statistics.median(shares), 3)


def prepare(folder: Path, shape: Shape, dtype: torch.dtype = torch.float32, **sizes: int) -> None:
    """Examples with histories longer than the prompt budget, and the models; `sizes` as in `random_llama`."""
    tokenizer = query_tokenizer()
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):  # a billion weights take a CPU long to draw
        model = random_llama(tokenizer, mean_answer=1e9, **sizes)
    model.to(dtype).save_pretrained(folder / "sft")
    tokenizer.save_pretrained(folder / "sft")
    save_reward_model(folder / "sft", folder / "reward", tokenizer, shape.prompt_tokens, 2 * shape.answer_tokens)
    (folder / "data").mkdir()
    searches = min(shape.prompt_tokens // 4, 90)  # with their clicks enough to fill the budget
    users = simulate(SimulatorConfig(num_users=200, min_history=searches, max_history=searches + 4))
    examples = [_example(user.record) for user in users]
    write_jsonl(folder / "data" / "train.jsonl", (example.to_dict() for example in examples))
    builder = _prompts(tokenizer, shape)
    write_jsonl(folder / "prompts.jsonl", ({"prompt": builder.text(example.history)} for example in examples))


def tppo_steps(folder: str, run: str, setup: Setup, shape: Shape, steps: int) -> dict[str, Any]:
    """Seconds of each step after the first, useful FLOPs of a step, and the machine's peak with all ranks at it."""
    torch.set_num_threads(setup.threads)
    cuda = torch.cuda.is_available()
    trainer, config, models = _trainer(folder, run, setup, shape, steps)
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


def profiled_steps(folder: str, shape: Shape) -> str:
    """A table of the kernels of some steps, by the time that is their own."""
    torch.set_num_threads(CORES)
    trainer, *_ = _trainer(folder, "profile", OURS, shape, 2)
    with profile(activities=[ProfilerActivity.CPU]) as found:
        trainer.train()
    return found.key_averages().table(sort_by="self_cpu_time_total", row_limit=20, max_name_column_width=45)


def step_config(
    folder: str, run: str, setup: Setup, shape: Shape, steps: int, **changes: Any
) -> Step3Config:
    """Step 3's settings for `steps` steps that count, on what `prepare` wrote; `changes` are other fields of them."""
    settings = {
        "output_dir": f"{folder}/{run}", "actor_path": f"{folder}/sft", "reward_path": f"{folder}/reward",
        "critic_path": f"{folder}/reward", "data_dir": f"{folder}/data", "prompt_template": "compact",
        "max_prompt_tokens": shape.prompt_tokens, "max_response_tokens": shape.answer_tokens,
        "rollout_batch_size": shape.prompts, "samples_per_prompt": shape.samples,
        "mini_batch_size": shape.prompts * shape.samples, "micro_batch_size": 16, "scoring_batch_size": 16,
        "sequence_layout": setup.layout, "total_steps": steps + WARMUP, "critic_warmup_steps": 0, "save_steps": 1_000,
        "sample_steps": 1_000, "zero_stage": setup.stage, "tensorboard": False,
        "dtype": "bf16" if torch.cuda.is_available() else "fp32",
    }  # fmt: skip
    return Step3Config(**settings | changes)


def make_trainer(config: Step3Config, models: Models, shape: Shape) -> TPPOTrainer:
    """Step 3's trainer on `models`, which `config` describes."""
    prompts, device = _prompts(load_tokenizer(config.actor_path, False), shape), models.actor.module.device
    make_rollout = RolloutMaker(models, prompts, reward_options(config, 4), config, device)
    return TPPOTrainer(config, models, make_rollout, load_examples(config.data_dir, "train"), device)


def _trainer(
    folder: str, run: str, setup: Setup, shape: Shape, steps: int
) -> tuple[TPPOTrainer, Step3Config, Models]:
    config = step_config(folder, run, setup, shape, steps)
    models = build_models(config, load_tokenizer(config.actor_path, False))
    return make_trainer(config, models, shape), config, models


def trl_steps(folder: Path, workload: Workload) -> list[float]:
    """Seconds of each of TRL's steps after the first."""
    shape = workload.shape
    more = {"prompts": shape.prompts, "samples": shape.samples, "answer_tokens": shape.answer_tokens}
    flags = [f"--{name}={number}" for name, number in more.items()]
    batch = shape.prompts * shape.samples
    ran = peer("benchmarks/trl_rloo.py", folder, workload.steps + WARMUP, batch, CORES, *flags)
    return ran["seconds"][WARMUP:]


def _example(record: Record) -> Example:
    events, targets = record.events[:-3], [event.query for event in record.events[-3:] if event.query]
    return Example(record.user_id, record.user_id, record.group, record.source, "train", events, tuple(targets))


def _prompts(tokenizer: PreTrainedTokenizerBase, shape: Shape) -> PromptBuilder:
    return PromptBuilder(tokenizer, "compact", shape.prompt_tokens, num_queries=3)


if __name__ == "__main__":
    run_command(main)
