"""What a run may use: GPUs or CPU ranks, of this machine or of many."""

from __future__ import annotations

import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

from common.errors import InputError, one_line

CPU_RANKS = 2
# Without one of these no GPU is asked for: that needs torch, whose import takes seconds.
_DRIVERS = ("nvidia-smi", "rocm-smi")
_HOST = re.compile(r"(\S+)\s+slots=(\d+)")


@dataclass(frozen=True)
class Hardware:
    """`ranks` processes on all machines together, each with a GPU if there are `gpus` (a machine).

    With a `hostfile` there are `on_each` of them on every machine; 0: as many as it has slots.
    """

    gpus: int
    ranks: int
    hostfile: str = ""
    on_each: int = 0

    @property
    def launcher(self) -> str:
        """The script in stepN_*/launch that fits, without its ending."""
        if self.hostfile:
            return "multi_node"
        if not self.gpus:
            return "cpu"
        return "single_gpu" if self.ranks == 1 else "single_node"

    @property
    def flags(self) -> list[str]:
        """What the deepspeed launcher is given; it counts GPUs by machine."""
        if not self.hostfile:
            return ["--num_gpus", str(self.ranks)]
        return ["--hostfile", self.hostfile, *(["--num_gpus", str(self.on_each)] if self.on_each else [])]

    def memory(self) -> int:
        """Bytes that a rank may take: its GPU's, or its share of the host's."""
        if self.gpus:
            import torch

            return torch.cuda.get_device_properties(0).total_memory
        import psutil

        here = CPU_RANKS if self.hostfile else self.ranks
        return psutil.virtual_memory().total // here

    def __str__(self) -> str:
        kind = "GPU" if self.gpus else "CPU rank"
        where = f" of the machines in {self.hostfile}" if self.hostfile else ""
        return f"{self.ranks} {kind}{'s' if self.ranks != 1 else ''}{where}"


def find_hardware(num_gpus: str, hostfile: str) -> Hardware:
    """What the flags ask for, on this machine if they name no other. Raises `InputError` where that is not there."""
    wanted = int(num_gpus) if num_gpus else 0
    if hostfile:
        slots = read_hostfile(hostfile)
        if wanted > min(slots):
            raise InputError(f"--num_gpus {num_gpus}: a machine in {hostfile} has {min(slots)} slots")
        return Hardware(count_gpus(), wanted * len(slots) or sum(slots), hostfile, wanted)
    gpus = count_gpus()
    if gpus and wanted > gpus:
        raise InputError(f"--num_gpus {num_gpus}: this machine has {gpus}")
    return Hardware(gpus, wanted or gpus or CPU_RANKS)


def read_hostfile(path: str) -> list[int]:
    """The slots of each machine in a hostfile of `NAME slots=N` lines. Raises `InputError` with file and line."""
    slots: dict[str, int] = {}
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"--hostfile {path}: {one_line(error)}; see scripts/hostfile.example") from None
    if text.startswith("\ufeff"):  # DeepSpeed reads the file too, and takes the mark for a part of the first name
        raise InputError(f"{path}:1: begins with a byte order mark; save the file as UTF-8 without it")
    for number, line in enumerate(text.splitlines(), start=1):
        line = line.partition("#")[0].strip()
        if not line:
            continue
        found = _HOST.fullmatch(line)
        if found is None or int(found[2]) < 1:
            raise InputError(f"{path}:{number}: expected `NAME slots=N` with N of 1 or more, found {line[:80]!r}")
        if found[1] in slots:
            raise InputError(f"{path}:{number}: {found[1]} is there twice; give its slots in one line")
        slots[found[1]] = int(found[2])
    if not slots:
        raise InputError(f"{path}: names no machine; write a line `NAME slots=N` for each")
    return list(slots.values())


def count_gpus() -> int:
    """GPUs that torch can use here."""
    if os.environ.get("DS_ACCELERATOR") == "cpu" or not any(map(shutil.which, _DRIVERS)):
        return 0
    import torch

    return torch.cuda.device_count()
