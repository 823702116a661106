"""The planner against what real jobs of two CPU ranks (or one GPU) take, phase by phase.

    python benchmarks/plan.py                  about 4 minutes
    python benchmarks/plan.py NAME ...         these cases anew

On CPU ranks a phase takes the high-water mark of the process's resident memory, less what it held when everything was
imported and a small model had been trained and sampled once: libraries, Python, kernels' workspaces. It is what the
machine must have, with fragments and whatever libraries hold inside, and models are large enough for that not to drown.
malloc is told to give back what is freed. On CUDA it is torch's own count (`max_memory_allocated`); that way has been
written, but not yet run.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from benchmarks.measuring import RESULTS, on_ranks, save
from benchmarks.models import query_tokenizer, save_reward_model
from benchmarks.peers import peak_memory
from benchmarks.step3 import Shape, prepare
from benchmarks.switch import forget_peak, held_memory
from common.data.examples import load_examples
from common.data.prompts import PromptBuilder
from common.engine import distributed
from common.engine.accumulation import accumulate
from common.errors import run_command
from common.files import read_json
from common.generation.sampling import Sampling
from common.models.loading import load_tokenizer
from common.models.response_scores import response_scores
from common.models.sequences import pad_sequences, score_in_blocks
from common.planning.plan import Machine
from step3_tppo.config import Step3Config
from step3_tppo.export import export_models
from step3_tppo.models import Models, build_models
from step3_tppo.planning import plan_step3

MIB = 2**20
SMALL = {
    "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 4,
    "intermediate_size": 128,
}  # fmt: skip
FEW_AT_A_TIME = {
    "stage": 3, "stage3_max_live_parameters": 4e6, "stage3_max_reuse_distance": 4e6, "stage3_prefetch_bucket_size": 1e6,
    "reduce_bucket_size": 4e6,
}  # fmt: skip


class Case(NamedTuple):
    """A family with its sizes, the lengths, and step 3's settings that differ from its defaults."""

    family: str
    sizes: dict[str, int]
    shape: Shape = Shape(4, 2, 96, 8)
    settings: dict[str, Any] | None = None
    zero: dict[str, float] | None = None


_WIDE = {"hidden_size": 512, "num_hidden_layers": 4, "num_attention_heads": 8, "intermediate_size": 1536}
CASES = {
    "llama": Case("llama", _WIDE),
    "llama_checkpointing": Case("llama", _WIDE, Shape(4, 4, 256, 8), {"gradient_checkpointing": True}),
    "qwen3_lora_large_vocabulary": Case(
        "qwen3", _WIDE | {"vocab_size": 16_000, "num_key_value_heads": 4, "head_dim": 64}, settings={"lora_r": 16}
    ),
    "gpt2_sharded": Case("gpt2", _WIDE, settings={"hybrid_weights": "sharded"}, zero=FEW_AT_A_TIME),
    "mistral_zero2": Case("mistral", _WIDE | {"num_key_value_heads": 4}, settings={"zero_stage": 2}),
}


def main() -> None:
    """Measure every case, print and save predicted and measured MiB and their ratio."""
    os.environ |= {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}  # before ranks are started
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help=f"Of {', '.join(CASES)}; none: all of them.")
    names = parser.parse_args().names or list(CASES)
    if unknown := set(names) - CASES.keys():
        parser.error(f"no cases {', '.join(sorted(unknown))}")
    ranks = 1 if torch.cuda.is_available() else 2
    found: dict[str, Any] = {}
    for name in names:
        with tempfile.TemporaryDirectory() as folder:
            write_case(Path(folder), CASES[name])
            write_case(Path(folder) / "small", CASES[name]._replace(sizes=SMALL, shape=Shape(2, 1, 64, 8)))
            found[name] = on_ranks(measured_case, ranks, folder, CASES[name])
        for phase, row in found[name].items():
            print(f"{name:28} {phase:18}", *(f"{key} {value}" for key, value in row.items()), flush=True)
    kept = RESULTS / "plan.json"
    cases = read_json(kept)["cases"] if sys.argv[1:] and kept.exists() else {}
    cases |= {name: _described(CASES[name]) | {"phases": phases} for name, phases in found.items()}
    ratios = [row["ratio"] for case in cases.values() for row in case["phases"].values()]
    save("plan", {
        "ranks": ranks,
        "peak_ratios": {name: _peak_ratio(case["phases"]) for name, case in cases.items()},
        "phases_within_15_percent": f"{sum(abs(ratio - 1) <= 0.15 for ratio in ratios)} of {len(ratios)}",
        "cases": cases,
    })  # fmt: skip


def write_case(folder: Path, case: Case) -> None:
    """Examples whose histories fill the prompt, actor and reward model."""
    folder.mkdir(exist_ok=True)
    prepare(folder, case.shape, **SMALL)
    tokenizer = query_tokenizer()
    ids = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id, "bos_token_id": None}
    sizes = _gpt2_names(case.sizes) if case.family == "gpt2" else case.sizes
    config = AutoConfig.for_model(case.family, **{"vocab_size": len(tokenizer)} | ids | sizes)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder / "sft")
    save_reward_model(
        folder / "sft", folder / "reward", tokenizer, case.shape.prompt_tokens, 2 * case.shape.answer_tokens
    )


def measured_case(folder: str, case: Case) -> dict[str, dict[str, float]]:
    """Predicted and measured MiB of this rank in each phase, and their ratio."""
    run_phases(Path(folder) / "small", case._replace(shape=Shape(2, 1, 64, 8)), lambda name: None)
    forget_peak()
    before, peaks = held_memory(), {}

    def measured(name: str) -> None:
        peaks[name] = max(peaks.get(name, 0), peak_memory() - before)
        forget_peak()

    run_phases(Path(folder), case, measured)
    config = _config(Path(folder), case)
    machine = Machine(distributed.world_size(), 2**40, torch.cuda.is_available())
    predicted = {phase.name: phase.total for phase in plan_step3(config, machine).phases}
    # The last backward pass and the optimiser's step come in one call.
    predicted["optimiser step"] = max(predicted["actor update"], predicted["optimiser step"])
    return {
        name: {
            "predicted": round(predicted[name] / MIB, 1), "measured": round(peaks[name] / MIB, 1),
            "ratio": round(predicted[name] / peaks[name], 3),
        }
        for name in peaks
    }  # fmt: skip


def run_phases(folder: Path, case: Case, done: Callable[[str], None]) -> None:
    """Step 3's own pieces on a full rollout, twice, so that optimiser and prefetching have settled; `done` is told each
    phase that has ended."""
    config = _config(folder, case)
    tokenizer = load_tokenizer(config.actor_path)
    models = build_models(config, tokenizer)
    done("load")
    for _ in range(2):
        _rollout(config, models, folder, case.shape, tokenizer, done)
    prompts = PromptBuilder(tokenizer, config.prompt_template, config.max_prompt_tokens, config.num_queries)
    export_models(models, prompts, config)
    done("export")
    gc.collect()


def _rollout(config: Step3Config, models: Models, folder: Path, shape: Shape, tokenizer: Any, done: Any) -> None:
    count = shape.prompts // distributed.world_size()
    generator = torch.Generator().manual_seed(distributed.rank())
    prompts = torch.randint(2, 1000, (count, shape.prompt_tokens), generator=generator).tolist()
    with models.actor.inference() as actor:
        sampling = Sampling(shape.answer_tokens, samples=shape.samples)
        generated = models.actor.generate(tokenizer, prompts, sampling, rows=count * shape.samples)
        done("generation")
        repeated = [prompt for prompt in prompts for _ in range(shape.samples)]
        # Whatever was drawn, rows of full length are scored: the plan's are.
        responses = [(response.ids * shape.answer_tokens)[: shape.answer_tokens] for response in generated]
        samples = shape.samples if models.scoring.layout == "shared" else 1
        batch = pad_sequences(repeated, responses, tokenizer.pad_token_id, actor.device, samples)
        every = torch.arange(len(responses), device=actor.device)
        blocks = batch.by_length(every, config.scoring_batch_size)
        score_in_blocks(batch, blocks, lambda block: response_scores(actor, actor, block, 1.0, models.scoring))
        done("actor scoring")
    if models.reference is not None:
        with models.reference.inference() as module:
            score_in_blocks(batch, blocks, lambda block: response_scores(module, module, block, 1.0, models.scoring))
        done("reference scoring")
    with models.critic.inference() as module:
        score_in_blocks(batch, blocks, lambda block: (module(block),))
    done("critic scoring")
    examples = load_examples(folder / "data", "train")[: len(responses)]
    with models.reward.inference():
        models.scorer.score([example.history for example in examples], [response.text for response in generated])
    done("reward scoring")
    for last in (False, True):
        micro = batch.rows(every[: config.micro_batch_size])
        models.critic.module.train()
        accumulate(models.critic.engine, models.critic.engine(micro).square().mean(), last)
        done("optimiser step" if last else "critic update")
        engine, module = models.actor.engine, models.actor.module.train()
        scores = response_scores(engine, module, micro, 1.0, models.scoring)
        accumulate(engine, -scores.logprobs.mean(), last)
        del scores
        done("optimiser step" if last else "actor update")


def _config(folder: Path, case: Case) -> Step3Config:
    shape = case.shape
    responses = shape.prompts * shape.samples
    settings = dict(case.settings or {})
    if case.zero:
        path = folder / "deepspeed.json"
        path.write_text(json.dumps({"zero_optimization": case.zero, "zero_force_ds_cpu_optimizer": False}))
        settings["deepspeed_config"] = str(path)
    return Step3Config(
        actor_path=str(folder / "sft"), reward_path=str(folder / "reward"), data_dir=str(folder / "data"),
        output_dir=str(folder / "run"), max_prompt_tokens=shape.prompt_tokens, max_response_tokens=shape.answer_tokens,
        rollout_batch_size=shape.prompts, samples_per_prompt=shape.samples, mini_batch_size=responses,
        **{"micro_batch_size": 4, "hybrid_weights": "gathered", "old_logprobs": "recomputed"} | settings,
    )  # fmt: skip


def _gpt2_names(sizes: dict[str, int]) -> dict[str, int]:
    names = {"hidden_size": "n_embd", "num_hidden_layers": "n_layer", "num_attention_heads": "n_head"}
    return {names[name]: value for name, value in sizes.items() if name in names}


def _peak_ratio(case: dict[str, dict[str, float]]) -> float:
    return round(max(row["predicted"] for row in case.values()) / max(row["measured"] for row in case.values()), 3)


def _described(case: Case) -> dict[str, Any]:
    return case._asdict() | {"shape": case.shape._asdict()}


if __name__ == "__main__":
    run_command(main)
