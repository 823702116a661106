"""Random kills over small jobs that must end as if nothing had been: what they cost, and that nothing is lost.

    python benchmarks/faults.py --run outputs/demo      # after run_all.sh; 50 kills of step 3, 10 of label.py
    python benchmarks/faults.py --run outputs/demo --kills 3 --label_kills 2

A random rank of step 3 (two ranks, ZeRO-3, the deepspeed launcher) gets SIGKILL at a random moment: one time in four
while the run starts, else while it trains, saves and exports, for as long as an undisturbed run does. Then the same
command goes on with --resume. Labelling, with the stand-in endpoint of annotator_server.py, is killed and begun again
in the same way.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from safetensors.torch import load_file  # noqa: E402
from tqdm import tqdm  # noqa: E402

from benchmarks import annotator_load  # noqa: E402
from benchmarks.measuring import free_port, save  # noqa: E402
from common.config import MAX_SEED, option, parse_config  # noqa: E402
from common.engine.checkpoint import list_checkpoints  # noqa: E402
from common.engine.manifest import DAMAGED, damage  # noqa: E402
from common.errors import InputError, run_command  # noqa: E402
from common.files import read_jsonl, write_jsonl  # noqa: E402

STEPS, SAVE_STEPS = 12, 2
SHARE_IN_START = 0.25
KILLS_A_RUN = 5  # then a run is left alone, so that it ends
WEIGHTS = ("model/model.safetensors", "critic/model.safetensors", "critic/value_head.safetensors")


@dataclass
class FaultsConfig:
    """Kill small jobs at random moments, and compare how they end."""

    run: str = option("outputs/demo", "A finished run of scripts/run_all.sh: its models and data are used.")
    kills: int = option(50, "SIGKILLs of ranks of step 3.")
    label_kills: int = option(10, "SIGKILLs of the label command.")
    seed: int = option(0, "Seed of the moments and the ranks.", maximum=MAX_SEED)
    output: str = option("", "Where the result goes (default: benchmarks/results/faults.json).")


def main() -> None:
    """Run the campaign, print and write results/faults.json."""
    config = parse_config(FaultsConfig)
    if not (Path(config.run) / "step3_tppo" / "model").is_dir():
        raise InputError(f"--run {config.run}: no finished run; make one with bash scripts/run_all.sh")
    chance = random.Random(config.seed)
    with tempfile.TemporaryDirectory() as folder:
        result = kill_step3(config, chance, Path(folder)) | kill_labelling(config, chance, Path(folder))
    for name, value in result.items():
        print(f"{name}: {value}")
    if result["runs_with_equal_final_weights"] < result["runs"] or result["lost_labels"] or result["corrupted_files"]:
        raise RuntimeError("something was lost")
    save("faults", {**result, "settings": vars(config)}, config.output)


def kill_step3(config: FaultsConfig, chance: random.Random, folder: Path) -> dict[str, object]:
    """Runs of step 3 until so many kills have hit one; each is compared with the undisturbed run."""
    straight = folder / "straight"
    process, begun = _start(config, straight), time.monotonic()
    starting = _await_training(process, straight) - begun
    if process.wait():
        raise RuntimeError("the undisturbed run failed")
    working = time.monotonic() - begun - starting
    kills = runs = equal = lost_steps = corrupted = 0
    moments: list[str] = []
    with tqdm(total=config.kills, desc="kills", unit="kill") as bar:
        while kills < config.kills:
            output, left = folder / f"run{runs}", min(KILLS_A_RUN, config.kills - kills)
            while True:
                process = _start(config, output)
                hit = False
                if left > 0:
                    in_start = chance.random() < SHARE_IN_START
                    if not in_start:
                        _await_training(process, output)
                    hit = _kill_one(process, output, chance.uniform(0, starting if in_start else working), chance)
                status = process.wait()
                if not hit:
                    break
                lost_steps += _lost_steps(output)
                corrupted += sum(bool(damage(path)) for path in list_checkpoints(output / "checkpoints"))
                moments.append("start" if in_start else "training, saving or export")
                kills, left = kills + 1, left - 1
                bar.update()
            runs += 1
            equal += status == 0 and _equal(output, straight)
            corrupted += len(list((output / "checkpoints").glob(f"{DAMAGED}*"))) + _broken_lines(output, straight)
    return {
        "kills": kills,
        "runs": runs,
        "runs_with_equal_final_weights": equal,
        "lost_steps": lost_steps,
        "corrupted_files": corrupted,
        "steps_a_run": STEPS,
        "save_steps": SAVE_STEPS,
        "killed_in": {name: moments.count(name) for name in sorted(set(moments))},
    }


def kill_labelling(config: FaultsConfig, chance: random.Random, folder: Path) -> dict[str, object]:
    """The label command killed and begun again: labels that were on disk and are not at the end, or never came."""
    samples, labels = folder / "samples.jsonl", folder / "labels.jsonl"
    write_jsonl(samples, annotator_load.records(300, config.seed))
    load = annotator_load.LoadConfig(slots=8, seconds=0.1)
    seen: set[str] = set()
    with annotator_load.endpoint(load, 0.0) as url:
        command = [
            sys.executable, "-m", "step2_token_reward.label", "--samples", str(samples), "--labels", str(labels),
            "--annotator", "llm", "--base_url", url, "--model", "stand-in", "--concurrency", "8",
        ]  # fmt: skip
        for number in range(config.label_kills + 1):
            process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            if number < config.label_kills:
                time.sleep(chance.uniform(1.0, 4.0))
                process.kill()
            process.wait()
            seen |= _label_ids(labels)
    final = _label_ids(labels)
    lines = labels.read_text().count("\n")
    return {
        "label_kills": config.label_kills,
        "lost_labels": len(seen - final) + 300 - len(final),
        "doubled_labels": lines - len(final),
    }


def _start(config: FaultsConfig, output: Path) -> subprocess.Popen:
    run = Path(config.run).resolve()
    reward = str(run / "step2_token_reward" / "reward" / "model")
    command = [
        str(Path(sys.executable).with_name("deepspeed")), "--num_gpus", "2", "--no_local_rank", "--master_port",
        str(free_port()), "step3_tppo/main.py", "--config", "step3_tppo/configs/recipe.yaml",
        "step3_tppo/configs/tiny.yaml", "--actor_path", str(run / "step1_sft" / "model"), "--reward_path", reward,
        "--critic_path", reward, "--data_dir", str(run / "data"), "--output_dir", str(output), "--resume",
        "--total_steps", str(STEPS), "--save_steps", str(SAVE_STEPS), "--critic_warmup_steps", "2",
        "--rollout_batch_size", "8", "--samples_per_prompt", "2", "--mini_batch_size", "8", "--micro_batch_size", "4",
        "--max_prompt_tokens", "160", "--max_response_tokens", "16",
    ]  # fmt: skip
    environment = os.environ | {
        "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "TOKENIZERS_PARALLELISM": "false",
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    }  # fmt: skip
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    return subprocess.Popen(command, cwd=ROOT, env=environment, **quiet)


def _kill_one(process: subprocess.Popen, output: Path, after: float, chance: random.Random) -> bool:
    """SIGKILL a random rank after so many seconds; before there are ranks, the launcher. False when all had ended."""
    end = time.monotonic() + after
    while time.monotonic() < end:
        if process.poll() is not None:
            return False
        time.sleep(0.01)
    found = subprocess.run(
        ["pgrep", "-f", "--", f"-u step3_tppo/main.py .*--output_dir {output} "], capture_output=True, text=True
    )
    ranks = [int(pid) for pid in found.stdout.split()]
    if process.poll() is not None:
        return False
    os.kill(chance.choice(ranks) if ranks else process.pid, signal.SIGKILL)
    process.wait()
    if not ranks:  # a killed launcher cannot take its children along
        subprocess.run(["pkill", "-KILL", "-f", "--", f"--output_dir {output} "], check=False)
        time.sleep(0.5)
    return True


def _lost_steps(output: Path) -> int:
    """Steps that were done and must be done again: those since the newest checkpoint."""
    found = list_checkpoints(output / "checkpoints")
    saved = int(found[-1].name.removeprefix("step_")) if found else 0
    metrics = output / "metrics.jsonl"
    done = metrics.read_text().count("\n") if metrics.exists() else 0
    return max(done - saved, 0)


def _await_training(process: subprocess.Popen, output: Path) -> float:
    """When the training of `process` began, which its heartbeat tells; or when it ended, if that was first."""
    heartbeat, begun = output / "heartbeat" / "rank0.json", time.time()
    while process.poll() is None and not (heartbeat.exists() and heartbeat.stat().st_mtime > begun):
        time.sleep(0.01)
    return time.monotonic()


def _equal(output: Path, straight: Path) -> bool:
    for name in WEIGHTS:
        ours, theirs = load_file(output / name), load_file(straight / name)
        if ours.keys() != theirs.keys() or not all(torch.equal(ours[key], theirs[key]) for key in theirs):
            return False
    return True


def _broken_lines(output: Path, straight: Path) -> int:
    """Lines of the run's JSONL files that are no JSON, and files with other steps than the undisturbed run's."""
    broken = 0
    for path in straight.glob("*.jsonl"):
        steps = []
        for line in (output / path.name).read_text().splitlines():
            try:
                steps.append(json.loads(line)["step"])
            except (ValueError, KeyError):
                broken += 1
        broken += steps != [row["step"] for _, row in read_jsonl(path)]
    return broken


def _label_ids(labels: Path) -> set[str]:
    """Ids of the whole lines."""
    if not labels.exists():
        return set()
    lines = labels.read_text().splitlines(keepends=True)
    return {json.loads(line)["id"] for line in lines if line.endswith("\n")}


if __name__ == "__main__":
    run_command(main)
