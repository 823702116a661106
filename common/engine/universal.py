"""A checkpoint for another number of ranks: DeepSpeed's universal form, beside the shards that each rank wrote.

    bash scripts/convert_checkpoint.sh --checkpoint outputs/run/step3_tppo/checkpoints/step_00000012

Shards hold a rank's part of weights and optimiser states; the universal form holds them by parameter, so that any
number of ranks may read it (deepspeed.checkpoint.ds_to_universal). Checkpoints of all three steps can be converted. On
as many ranks as wrote them the shards are read, and the run goes on to the last bit.
"""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import deepspeed
import torch
from deepspeed.checkpoint import ds_to_universal

from common.access import check_writable
from common.config import option, parse_config
from common.engine.distributed import world_size
from common.engine.manifest import MANIFEST, damage, is_complete, read_facts, write_manifest
from common.errors import InputError, run_command

SUFFIX = "_universal"
_SHARDS = "*optim_states.pt"
# DeepSpeed's files in the folder above the shards, which tell it the shards' folder.
_LATEST, _LATEST_UNIVERSAL = "latest", f"latest{SUFFIX}"


@dataclass
class ConvertConfig:
    """Write a checkpoint's universal form, which any number of ranks can resume from."""

    checkpoint: str = option("", "The checkpoint's folder, as the refused run named it.")
    workers: int = option(4, "Processes that convert; each holds some parameters in memory.", minimum=1)


def main() -> None:
    """Convert one checkpoint and say what to do next."""
    config = parse_config(ConvertConfig)
    written = convert(Path(config.checkpoint), config.workers)
    names = ", ".join(path.name for path in written)
    print(
        f"{config.checkpoint}: {names}\nnext: repeat the command of the run with --resume, on any number of ranks "
        "(steps 1 and 2: with as many sequences an optimiser step)",
        flush=True,
    )


def convert(checkpoint: Path, workers: int = 1) -> list[Path]:
    """Write the universal form of every engine in `checkpoint`; returns its folders. Call on one process.

    What is there already is kept. Raises `InputError` for a folder that is no complete, undamaged checkpoint.
    """
    if workers < 1:
        raise InputError(f"--workers must be 1 or more, not {workers}")
    if not is_complete(checkpoint):
        raise InputError(f"{checkpoint} is no complete checkpoint: it has no {MANIFEST}")
    if problems := damage(checkpoint):
        raise InputError(f"{checkpoint} is damaged ({'; '.join(problems[:3])}); convert the one before it")
    shards = sorted({path.parent for path in checkpoint.rglob(_SHARDS) if not path.parent.name.endswith(SUFFIX)})
    if not shards:
        raise InputError(f"{checkpoint} holds no shards of an optimiser ({_SHARDS}), so there is nothing to convert")
    check_writable(checkpoint, "copy the run to a folder of your own")
    for folder in shards:
        if not _universal(folder).exists():
            _convert(folder, workers)
    write_manifest(checkpoint, **read_facts(checkpoint))
    return [_universal(folder) for folder in shards]


def needs_universal(checkpoint: Path, written_by: int) -> bool:
    """Whether this run must read the universal form, because `written_by` ranks are not as many as are running.

    Without shards (ZeRO stage 0) any number of ranks can read what is there. Raises `InputError`, with the command that
    converts, where the universal form is needed and there is none.
    """
    if written_by == world_size() or not any(checkpoint.rglob(_SHARDS)):
        return False
    if not any(path.is_dir() for path in checkpoint.glob(f"*{SUFFIX}")):
        raise InputError(
            f"{checkpoint}: written by {written_by} ranks, but {world_size()} are running. Resume on as many, or make "
            f"it readable by any number first: bash scripts/convert_checkpoint.sh --checkpoint {checkpoint}"
        )
    return True


@contextmanager
def reading_universal(engine: deepspeed.DeepSpeedEngine, universal: bool) -> Iterator[None]:
    """Have `engine.load_checkpoint` read the universal form, or the shards, meanwhile.

    DeepSpeed takes that from the engine's configuration, which is older than the choice.
    """
    before = engine._config.load_universal_checkpoint
    engine._config.load_universal_checkpoint = universal
    try:
        yield
    finally:
        engine._config.load_universal_checkpoint = before


def mend_optimizer(engine: deepspeed.DeepSpeedEngine, universal: Path) -> None:
    """Set right what DeepSpeed 0.19 does to a ZeRO-3 optimiser as it loads the folder `universal`.

    All flat parameters get one and the same tensor for the steps they have made, which torch's AdamW then counts up
    once for each of them; and all parameter groups get the settings of the first (its weight decay, say).
    """
    for state in engine.optimizer.optimizer.state.values():
        if torch.is_tensor(state.get("step")):
            state["step"] = state["step"].clone()
    saved = torch.load(universal / "zero" / "optimizer_state.pt", weights_only=False, mmap=True)
    for group, settings in zip(engine.optimizer.param_groups, saved["param_groups"], strict=True):
        group.update({name: value for name, value in settings.items() if name != "params"})


def _universal(shards: Path) -> Path:
    return shards.with_name(shards.name + SUFFIX)


def _convert(shards: Path, workers: int) -> None:
    final = _universal(shards)
    temporary = final.with_name(f".{final.name}.tmp")
    if temporary.exists():
        shutil.rmtree(temporary)
    ds_to_universal.main(
        argparse.Namespace(
            input_folder=str(shards),
            output_folder=str(temporary),
            num_extract_workers=workers,
            num_merge_workers=workers,
            keep_temp_folder=False,
            strict=True,
            # Below stage 3 the shards do not say which parameters tensor parallelism would cut: none, in this project.
            inject_missing_state=True,
        )
    )
    temporary.rename(final)
    latest = final.with_name(_LATEST_UNIVERSAL)
    if final.with_name(_LATEST).exists():
        latest.write_text(final.name)
    else:
        latest.unlink()


if __name__ == "__main__":
    run_command(main)
