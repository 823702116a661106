"""What all benchmarks share: ranks, alternating runs, the machine's own limits, and result files."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import shlex
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import torch
import torch.multiprocessing as mp

from common.engine import distributed
from common.files import write_json

RESULTS = Path(__file__).parent / "results"
PACKAGES = ("torch", "deepspeed", "transformers", "peft", "trl")


def read_switches(description: str, **helps: str) -> argparse.Namespace:
    """The flags of a benchmark that takes nothing but switches, by name and help; `--help` shows `description`."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, text in helps.items():
        parser.add_argument(f"--{name}", action="store_true", help=text)
    return parser.parse_args()


def on_ranks(function: Callable[..., Any], world_size: int, *arguments: Any) -> Any:
    """What `function(*arguments)` returns on rank 0 of `world_size` processes, each on one core (or one GPU)."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "result.json"
        mp.spawn(_rank, (world_size, free_port(), function, arguments, path), nprocs=world_size)
        return json.loads(path.read_text())


def _rank(
    rank: int, world_size: int, port: int, function: Callable[..., Any], arguments: Sequence[Any], path: Path
) -> None:
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_WORLD_SIZE=str(world_size),
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), TOKENIZERS_PARALLELISM="false",
    )  # fmt: skip
    if not torch.cuda.is_available():
        torch.set_num_threads(1)
    distributed.start()
    result = function(*arguments)
    if rank == 0:
        path.write_text(json.dumps(result))


def allocator_settings() -> dict[str, str]:
    """The allocator that `scripts/environment.sh` chooses for CPU ranks: every run of the recipe uses it. It must be in
    the environment before a process starts."""
    script = "source scripts/environment.sh && use_cpu_ranks && env"
    ran = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=True)
    pairs = (line.split("=", 1) for line in ran.stdout.splitlines() if "=" in line)
    return {name: value for name, value in pairs if name.startswith(("MALLOC_", "LD_PRELOAD"))}


@contextmanager
def environment_with(settings: Mapping[str, str]) -> Iterator[None]:
    """`settings` in the environment of the processes that start meanwhile."""
    before = os.environ.copy()
    os.environ.update(settings)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def peer(script: str, folder: Path, steps: int, batch: int, cores: int, *more: str) -> Any:
    """What a peer's script prints in its last line, as JSON; it runs in a process of its own with `cores` threads.

    `more` are further arguments. Ends the benchmark when the script fails.
    """
    command = [sys.executable, script, "--folder", str(folder), "--steps", str(steps), "--batch", str(batch), *more]
    environment = os.environ | {"OMP_NUM_THREADS": str(cores), "TOKENIZERS_PARALLELISM": "false"}
    ran = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if ran.returncode:
        sys.exit(f"{script} failed; is benchmarks/requirements.txt installed?\n{ran.stderr[-2000:]}")
    return json.loads(ran.stdout.splitlines()[-1])


def timed(action: Callable[[], Any]) -> float:
    """Seconds of one call, from when every rank is here to when every rank is done."""
    distributed.barrier()
    begun = time.perf_counter()
    action()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    distributed.barrier()
    return time.perf_counter() - begun


def alternating(systems: Mapping[str, Callable[[int], Any]], runs: int) -> dict[str, list[float]]:
    """Seconds of `runs` runs of each system, in turn, after one run each that does not count.

    A system is called with the run's number, to draw its random numbers by.
    """
    seconds: dict[str, list[float]] = {name: [] for name in systems}
    for run in range(-1, runs):
        for name, action in systems.items():
            found = timed(lambda action=action, run=run: action(run))
            if run >= 0:
                seconds[name].append(round(found, 4))
    return seconds


def median_ratio(numerator: Sequence[float], denominator: Sequence[float]) -> float:
    """Median over the runs of one system's seconds over another's in the same turn."""
    return round(statistics.median(a / b for a, b in zip(numerator, denominator, strict=True)), 3)


def gemm_peak(dtype: torch.dtype = torch.float32, size: int = 1024, seconds: float = 1.0) -> float:
    """FLOP/s of the best of many square matrix products, on the threads that torch has in this process (or the GPU)."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    size = 8192 if device == "cuda" else size
    left, right = (torch.randn(size, size, dtype=dtype, device=device) for _ in range(2))
    best, end = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < end:
        begun = time.perf_counter()
        torch.matmul(left, right)
        if device == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - begun)
    return 2 * size**3 / best


def save(name: str, content: Mapping[str, Any], path: str = "") -> None:
    """Write `results/<name>.json`, or `path`, with the command, the machine and the versions beside `content`."""
    target = Path(path) if path else RESULTS / f"{name}.json"
    write_json(target, {
        "command": shlex.join(["python", *sys.argv]), "machine": machine(), "versions": versions(), **content,
    })  # fmt: skip
    print(f"results: {target}")


def machine() -> dict[str, Any]:
    """Processor, cores, memory and GPU."""
    memory = round(psutil.virtual_memory().total / 2**30, 1)
    found: dict[str, Any] = {"processor": _processor(), "cores": os.cpu_count(), "memory_gib": memory}
    if torch.cuda.is_available():
        found["gpu"] = torch.cuda.get_device_name()
    return found


def versions() -> dict[str, str]:
    """Of Python and of what is measured, as far as it is installed."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def free_port() -> int:
    """A port of 127.0.0.1 that nobody listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]
