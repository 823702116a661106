"""The code in README.md and docs/adapters.md, run as it stands there."""

from __future__ import annotations

import re
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from common.config import LoraOptions
from common.models.loading import apply_lora, save_model_folder
from tests.models.test_loading import logits, train_a_little
from tests.tiny_models import ordinary_tokenizer, tiny_llama

ROOT = Path(__file__).resolve().parents[2]
DOCUMENT = ROOT / "docs" / "adapters.md"


def test_the_documented_code_loads_the_merged_model_and_the_adapters(tmp_path, monkeypatch, capsys):
    run = tmp_path / "outputs" / "my_run"
    save_model_folder(tiny_llama(), ordinary_tokenizer(), run / "step1_sft" / "model", {})
    tuned = apply_lora(AutoModelForCausalLM.from_pretrained(run / "step1_sft" / "model"), LoraOptions(lora_r=4))
    train_a_little(tuned)
    save_model_folder(tuned, ordinary_tokenizer(), run / "step3_tppo" / "model", {})
    monkeypatch.chdir(tmp_path)
    for page in (ROOT / "README.md", DOCUMENT):
        blocks = re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)
        assert blocks
        names: dict = {}
        for block in blocks:
            exec(compile(block, str(page), "exec"), names)
        for name in ("merged", "adapted"):
            assert torch.allclose(logits(names[name]), logits(tuned), atol=1e-5)
    assert "red running shoes" in capsys.readouterr().out


def test_the_table_of_memory_is_arithmetic():
    hidden, inner, key_value, layers, vocabulary = 4096, 14336, 1024, 32, 32000  # Mistral-7B-v0.1's config.json
    shapes = [(hidden, hidden)] * 2 + [(hidden, key_value)] * 2 + [(hidden, inner)] * 3
    linear = layers * sum(inputs * outputs for inputs, outputs in shapes)
    whole = linear + 2 * vocabulary * hidden + (2 * layers + 1) * hidden
    thin = layers * sum(inputs + outputs for inputs, outputs in shapes)
    text = DOCUMENT.read_text(encoding="utf-8")
    for number in (
        f"({whole / 1e9:.2f} billion weights, {linear / 1e9:.2f} of them in linear layers)",
        f"| {16 * whole / 1e9:.1f} GB |",
        f"| {2 * whole / 1e9:.1f} GB | {16 * thin / 1e6:.1f} million: {16 * 16 * thin / 1e9:.1f} GB |",
        f"| {2 * whole / 1e9:.1f} GB | {64 * thin / 1e6:.1f} million: {16 * 64 * thin / 1e9:.1f} GB |",
        f"| QLoRA, r = 16 | {(linear * 4.127 / 8 + 2 * (whole - linear)) / 1e9:.1f} GB |",
    ):
        assert number in text
