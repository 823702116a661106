"""How many responses a prompt should get: step 3 of the demonstration with 1, 2, 4 and 8, for the same time.

    bash scripts/run_all.sh                                        the main job, whose models are used
    python benchmarks/samples_per_prompt.py --run outputs/demo     about 40 minutes on two cores

A rollout always has 64 responses, of 64, 32, 16 or 8 prompts. First all settings take some steps in turn, which gives
the seconds of a step of each. Then each trains for as many steps as fit into the time, on every seed, and is judged on
development users.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.measuring import save
from common.errors import run_command
from common.evaluation.statistics import t_estimate
from common.files import read_json
from common.tracking import read_metrics

SAMPLES, RESPONSES, SEEDS = (1, 2, 4, 8), 64, (1, 2, 3)
SECONDS, TIMED_STEPS, TURNS = 90.0, 4, 3
MEASURES = ("relevance_rate", "unique_relevance_rate", "mean_word_score", "duplicate_rate")


def main() -> None:
    """Time, train, judge, save."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run", type=Path, required=True, help="Folder of a finished main job on the embedded log.")
    run = parser.parse_args().run.resolve()
    with tempfile.TemporaryDirectory() as folder:
        seconds = timed_steps(run, Path(folder))
        steps = {samples: round(SECONDS / taken) for samples, taken in seconds.items()}
        print("seconds of a step:", {samples: round(taken, 2) for samples, taken in seconds.items()}, flush=True)
        found: dict[int, list[dict[str, Any]]] = {samples: [] for samples in SAMPLES}
        for seed in SEEDS:
            for samples in SAMPLES:
                output = Path(folder) / f"{samples}_{seed}"
                train(run, output, samples, seed, steps[samples])
                found[samples].append(judged(run, output / "model", seed))
                print(f"{samples} a prompt, seed {seed}, {steps[samples]} steps:", found[samples][-1], flush=True)
    save("samples_per_prompt", {
        "responses_a_rollout": RESPONSES, "seconds": SECONDS, "seeds": SEEDS, "steps": steps,
        "seconds_a_step": {samples: round(taken, 3) for samples, taken in seconds.items()},
        "measures": {samples: rows for samples, rows in found.items()},
        "means": {
            samples: {name: t_estimate([row[name] for row in rows]).to_dict() for name in rows[0]}
            for samples, rows in found.items()
        },
    })  # fmt: skip


def timed_steps(run: Path, folder: Path) -> dict[int, float]:
    """The median seconds of a step of each setting, after the critic's warm-up, in alternating runs."""
    taken: dict[int, list[float]] = {samples: [] for samples in SAMPLES}
    for turn in range(TURNS):
        for samples in SAMPLES:
            output = folder / f"timed{samples}_{turn}"
            train(run, output, samples, turn, TIMED_STEPS, critic_warmup_steps=0)
            taken[samples] += [row["seconds/step"] for row in read_metrics(output / "metrics.jsonl")][1:]
    return {samples: statistics.median(seconds) for samples, seconds in taken.items()}


def train(run: Path, output: Path, samples: int, seed: int, steps: int, **more: Any) -> None:
    """Step 3 on two ranks."""
    reward = run / "step2_token_reward/reward/model"
    settings = {
        "actor_path": run / "step1_sft/model", "reward_path": reward, "critic_path": reward, "data_dir": run / "data",
        "output_dir": output, "total_steps": steps, "save_steps": 1000, "seed": seed, "tensorboard": "false",
        "rollout_batch_size": RESPONSES // samples, "samples_per_prompt": samples, **more,
    }  # fmt: skip
    flags = ["--config", "step3_tppo/configs/recipe.yaml", "step3_tppo/configs/tiny.yaml"]
    _run(["bash", "scripts/run_step3.sh", *flags, *_flags(settings)])


def judged(run: Path, model: Path, seed: int) -> dict[str, float]:
    """Sampled queries of all development users, judged by the log's own truth."""
    settings = {
        "data_dir": run / "data", "split": "dev", "systems": f"tppo={model}", "annotator": "simulated",
        "truth": run / "log/truth.jsonl", "output_dir": model.parent / "judged", "prompt_template": "compact",
        "max_prompt_tokens": 160, "max_new_tokens": 32, "decoding": "sampled", "temperature": 0.7, "seed": seed,
    }  # fmt: skip
    _run([sys.executable, "-m", "common.evaluation.evaluate", *_flags(settings)])
    found = read_json(model.parent / "judged" / "report.json")["systems"]["tppo"]
    return {name: round(found[name]["value"], 4) for name in MEASURES}


def _flags(settings: dict[str, Any]) -> list[str]:
    return [part for key, value in settings.items() for part in (f"--{key}", str(value))]


def _run(command: list[str]) -> None:
    environment = os.environ | {"TPPO_VENV": "none", "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    ran = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if ran.returncode:
        sys.exit(f"{' '.join(command[:4])} failed:\n{ran.stderr[-2000:]}")


if __name__ == "__main__":
    run_command(main)
