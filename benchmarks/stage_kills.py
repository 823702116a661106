"""`scripts/run_all.sh` in miniature, killed once in every stage and continued: does it end as an undisturbed run?

    python benchmarks/stage_kills.py

A run is killed (SIGKILL to all of its processes) at a random moment of its first stage, goes on with `--resume`, is
killed in the second, and so on. Data, samples, labels, the weights of all steps and the report's numbers are compared.
Takes about ten times a miniature run: some 15 minutes on two cores.
"""

from __future__ import annotations

import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.measuring import save  # noqa: E402
from common.config import MAX_SEED, option, parse_config  # noqa: E402
from common.errors import run_command  # noqa: E402
from common.files import read_json  # noqa: E402
from common.inputs import content_digest  # noqa: E402

STAGE = re.compile(r"^== (\w+)$")
EQUAL_FILES = ("data/*.jsonl", "step2_token_reward/**/*.jsonl", "**/*.safetensors", "generations/*.jsonl")
OWN_METRICS = "**/metrics.jsonl"  # of seconds, among others


@dataclass
class StageKillsConfig:
    """Kill a run in each of its stages, and compare how it ends."""

    seed: int = option(0, "Seed of the moments.", maximum=MAX_SEED)
    output: str = option("", "Where the result goes (default: benchmarks/results/stage_kills.json).")


def main() -> None:
    """Run the campaign, print and write results/stage_kills.json."""
    config = parse_config(StageKillsConfig)
    chance = random.Random(config.seed)
    with tempfile.TemporaryDirectory() as folder:
        straight, killed = (Path(folder) / "outputs" / name for name in ("straight", f"killed_{os.getpid()}"))
        finish(straight)
        seconds = {path.stem: read_json(path)[path.stem] for path in (straight / "stages").glob("*.json")}
        hit = {stage: kill_in(killed, stage, chance.uniform(0, most)) for stage, most in _in_order(seconds, straight)}
        finish(killed)
        different = differences(killed, straight)
    result = {"killed_in": hit, "different_files": different}
    print(result)
    if different:
        raise RuntimeError("a run that was killed ended differently")
    save("stage_kills", {**result, "settings": vars(config)}, config.output)


def finish(run: Path) -> None:
    """Run, or go on, to the end."""
    process = _start(run)
    if process.wait():
        raise RuntimeError(f"{run.name} ended with {process.returncode}: {run.with_suffix('.log').read_text()[-2000:]}")


def kill_in(run: Path, stage: str, after: float) -> bool:
    """Kill `run` so many seconds after `stage` has begun; False where the stage had ended before that."""
    process = _start(run)
    while stage not in stages_begun(run) and process.poll() is None:
        time.sleep(0.05)
    time.sleep(after)
    ended = (run / "stages" / f"{stage}.json").exists()
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    subprocess.run(["pkill", "-KILL", "-f", "--", f"outputs/{run.name}/"], check=False)
    return not ended


def differences(run: Path, other: Path) -> list[str]:
    """Files of `EQUAL_FILES` that are not the same in both, and the report where its numbers differ."""
    names = {path.relative_to(root) for root in (run, other) for glob in EQUAL_FILES for path in root.glob(glob)}
    names -= {path.relative_to(root) for root in (run, other) for path in root.glob(OWN_METRICS)}
    found = [str(name) for name in sorted(names) if _digest(run / name) != _digest(other / name)]
    return found + (["report.json"] if _numbers(run) != _numbers(other) else [])


def _start(run: Path) -> subprocess.Popen:
    flags = ["--miniature", "--run_name", run.name, *(["--resume"] if run.exists() else [])]
    environment = os.environ | {"TPPO_VENV": "none", "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    folder = run.parents[1]
    folder.mkdir(exist_ok=True)
    run.parent.mkdir(exist_ok=True)
    with open(run.with_suffix(".log"), "w") as log:
        return subprocess.Popen(
            ["bash", str(ROOT / "scripts" / "run_all.sh"), *flags],
            cwd=folder, env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip


def stages_begun(run: Path) -> list[str]:
    """The stages that the process has begun so far."""
    lines = run.with_suffix(".log").read_text(errors="replace").splitlines()
    return [found[1] for line in lines if (found := STAGE.match(line))]


def _in_order(seconds: dict[str, float], run: Path) -> list[tuple[str, float]]:
    return [(stage, seconds[stage]) for stage in stages_begun(run)]


def _digest(path: Path) -> str:
    return content_digest(path) if path.exists() else ""


def _numbers(run: Path) -> Any:
    return read_json(run / "report.json")["systems"]


if __name__ == "__main__":
    run_command(main)
