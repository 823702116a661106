"""Whether the speed-ups leave the learning curve where it was: step 3 with all of them on and with all of them off.

    bash scripts/run_all.sh                                    the main job, whose models are used
    python benchmarks/learning_curve.py --run outputs/demo     about 8 minutes on two cores

Off: sharded weights, eight responses decoded at once, padded passes of eight, old log-probs computed again,
mini-batches of any responses. On: whole weights, all responses decoded at once, passes by tokens that read a prompt
once for its four responses, the log-probs of sampling, mini-batches of whole groups, optimizers at rest during rollout.
Both draw the same random numbers for the first rollout.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import matplotlib
import numpy as np

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from benchmarks.measuring import RESULTS, save
from common.errors import run_command
from common.evaluation.statistics import t_estimate
from common.tracking import read_metrics

SEEDS, STEPS, LAST = (1, 2, 3, 4, 5), 20, 5
WAYS = {
    "off": {
        "hybrid_weights": "sharded", "decode_rows": 8, "sequence_layout": "padded", "micro_batch_size": 8,
        "old_logprobs": "recomputed",
    },
    "on": {
        "hybrid_weights": "gathered", "sequence_layout": "shared", "micro_batch_tokens": 1024,
        "scoring_batch_tokens": 4096, "old_logprobs": "sampled", "offload_states": "true",
    },
}  # fmt: skip
GROUPS = {"rollout_batch_size": 16, "samples_per_prompt": 4}  # as many responses a rollout as the demonstration has
MEASURES = {"judge/relevance_rate": "relevance of the rollouts", "kl/per_sequence": "KL, nats a response"}


def main() -> None:
    """Train each way on every seed; save and draw the curves."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run", type=Path, required=True, help="Folder of a finished main job on the embedded log.")
    run = parser.parse_args().run.resolve()
    with tempfile.TemporaryDirectory() as folder:
        curves = {
            way: [train(run, Path(folder) / f"{way}{seed}", seed, way) for seed in SEEDS] for way in WAYS
        }
    found = {}
    for measure in MEASURES:
        rows = {way: np.array([[row[measure] for row in seed] for seed in curves[way]]) for way in WAYS}
        late = rows["on"][:, -LAST:].mean(axis=1) - rows["off"][:, -LAST:].mean(axis=1)
        difference = t_estimate(late.tolist())
        found[measure] = {
            "on_minus_off": {"mean": difference.value, "low": difference.low, "high": difference.high},
            "deviation_over_seeds_off": float(rows["off"][:, -LAST:].mean(axis=1).std(ddof=1)),
            **{way: values.tolist() for way, values in rows.items()},
        }  # fmt: skip
        print(measure, found[measure]["on_minus_off"])
    draw(found)
    save("learning_curve", {"seeds": SEEDS, "steps": STEPS, "ways": WAYS, "measures": found})


def train(run: Path, output: Path, seed: int, way: str) -> list[dict[str, float]]:
    """The metrics of one run of step 3 on two ranks."""
    settings = {
        "actor_path": run / "step1_sft/model",
        "reward_path": run / "step2_token_reward/reward/model", "critic_path": run / "step2_token_reward/reward/model",
        "data_dir": run / "data", "output_dir": output, "total_steps": STEPS, "save_steps": 1000, "seed": seed,
        "monitor": "simulated", "truth": run / "log/truth.jsonl", "tensorboard": "false", **GROUPS, **WAYS[way],
    }  # fmt: skip
    flags = ["--config", "step3_tppo/configs/recipe.yaml", "step3_tppo/configs/tiny.yaml"]
    flags += [part for key, value in settings.items() for part in (f"--{key}", str(value))]
    environment = os.environ | {"TPPO_VENV": "none", "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    subprocess.run(["bash", "scripts/run_step3.sh", *flags], check=True, env=environment, stdout=subprocess.DEVNULL)
    return read_metrics(output / "metrics.jsonl")


def draw(found: dict[str, dict]) -> None:
    """A panel a measure: each way's mean over seeds and the range of the seeds."""
    figure, panels = plt.subplots(1, len(found), figsize=(5 * len(found), 3.4), layout="constrained")
    for panel, (measure, label) in zip(panels, MEASURES.items(), strict=True):
        for way, colour in zip(WAYS, ("tab:gray", "tab:red"), strict=True):
            values = np.array(found[measure][way])
            steps = np.arange(1, values.shape[1] + 1)
            panel.plot(steps, values.mean(axis=0), color=colour, label=f"all {way}")
            panel.fill_between(steps, values.min(axis=0), values.max(axis=0), color=colour, alpha=0.15, linewidth=0)
        panel.set(xlabel="step", ylabel=label)
        panel.legend()
    figure.savefig(RESULTS / "learning_curve.png", dpi=110)


if __name__ == "__main__":
    run_command(main)
