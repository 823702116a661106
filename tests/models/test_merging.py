"""Adapters merged by the command, as a user runs it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from common.config import LoraOptions
from common.errors import run_command
from common.models.loading import apply_lora, save_model_folder
from common.models.merging import main, merge
from tests.models.test_loading import logits, train_a_little
from tests.tiny_models import ordinary_tokenizer, tiny_llama


def merge_command(*flags: str | Path) -> subprocess.CompletedProcess:
    """The script from the repository's root, without PYTHONPATH."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return subprocess.run(
        [sys.executable, "scripts/merge_adapter.py", *map(str, flags)], env=environment, capture_output=True, text=True
    )


@pytest.fixture(scope="module", params=["lora", "dora"])
def trained(request, tmp_path_factory) -> tuple[Path, torch.Tensor]:
    """A folder with `base/` and `tuned/adapter`, and what the model says with its adapters beside its layers."""
    folder = tmp_path_factory.mktemp("trained")
    save_model_folder(tiny_llama(), ordinary_tokenizer(), folder / "base", {"max_new_tokens": 5})
    options = LoraOptions(lora_r=4, lora_rslora=True, lora_dora=request.param == "dora")
    model = apply_lora(AutoModelForCausalLM.from_pretrained(folder / "base"), options)
    train_a_little(model)
    sampling = {"max_new_tokens": 9, "do_sample": True, "temperature": 0.7}
    save_model_folder(model, ordinary_tokenizer(), folder / "tuned", sampling)
    return folder, logits(model)


def test_the_merged_folder_is_base_and_adapters(trained, tmp_path):
    folder, expected = trained
    ended = merge_command("--adapter", folder / "tuned" / "adapter", "--output", tmp_path / "merged")
    assert ended.returncode == 0, ended.stderr
    assert f"--actor_path {tmp_path / 'merged'}" in ended.stdout
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert torch.allclose(logits(merged), expected, atol=1e-5)  # fp32 sums in another order, logits up to 10
    assert not torch.allclose(expected, logits(tiny_llama()), atol=1e-2), "the adapters must matter"
    # To the last bit what the step itself wrote merged, so either is as good.
    assert torch.equal(logits(merged), logits(AutoModelForCausalLM.from_pretrained(folder / "tuned")))
    settings = GenerationConfig.from_pretrained(tmp_path / "merged")
    assert (settings.max_new_tokens, settings.temperature, settings.eos_token_id) == (9, 0.7, 0)
    assert AutoTokenizer.from_pretrained(tmp_path / "merged").pad_token == "<pad>"
    assert not (tmp_path / "merged" / "adapter").exists()


def test_adapters_of_another_program_take_the_tokenizer_of_the_base(trained, tmp_path):
    folder, expected = trained
    bare = tmp_path / "bare"
    bare.mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (bare / name).write_bytes((folder / "tuned" / "adapter" / name).read_bytes())
    merged = merge(bare, str(folder / "base"), tmp_path / "merged", "bf16")
    model = AutoModelForCausalLM.from_pretrained(merged)
    assert model.dtype == torch.bfloat16
    # Weights of 8 bits of mantissa: relative 2^-9 each, in two layers of width 32 and logits up to 10.
    assert torch.allclose(logits(model).float(), expected, atol=0.5)
    assert AutoTokenizer.from_pretrained(merged).eos_token == "<eos>"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--output", "new"), "give --adapter and --output"),
        (("--adapter", "tuned", "--output", "base"), "is there already"),
        (("--adapter", "base", "--output", "new"), "no adapters (no adapter_config.json)"),
        (("--adapter", "tuned", "--base", "other", "--output", "new"), "do not fit this model"),
    ],
)
def test_what_cannot_be_merged_is_refused_in_a_line(trained, tmp_path, flags, message, monkeypatch, capsys):
    folder, _ = trained
    other = tmp_path / "other"
    save_model_folder(tiny_llama(hidden_size=16), ordinary_tokenizer(), other, {})
    places = {"tuned": folder / "tuned", "base": folder / "base", "other": other, "new": tmp_path / "new"}
    monkeypatch.setattr(sys, "argv", ["merge_adapter.py", *(str(places.get(flag, flag)) for flag in flags)])
    with pytest.raises(SystemExit) as stop:
        run_command(main)
    error = capsys.readouterr().err.splitlines()[-1]  # before it progress bars
    assert stop.value.code == 2 and error.startswith("error: ") and message in error
    assert not (tmp_path / "new").exists()
