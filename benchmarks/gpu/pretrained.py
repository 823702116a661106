"""The pretrained pipeline on a real log, for as many seeds as the time allows.

The settings are those of docs/results/pretrained.md (preset cpu_lora), so that numbers can be laid side by side; its
stages mostly load and start, so that a small model runs several seeds at once. A seed that the time ends leaves the
stages that it has done.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.gpu.part import Part, device, part_parser
from common.engine.memory import GIB, free_bytes
from common.errors import run_command
from common.files import read_json
from common.planning.models import ModelSpec, weights_of
from common.tracking import read_metrics

ROOT = Path(__file__).resolve().parents[2]
PRESET = "cpu_lora"
MOST_AT_ONCE = 3
BYTES_A_WEIGHT, BYTES_A_RUN = 30, 8 * GIB  # of all models of a step in fp32 with adapters, and of a run besides


def main() -> None:
    """Run seeds in waves until another wave would not end in time; fails where no seed was finished."""
    parser = part_parser(__doc__)
    parser.add_argument("--model", type=Path, required=True, help="Folder of the pretrained model.")
    parser.add_argument("--log", type=Path, required=True, help="Log that it is trained on.")
    parser.add_argument("--seconds", type=float, required=True, help="Time for all seeds together.")
    options = parser.parse_args()
    end = time.monotonic() + options.seconds
    part = Part("pretrained", options.small, options.output.resolve())
    flags = ["--log", str(options.log.resolve()), "--preset", PRESET, *(["--miniature"] if part.small else [])]
    command = ["bash", str(ROOT / "scripts/run_all.sh"), "--model", str(options.model.resolve()), *flags]
    at_once = 1 if part.small else runs_that_fit(str(options.model))
    found: dict[str, Any] = {"flags": flags, "seeds": {}}
    rows, longest = found["seeds"], 0.0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        while not rows or (not part.small and not failed(rows) and time.monotonic() + longest < end):
            begun = time.monotonic()
            wave = {seed: start(command, seed, folder) for seed in range(len(rows), len(rows) + at_once)}
            for seed, process in wave.items():
                status = ended(process, end)
                rows[seed] = results(folder / "outputs" / f"s{seed}", folder / f"s{seed}.log")
                rows[seed] |= {"status": status, "seconds": round(time.monotonic() - begun, 1)}
                print(f"seed {seed}: status {status}, stages {rows[seed]['stages']}", flush=True)
                part.save(found)
            longest = max(longest, time.monotonic() - begun)
    if len(failed(rows)) == len(rows):
        sys.exit("no seed was finished:\n" + rows[0]["end_of_log"])


def failed(rows: dict[int, dict[str, Any]]) -> list[int]:
    """The seeds that did not end well."""
    return [seed for seed, row in rows.items() if row["status"]]


def runs_that_fit(model: str) -> int:
    """How many runs the GPU has room for at once."""
    weights = weights_of(ModelSpec(model, "causal_lm", eager=True), trained=False).total
    return max(1, min(MOST_AT_ONCE, free_bytes(device()) // (BYTES_A_WEIGHT * weights + BYTES_A_RUN)))


def start(command: list[str], seed: int, folder: Path) -> subprocess.Popen:
    """Begin the pipeline with a seed, in a process group of its own; its output is in `folder`/s<seed>.log."""
    with open(folder / f"s{seed}.log", "w") as log:
        return subprocess.Popen(
            [*command, "--run_name", f"s{seed}", "--seed", str(seed)], cwd=folder, stdout=log,
            stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip


def ended(process: subprocess.Popen, end: float) -> int:
    """The exit status of a run, which is killed with all its processes once the time is over."""
    try:
        return process.wait(max(0.0, end - time.monotonic()))
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        return process.wait()


def results(run: Path, log: Path) -> dict[str, Any]:
    """What a run has left: seconds of its stages, losses of step 1, measures of step 2, curves of step 3, report."""
    found: dict[str, Any] = {"stages": {}, "end_of_log": log.read_text(errors="replace")[-1000:]}
    for record in sorted((run / "stages").glob("*.json")):
        found["stages"] |= read_json(record)
    losses, curves = run / "step1_sft/metrics.jsonl", run / "step3_tppo/metrics.jsonl"
    if losses.is_file():
        found["dev_loss"] = [row["eval_loss"] for row in read_metrics(losses) if "eval_loss" in row]
    if curves.is_file():
        names = ("reward/score_per_response", "kl/per_sequence", "rollout/mismatch_mean", "seconds/step")
        found["step3"] = {name: [row[name] for row in read_metrics(curves) if name in row] for name in names}
    for name, file in {"step2": "step2_token_reward/reward/metrics.json", "report": "report.json"}.items():
        if (run / file).is_file():
            found[name] = read_json(run / file)
    return found


if __name__ == "__main__":
    run_command(main)
