"""A plan: what each GPU holds in each phase of a run, how long that takes, and how it is shown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from common.engine.memory import GIB

MIB = 2**20

PARTS = ("weights", "gradients", "optimiser", "buckets", "gathered", "KV cache", "activations")
# Of a device's memory, for what no plan knows: the CUDA context, NCCL, libraries' workspaces, fragments.
MARGIN = 0.08

Verdict = Literal["fits", "is tight", "does not fit"]


@dataclass(frozen=True)
class Machine:
    """`ranks` GPUs (or CPU processes, without `cuda`) with `memory` bytes each that the run may take.

    `flops` (a second) and `bandwidth` (bytes a second) are what a GPU is assumed to achieve, not what its maker says.
    """

    ranks: int
    memory: int
    cuda: bool = True
    flops: float = 2e14
    bandwidth: float = 1.5e12


@dataclass(frozen=True)
class Phase:
    """A part of the run: bytes of each of `PARTS` at its highest, and how long it takes in each update."""

    name: str
    parts: Mapping[str, int]
    seconds: float = 0.0

    @property
    def total(self) -> int:
        """All parts."""
        return sum(self.parts.values())


@dataclass(frozen=True)
class Plan:
    """All phases of a run on a machine. `updates` of the whole run are 0 where the data decides; `host` is what a rank
    holds in host memory for the GPU; `notes` are said below the table."""

    title: str
    machine: Machine
    phases: Sequence[Phase]
    updates: int = 0
    host: int = 0
    notes: Sequence[str] = field(default_factory=list)

    @property
    def fullest(self) -> Phase:
        """The phase with the peak."""
        return max(self.phases, key=lambda phase: phase.total)

    @property
    def peak(self) -> int:
        """Bytes of the fullest phase."""
        return self.fullest.total

    @property
    def seconds(self) -> float:
        """Of an update: in step 3 a rollout and all updates made of it."""
        return sum(phase.seconds for phase in self.phases)

    @property
    def verdict(self) -> Verdict:
        """Whether the peak fits, and leaves `MARGIN`."""
        if self.peak > self.machine.memory:
            return "does not fit"
        return "fits" if self.peak <= (1 - MARGIN) * self.machine.memory else "is tight"

    def table(self) -> str:
        """One row a phase, GiB (of a small run MiB) a GPU."""
        unit, name = (GIB, "GiB") if self.peak >= GIB else (MIB, "MiB")
        rows = [[name, *PARTS, "total", "seconds"]]
        for phase in self.phases:
            sizes = [f"{size / unit:.2f}" if size else "-" for size in map(phase.parts.get, PARTS)]
            seconds = f"{phase.seconds:.3g}" if phase.seconds else "-"
            rows.append([phase.name, *sizes, f"{phase.total / unit:.2f}", seconds])
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        return "\n".join(
            "  ".join(cell.rjust(width) if place else cell.ljust(width) for place, (cell, width) in enumerate(cells))
            for cells in (zip(row, widths, strict=True) for row in rows)
        )

    def summary(self) -> str:
        """The peak against the memory, in one sentence."""
        return (
            f"peak {shown(self.peak)} in {self.fullest.name} of {shown(self.machine.memory)} a "
            f"{'GPU' if self.machine.cuda else 'rank'}: {self.verdict}"
        )

    def time(self) -> str:
        """Seconds of an update and hours of the run, with what was assumed."""
        whole = f", {self.updates} of them {self.seconds * self.updates / 3600:.1f} h" if self.updates else ""
        return (
            f"time: an update {self.seconds:.3g} s{whole}, if a GPU achieves {self.machine.flops / 1e12:.0f} TFLOP/s "
            f"and {self.machine.bandwidth / 1e9:.0f} GB/s (--achieved_tflops, --achieved_bandwidth); communication, "
            "loading and saving not counted"
        )


def shown(size: float) -> str:
    """Bytes as GiB, or less than one as MiB."""
    return f"{size / GIB:.2f} GiB" if size >= GIB else f"{size / MIB:.2f} MiB"
