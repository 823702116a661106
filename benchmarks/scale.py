"""How time and memory of a TPPO step grow with the model, the history, the answers a prompt, and the ranks.

    python benchmarks/scale.py                 CPU ranks of one core each, about 8 minutes

One thing is changed at a time. Writes `results/scale.json` and the plot `results/scale.png`.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from benchmarks.measuring import RESULTS, on_ranks, read_switches, save
from benchmarks.step3 import Setup, Shape, prepare, tppo_steps
from common.errors import run_command

RANKS, STAGE, STEPS = 2, 3, 2
WIDTHS = {128: 4, 256: 6, 384: 8}  # and layers
AXES: dict[str, list[tuple[float, dict[str, int], Shape, int]]] = {
    "million weights of layers": [
        (12 * width * width * layers / 1e6, _sizes, Shape(), RANKS)
        for width, layers in WIDTHS.items()
        for _sizes in [{"hidden_size": width, "intermediate_size": 8 * width // 3, "num_hidden_layers": layers}]
    ],
    "tokens of a history": [
        (tokens, {}, Shape(prompt_tokens=tokens), RANKS) for tokens in (64, 128, 256, 512)
    ],
    "answers a prompt": [(samples, {}, Shape(samples=samples), RANKS) for samples in (1, 2, 4, 8)],
    "ranks": [(ranks, {}, Shape(), ranks) for ranks in (1, 2, 4)],
}


def main() -> None:
    """Run every point once, with its own warm-up step, and draw the result."""
    read_switches(__doc__)
    found: dict[str, list[dict[str, Any]]] = {}
    for axis, points in AXES.items():
        found[axis] = []
        for value, sizes, shape, ranks in points:
            with tempfile.TemporaryDirectory() as folder:
                prepare(Path(folder), shape, **sizes)
                step = on_ranks(tppo_steps, ranks, folder, "run", Setup(ranks, 1, STAGE), shape, STEPS)
            row = {
                "value": value, "seconds": round(statistics.median(step["seconds"]), 3),
                "peak_memory_mib": step["peak_memory_mib"],
                "phases": {name.split("/")[1]: round(took, 3) for name, took in step["phases"].items()},
            }  # fmt: skip
            found[axis].append(row)
            print(axis, row, flush=True)
    draw(found)
    save("scale", {"base": {**Shape()._asdict(), "ranks": RANKS, "zero_stage": STAGE}, "axes": found})


def draw(found: dict[str, list[dict[str, Any]]]) -> None:
    """A panel for each axis: seconds on the left, memory of a rank on the right."""
    figure, panels = plt.subplots(1, len(found), figsize=(4 * len(found), 3.2), layout="constrained")
    for panel, (axis, rows) in zip(panels, found.items(), strict=True):
        values = [row["value"] for row in rows]
        panel.plot(values, [row["seconds"] for row in rows], "o-", color="tab:blue")
        panel.set(xlabel=axis, ylim=(0, None))
        panel.set_ylabel("seconds a step", color="tab:blue")
        memory = panel.twinx()
        memory.plot(values, [row["peak_memory_mib"] for row in rows], "s--", color="tab:orange")
        memory.set_ylim(0, None)
        memory.set_ylabel("peak MiB of a rank", color="tab:orange")
    figure.savefig(RESULTS / "scale.png", dpi=110)


if __name__ == "__main__":
    run_command(main)
