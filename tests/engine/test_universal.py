"""Checkpoints for another number of ranks: weights, moments, steps and groups come over, and training goes on alike."""

from __future__ import annotations

import json
from pathlib import Path

import deepspeed
import pytest
import torch

from common.config import LoraOptions
from common.engine.checkpoint import load_checkpoint, save_checkpoint
from common.engine.manifest import damage, read_facts
from common.engine.universal import convert
from common.errors import InputError
from common.models.loading import apply_lora
from tests.distributed.ranks import run_on_ranks
from tests.engine.test_manifest import checkpoint as invented_checkpoint
from tests.engine.test_manifest import flip_a_bit
from tests.tiny_models import tiny_llama

BEFORE, AFTER = 3, 3  # optimiser steps


def train(
    rank: int, world_size: int, folder: str, stage: int, lora: bool, first: int
) -> dict[str, torch.Tensor] | InputError:
    """Steps from `first` on, loaded from `folder` or, from 0, saved there; every rank has the same batch.

    Returns the whole weights that were trained, or why the checkpoint was refused. The mean of equal gradients is the
    gradient, on any number of ranks.
    """
    torch.manual_seed(5)
    model = apply_lora(tiny_llama(initializer_range=0.05), LoraOptions(lora_r=2 if lora else 0))
    named = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    groups = [  # two groups that differ in more than their learning rate
        {"params": [parameter for name, parameter in named if "norm" not in name and "lora_B" not in name]},
        {"params": [parameter for name, parameter in named if "norm" in name or "lora_B" in name], "weight_decay": 0.5},
    ]
    config = {
        "train_micro_batch_size_per_gpu": 1, "train_batch_size": world_size,
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 100},
        "zero_allow_untested_optimizer": True, "zero_force_ds_cpu_optimizer": False,
    }  # fmt: skip
    optimizer = torch.optim.AdamW(groups, lr=1e-2, weight_decay=0.1)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    if first:
        try:
            load_checkpoint(Path(folder) / f"step_{first:08d}", {"model": engine})
        except InputError as error:
            return error
    for step in range(first, BEFORE + AFTER if first else BEFORE):
        ids = torch.randint(5, 200, (1, 12), generator=torch.Generator().manual_seed(step))
        engine.backward(engine(input_ids=ids, labels=ids).loss)
        engine.step()
    if not first:
        save_checkpoint(folder, BEFORE, {"model": engine}, {}, keep=1, score=0.0)
        return {}
    with deepspeed.zero.GatheredParameters([parameter for _, parameter in named], enabled=stage == 3):
        return {name: parameter.detach().clone() for name, parameter in named}


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("before", "after", "stage", "lora"),
    [(2, 1, 1, False), (2, 1, 2, True), (2, 1, 3, True), (2, 1, 3, False), (1, 2, 3, False)],
)
def test_training_goes_on_alike_on_another_number_of_ranks(
    before: int, after: int, stage: int, lora: bool, tmp_path: Path
) -> None:
    run_on_ranks(train, before, str(tmp_path), stage, lora, 0)
    straight = run_on_ranks(train, before, str(tmp_path), stage, lora, BEFORE)[0]
    refused = run_on_ranks(train, after, str(tmp_path), stage, lora, BEFORE)[0]
    assert f"scripts/convert_checkpoint.sh --checkpoint {tmp_path}/step_0" in str(refused)
    convert(tmp_path / f"step_{BEFORE:08d}")
    moved = run_on_ranks(train, after, str(tmp_path), stage, lora, BEFORE)[0]
    assert straight.keys() == moved.keys()
    for name, weight in straight.items():
        # The mean of two equal numbers is exact; AdamW's fused and looped kernels may differ in the last bit.
        torch.testing.assert_close(moved[name], weight, rtol=1e-6, atol=1e-7, msg=name)


def test_what_cannot_be_converted_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is no complete checkpoint"):
        convert(tmp_path)
    folder = invented_checkpoint(tmp_path / "invented")
    with pytest.raises(InputError, match="holds no shards of an optimiser"):
        convert(folder)
    with pytest.raises(InputError, match="--workers must be 1 or more"):
        convert(folder, workers=0)
    flip_a_bit(folder / "weights.bin")
    with pytest.raises(InputError, match=r"is damaged .*weights.bin has other content"):
        convert(folder)


@pytest.mark.distributed
def test_a_conversion_keeps_facts_and_may_be_repeated(tmp_path: Path) -> None:
    run_on_ranks(train, 2, str(tmp_path), 1, False, 0)
    folder = tmp_path / f"step_{BEFORE:08d}"
    facts = read_facts(folder)
    half_done = folder / ".model_universal.tmp"
    half_done.mkdir()
    (half_done / "left over by a kill").touch()
    (written,) = convert(folder)
    assert written.name == "model_universal" and not half_done.exists()
    inode = (written / "zero" / "optimizer_state.pt").stat().st_ino
    assert convert(folder) == [written]
    assert (written / "zero" / "optimizer_state.pt").stat().st_ino == inode
    assert read_facts(folder) == facts and damage(folder) == []
    listed = json.loads((folder / "manifest.json").read_text())["files"]
    assert "model_universal/zero/optimizer_state.pt" in listed
    assert not list(folder.rglob("latest*"))
