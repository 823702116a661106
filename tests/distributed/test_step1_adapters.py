"""Step 1 with adapters on two ranks under ZeRO-3, and what it refuses on a machine without a GPU."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from common.files import read_json, write_jsonl
from common.models.loading import save_model_folder
from tests.distributed.ranks import run_on_ranks
from tests.distributed.test_step1_ranks import run_main
from tests.test_step1 import example
from tests.tiny_models import ordinary_tokenizer, tiny_llama


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU may have all of it")
@pytest.mark.parametrize("flags", [["--liger"], ["--quantize=nf4", "--lora_r=4", "--dtype=bf16", "--zero_stage=2"]])
def test_what_cannot_run_here_is_refused_before_anything_is_read(flags: list[str]) -> None:
    places = ["--model_name_or_path=nowhere", "--data_dir=nowhere", "--output_dir=nowhere"]
    assert "needs a CUDA GPU" in run_main(0, 1, [*places, *flags])


@pytest.mark.distributed
def test_dora_under_zero_3_is_exported_as_base_and_adapter(tmp_path: Path) -> None:
    save_model_folder(tiny_llama(), ordinary_tokenizer(), tmp_path / "base", {})
    examples = [example(i, ("blue hat", "red shoes"[: 3 + i % 6])) for i in range(8)]
    for split in ("train", "dev"):
        write_jsonl(tmp_path / "data" / f"{split}.jsonl", (item.to_dict() for item in examples))
    flags = {
        "model_name_or_path": tmp_path / "base", "data_dir": tmp_path / "data", "output_dir": tmp_path / "run",
        "num_queries": 2, "max_prompt_tokens": 180, "learning_rate": 1e-2, "num_train_epochs": 1, "lora_r": 4,
        "lora_dora": "true", "fused_adam": "true", "warmup_ratio": 0,
    }  # fmt: skip
    assert run_on_ranks(run_main, 2, [f"--{key}={value}" for key, value in flags.items()]) == ["", ""]
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    ids = torch.tensor([[5, 6, 7, 8, 30, 31]])
    with torch.no_grad():
        start = base(ids).logits
        merged = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model")(ids).logits
        adapted = PeftModel.from_pretrained(base, tmp_path / "run" / "model" / "adapter").eval()(ids).logits
    assert torch.allclose(merged, adapted, atol=1e-4)  # fp32 sums in another order, logits of size 10
    assert not torch.allclose(merged, start, atol=1e-2), "the adapters must have learned"
    assert read_json(tmp_path / "run" / "environment.json")["choices"]["fused_adam"]
