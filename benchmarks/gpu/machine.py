"""The machine itself: packages against the pins, the peak of matrix products, and the bandwidth of a large copy."""

from __future__ import annotations

import importlib.metadata
import re
import time
from pathlib import Path

import torch
import transformers
from transformers import modeling_utils

from benchmarks.gpu.part import device, read_part, wait
from benchmarks.measuring import gemm_peak
from common.errors import InputError, run_command

REQUIREMENTS = Path(__file__).resolve().parents[2] / "requirements.txt"


def main() -> None:
    """Save what the machine is, then refuse one whose packages cannot run the other parts."""
    part = read_part("machine", __doc__)
    cuda = torch.cuda.is_available()
    found = {
        "cuda": torch.version.cuda,
        "memory_gib": round(torch.cuda.get_device_properties(0).total_memory / 2**30, 1) if cuda else None,
        "other_than_pinned": other_than_pinned(),
        "gemm_peak_tflops": {
            str(dtype).removeprefix("torch."): round(gemm_peak(dtype) / 1e12, 2)
            for dtype in ((torch.bfloat16, torch.float32) if cuda else (torch.float32,))
        },
        "copy_bandwidth_gb_s": round(copy_bandwidth(device()) / 1e9, 1),
    }
    print(*(f"{name}: {value}" for name, value in found.items()), sep="\n")
    part.save(found)
    if not hasattr(modeling_utils, "slice_logits_to_keep"):
        raise InputError(
            f"transformers {transformers.__version__} takes no mask in logits_to_keep, so that no model can be scored; "
            "add the wheel of the pinned version to the folder of --wheels (benchmarks/gpu/README.md)"
        )


def other_than_pinned() -> dict[str, str]:
    """The packages of requirements.txt that are missing here or of another version: what is there, and the pin."""
    differing = {}
    for name, pin in re.findall(r"^([\w.-]+)==(\S+)", REQUIREMENTS.read_text(), re.MULTILINE):
        there = installed_version(name)
        if there.partition("+")[0] != pin:
            differing[name] = f"{there}, pinned {pin}"
    return differing


def installed_version(package: str) -> str:
    """Of a package, or "missing"."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "missing"


def copy_bandwidth(device: torch.device) -> float:
    """Bytes a second that a large copy reads and writes."""
    source = torch.zeros(2**30 if device.type == "cuda" else 2**26, dtype=torch.uint8, device=device)
    target, best = torch.empty_like(source), float("inf")
    for _ in range(10):
        begun = time.perf_counter()
        target.copy_(source)
        wait()
        best = min(best, time.perf_counter() - begun)
    return 2 * source.numel() / best


if __name__ == "__main__":
    run_command(main)
