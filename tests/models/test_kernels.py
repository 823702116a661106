"""Kernels chosen by flag: refused with a remedy where they cannot run, and never imported without their flag."""

from __future__ import annotations

import importlib.machinery
import subprocess
import sys
from types import ModuleType

import pytest
import torch
from transformers.integrations import liger

from common.config import ModelOptions
from common.errors import InputError
from common.models.kernels import check_liger, check_liger_family
from common.models.loading import check_machine, load_causal_lm, save_model_folder
from common.models.value_model import load_value_model
from tests.tiny_models import SEQUENCES, ordinary_tokenizer, tiny_llama

CUDA_ONLY = ("flash_attn", "bitsandbytes", "liger_kernel")

# All entry points are imported and a step is made with adapters, while CUDA packages cannot be imported, and whoever
# tries is noted (peft tries bitsandbytes, and goes on without).
TINY_STEP = """
import importlib.abc, sys

CUDA_ONLY = sys.argv[2].split(",")
tried = []

class Refuse(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in CUDA_ONLY:
            frame = sys._getframe(1)
            while frame.f_globals["__name__"].startswith("importlib"):
                if frame.f_globals["__name__"] == "importlib.util":
                    return  # somebody asks whether there is one
                frame = frame.f_back
            tried.append(frame.f_globals["__name__"])
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, Refuse())

import torch
import common.evaluation.evaluate, common.models.merging, step1_sft.main, step2_token_reward.main, step3_tppo.main
from common.config import LoraOptions, ModelOptions
from common.models.loading import apply_lora, load_causal_lm

model = apply_lora(load_causal_lm(sys.argv[1], ModelOptions()), LoraOptions(lora_r=2, lora_dora=True))
parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
ids = torch.tensor([[5, 6, 7, 8]])
model(input_ids=ids, labels=ids).loss.backward()
torch.optim.AdamW(parameters, fused=True).step()
print([name for name in CUDA_ONLY if name in sys.modules])
print([name for name in tried if name.startswith(("common", "step"))])
try:
    import flash_attn
except ModuleNotFoundError:
    print(tried[-1])
"""


def test_without_its_flag_no_cuda_package_is_imported(tmp_path):
    save_model_folder(tiny_llama(), ordinary_tokenizer(), tmp_path / "model", {})
    command = [sys.executable, "-c", TINY_STEP, str(tmp_path / "model"), ",".join(CUDA_ONLY)]
    ended = subprocess.run(command, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr[-2000:]
    assert ended.stdout.splitlines() == ["[]", "[]", "__main__"]  # the last: the trap does spring


@pytest.fixture
def gpu_with(monkeypatch):
    """Pretends that there is a GPU, and of the packages for it those that are named."""

    def pretend(*packages: str) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        found = {name: importlib.machinery.ModuleSpec(name, None) for name in packages}
        monkeypatch.setattr("importlib.util.find_spec", lambda name: found.get(name))

    return pretend


FLAGS = [
    ("--attn_implementation flash_attention_2", {"attn_implementation": "flash_attention_2"}, "none", "flash-attn"),
    ("--liger", {"liger": True}, "none", "liger-kernel"),
    ("--quantize nf4", {}, "nf4", "bitsandbytes"),
]


@pytest.mark.parametrize(("flag", "options", "quantize", "package"), FLAGS)
def test_without_a_gpu_or_its_package_a_kernel_is_refused_by_its_flag(
    tmp_path, monkeypatch, gpu_with, flag, options, quantize, package
):
    save_model_folder(tiny_llama(), ordinary_tokenizer(), tmp_path / "model", {})
    options, path = ModelOptions(dtype="bf16", **options), str(tmp_path / "model")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(InputError, match=f"^{flag} needs a CUDA GPU and there is none; (use sdpa|leave the flag out)$"):
        check_machine(path, options, quantize)
    with pytest.raises(InputError, match=f"^{flag} needs a CUDA GPU"):
        load_causal_lm(path, options, quantize)
    gpu_with()
    with pytest.raises(InputError, match=f"^{flag} needs the {package} package .pip install -r requirements-gpu.txt"):
        check_machine(path, options, quantize)


@pytest.fixture
def stand_in_for_liger(monkeypatch, gpu_with) -> list[tuple[str, dict]]:
    """Liger as far as this project calls it; what it was told to patch."""
    told: list[tuple[str, dict]] = []
    package, transformers = ModuleType("liger_kernel"), ModuleType("liger_kernel.transformers")
    patches = ModuleType("liger_kernel.transformers.monkey_patch")
    patches.MODEL_TYPE_TO_APPLY_LIGER_FN = {"llama": None, "qwen3": None}
    transformers._apply_liger_kernel_to_instance = lambda model, **parts: told.append((type(model).__name__, parts))
    for module in (package, transformers, patches):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    gpu_with("liger_kernel")
    monkeypatch.setattr(liger, "is_liger_kernel_available", lambda: True)
    return told


def test_liger_refuses_a_family_without_kernels_by_name(stand_in_for_liger):
    check_liger_family("llama")
    with pytest.raises(InputError) as error:
        check_liger_family("gpt2")
    assert "no kernels for models of type 'gpt2' (it has for llama, qwen3)" in str(error.value)


def test_liger_is_refused_where_its_compiled_kernels_cannot_be_kept(tmp_path, monkeypatch, stand_in_for_liger):
    """A HOME that cannot be written would show only when the first kernel is compiled, after the weights are loaded."""
    (tmp_path / "file").touch()
    for name in ("TRITON_CACHE_DIR", "TRITON_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "file"))
    refused = rf"^{tmp_path}/file/\.triton/cache: no file can be written .*: set TRITON_CACHE_DIR to a folder of"
    with pytest.raises(InputError, match=refused):
        check_liger()
    for name in ("TRITON_CACHE_DIR", "TRITON_HOME"):
        with monkeypatch.context() as variables:
            variables.setenv(name, str(tmp_path / "mine"))
            check_liger()


def test_liger_is_applied_to_what_is_trained_without_its_losses(tmp_path, stand_in_for_liger):
    save_model_folder(tiny_llama(), ordinary_tokenizer(), tmp_path / "model", {})
    for load in (load_causal_lm, load_value_model):
        load(str(tmp_path / "model"), ModelOptions(dtype="fp32"))
        assert stand_in_for_liger == []
        load(str(tmp_path / "model"), ModelOptions(dtype="fp32", liger=True))
        # The losses are ours: they need logits, and those of the response tokens alone.
        parts = {"cross_entropy": False, "fused_linear_cross_entropy": False}
        assert stand_in_for_liger == [("LlamaForCausalLM" if load is load_causal_lm else "LlamaModel", parts)]
        stand_in_for_liger.clear()


def test_fused_adam_steps_as_the_plain_one():
    weights = []
    for fused in (None, True):
        model = tiny_llama()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1, fused=fused)
        for sequence in SEQUENCES[:3]:
            ids = torch.tensor([sequence])
            model(input_ids=ids, labels=ids).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        weights.append(torch.cat([parameter.detach().flatten() for parameter in model.parameters()]))
    # Three steps of at most 1e-2 each, in fp32; Adam's division magnifies the rounding of gradients near zero.
    moved = (weights[0] - torch.cat([p.detach().flatten() for p in tiny_llama().parameters()])).abs().max()
    assert moved > 1e-2
    assert torch.allclose(weights[0], weights[1], rtol=0, atol=1e-3 * float(moved))
