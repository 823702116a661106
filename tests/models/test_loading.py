"""Loading and saving of models and tokenizers: what is refused, and that a saved folder is the same model."""

from __future__ import annotations

import json

import pytest
import torch
from peft import PeftModel
from transformers import (
    AddedToken,
    AutoModelForCausalLM,
    AutoTokenizer,
    BertConfig,
    BertModel,
    GenerationConfig,
    PreTrainedTokenizerBase,
)

from common.config import LoraOptions, ModelOptions
from common.errors import InputError
from common.models.kernels import check_attention
from common.models.loading import (
    apply_lora,
    check_lengths,
    check_vocabulary,
    end_token_ids,
    load_causal_lm,
    load_fast_tokenizer,
    load_model_config,
    load_tokenizer,
    save_model_folder,
)
from tests.tiny_models import ordinary_tokenizer, tiny_llama

IDS = torch.tensor([[5, 6, 7, 8, 30, 31], [12, 13, 14, 15, 16, 17]])


class BackendWithoutOffsets(PreTrainedTokenizerBase):
    """What transformers' MistralCommonBackend has of a tokenizer: no `is_fast`, no `tokenizers` library behind it."""


def save_tokenizer(folder, tokenizer=None, **special):
    """A tokenizer folder; `special` replaces special tokens (None removes one)."""
    tokenizer = tokenizer or ordinary_tokenizer()
    for name, value in special.items():
        setattr(tokenizer, name, value)
    tokenizer.save_pretrained(folder)
    return str(folder)


def logits(model):
    """The model's answer to `IDS`."""
    with torch.no_grad():
        return model.eval()(IDS).logits


def train_a_little(model):
    """A few optimiser steps on whatever the model may train."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    model.train()
    for _ in range(3):
        model(input_ids=IDS, labels=IDS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def adapted_modules(model):
    """Last part of the name of every module that has an adapter."""
    return {name.split(".")[-4] for name, _ in model.named_parameters() if ".lora_A." in name}


class TestTokenizer:
    def test_pad_token_of_its_own_is_kept_and_padding_is_left(self, tmp_path):
        tokenizer = load_tokenizer(save_tokenizer(tmp_path, padding_side="right"))
        assert (tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.padding_side) == (0, 1, "left")

    def test_missing_pad_token_names_the_remedy(self, tmp_path):
        with pytest.raises(InputError, match="--pad_token eos"):
            load_tokenizer(save_tokenizer(tmp_path, pad_token=None))

    def test_pad_token_eos_and_by_name(self, tmp_path):
        path = save_tokenizer(tmp_path, pad_token=None)
        assert load_tokenizer(path, pad_token="eos").pad_token_id == 0
        assert load_tokenizer(path, pad_token="<pad>").pad_token_id == 1

    def test_pad_token_outside_the_vocabulary(self, tmp_path):
        with pytest.raises(InputError, match=r"'\[PAD\]' is no token"):
            load_tokenizer(save_tokenizer(tmp_path), pad_token="[PAD]")

    def test_missing_eos(self, tmp_path):
        with pytest.raises(InputError, match="no EOS token"):
            load_tokenizer(save_tokenizer(tmp_path, eos_token=None))

    def test_no_folder(self, tmp_path):
        with pytest.raises(InputError, match=r"cannot load a tokenizer .no such folder"):
            load_tokenizer(str(tmp_path / "nowhere"))

    def test_without_a_fast_version(self, tmp_path, monkeypatch):
        slow = ordinary_tokenizer()
        monkeypatch.setattr(type(slow), "is_fast", False)
        with pytest.raises(InputError, match="no fast version"):
            load_tokenizer(save_tokenizer(tmp_path, slow))

    def test_a_backend_of_another_kind_gives_way_to_the_folders_file(self, tmp_path, monkeypatch):
        path = save_tokenizer(tmp_path)
        expected = load_tokenizer(path)
        # As transformers answers for a Mistral folder when mistral-common is installed.
        monkeypatch.setattr(AutoTokenizer, "from_pretrained", lambda *args, **kwargs: BackendWithoutOffsets())
        for loaded in (load_tokenizer(path), load_fast_tokenizer(path)):
            assert loaded.is_fast and loaded.get_vocab() == expected.get_vocab()
            assert loaded("red hat, café 北京")["input_ids"] == expected("red hat, café 北京")["input_ids"]
            assert (loaded.eos_token_id, loaded.pad_token_id) == (0, 1)
        (tmp_path / "tokenizer.json").unlink()
        with pytest.raises(InputError, match=r"BackendWithoutOffsets has no fast version.*tokenizer\.json"):
            load_tokenizer(path)

    def test_a_decoder_that_cannot_be_traced(self, tmp_path):
        path = save_tokenizer(tmp_path)
        file = tmp_path / "tokenizer.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {"decoder": None}))
        with pytest.raises(InputError, match="traced"):
            load_tokenizer(path)


class TestLoading:
    def test_no_folder(self, tmp_path):
        with pytest.raises(InputError, match="cannot load a causal language model"):
            load_causal_lm(str(tmp_path / "nowhere"), ModelOptions())
        with pytest.raises(InputError, match="cannot read a model configuration"):
            load_model_config(str(tmp_path / "nowhere"))

    def test_a_folder_without_weights_of_the_head(self, tmp_path):
        BertModel(
            BertConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, vocab_size=30)
        ).save_pretrained(tmp_path)
        with pytest.raises(InputError, match="weights are missing"):
            load_causal_lm(str(tmp_path), ModelOptions())

    def test_dtype(self, tmp_path):
        tiny_llama().save_pretrained(tmp_path)
        assert load_causal_lm(str(tmp_path), ModelOptions(dtype="bf16")).dtype is torch.bfloat16
        assert load_causal_lm(str(tmp_path), ModelOptions(dtype="fp32")).dtype is torch.float32

    def test_attention_kernel_is_the_one_asked_for(self, tmp_path):
        tiny_llama().save_pretrained(tmp_path)
        model = load_causal_lm(str(tmp_path), ModelOptions(attn_implementation="eager"))
        assert model.config._attn_implementation == "eager"
        assert torch.allclose(logits(model), logits(load_causal_lm(str(tmp_path), ModelOptions())), atol=1e-5)


class TestChecks:
    @pytest.mark.parametrize("kernel", ["flash_attention_2", "flex_attention"])
    def test_flash_and_flex_attention_need_a_gpu(self, monkeypatch, kernel):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        with pytest.raises(InputError, match=f"{kernel} needs a CUDA GPU"):
            check_attention(kernel, "bf16")

    def test_flash_attention_needs_the_package_and_bf16(self, monkeypatch):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
        with pytest.raises(InputError, match="flash-attn package"):
            check_attention("flash_attention_2", "bf16")
        monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
        with pytest.raises(InputError, match="--dtype bf16"):
            check_attention("flash_attention_2", "fp32")
        check_attention("flash_attention_2", "bf16")

    def test_other_kernels_run_anywhere(self):
        check_attention("sdpa", "fp32")
        check_attention("eager", "bf16")

    def test_lengths_up_to_the_models_positions(self):
        config = tiny_llama(max_position_embeddings=64).config
        check_lengths(config, 64)
        with pytest.raises(InputError, match="65 tokens, but the model has 64 positions"):
            check_lengths(config, 65)

    def test_vocabulary(self):
        check_vocabulary(tiny_llama(), ordinary_tokenizer())
        largest = max(ordinary_tokenizer().get_vocab().values())
        check_vocabulary(tiny_llama(vocab_size=largest + 1), ordinary_tokenizer())
        with pytest.raises(InputError, match=f"ids up to {largest}, but the model embeds only {largest}"):
            check_vocabulary(tiny_llama(vocab_size=largest), ordinary_tokenizer())


class TestLora:
    def test_rank_zero_changes_nothing(self):
        model = tiny_llama()
        assert apply_lora(model, LoraOptions()) is model
        assert all(parameter.requires_grad for parameter in model.parameters())

    def test_only_adapters_are_trained(self):
        model = apply_lora(tiny_llama(), LoraOptions(lora_r=2))
        assert all(("lora_" in name) == parameter.requires_grad for name, parameter in model.named_parameters())
        before = {name: value.clone() for name, value in model.state_dict().items()}
        train_a_little(model)
        changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
        assert changed and all("lora_" in name for name in changed)

    def test_all_linear_layers_but_the_head_get_one(self):
        model = apply_lora(tiny_llama(), LoraOptions(lora_r=2))
        assert adapted_modules(model) == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}

    def test_modules_by_name(self):
        model = apply_lora(tiny_llama(), LoraOptions(lora_r=2, lora_target_modules="q_proj, v_proj"))
        assert adapted_modules(model) == {"q_proj", "v_proj"}

    def test_no_such_module(self):
        with pytest.raises(InputError, match="--lora_target_modules query"):
            apply_lora(tiny_llama(), LoraOptions(lora_r=2, lora_target_modules="query"))

    @pytest.mark.parametrize(("rank_stabilised", "scale"), [(False, 12 / 9), (True, 12 / 3)])
    def test_the_scale_is_alpha_over_r_or_over_its_root(self, rank_stabilised, scale):
        model = apply_lora(tiny_llama(), LoraOptions(lora_r=9, lora_alpha=12, lora_rslora=rank_stabilised))
        train_a_little(model)
        state = {name.removeprefix("base_model.model."): value.clone() for name, value in model.state_dict().items()}
        adapted = [name.removesuffix(".lora_A.default.weight") for name in state if ".lora_A." in name]
        merged = model.merge_and_unload().state_dict()
        assert len(adapted) == 14
        for name in adapted:
            parts = ("base_layer", "lora_A.default", "lora_B.default")
            base, first, second = (state[f"{name}.{part}.weight"] for part in parts)
            assert torch.allclose(merged[f"{name}.weight"], base + scale * second @ first, atol=1e-6)

    def test_dora_begins_at_the_weights_and_learns_their_magnitudes(self):
        model = apply_lora(tiny_llama(), LoraOptions(lora_r=2, lora_dora=True))
        assert torch.allclose(logits(model), logits(tiny_llama()), atol=1e-5)
        magnitudes = {name: value for name, value in model.named_parameters() if "lora_magnitude_vector" in name}
        begun = {name: value.clone() for name, value in magnitudes.items()}
        for name, weight in tiny_llama().named_parameters():
            for magnitude in (value for key, value in begun.items() if f"{name.removesuffix('.weight')}.lora_m" in key):
                assert torch.allclose(magnitude, weight.norm(dim=1))  # of each row, for every output (section 4)
        train_a_little(model)
        assert len(begun) == 14 and not any(torch.equal(magnitudes[name], value) for name, value in begun.items())


class TestSaving:
    @pytest.mark.parametrize("tied", [True, False])
    @pytest.mark.parametrize("gathered", [True, False], ids=["state_dict", "model"])
    def test_the_folder_reloads_to_equal_logits(self, tmp_path, tied, gathered):
        model = tiny_llama(tie_word_embeddings=tied)
        state = {name: value.clone() for name, value in model.state_dict().items()} if gathered else None
        model.config.use_cache = False
        path = save_model_folder(model, ordinary_tokenizer(), tmp_path / "model", {"max_new_tokens": 9}, state)
        loaded = AutoModelForCausalLM.from_pretrained(path)
        assert torch.equal(logits(loaded), logits(model))
        assert loaded.config.use_cache and not model.config.use_cache
        tokenizer = AutoTokenizer.from_pretrained(path)
        text = "red hat<eos>\nünï 北京"
        assert tokenizer(text)["input_ids"] == ordinary_tokenizer()(text)["input_ids"]
        assert (tokenizer.eos_token, tokenizer.pad_token) == ("<eos>", "<pad>")

    def test_tied_weights_are_written_once(self, tmp_path):
        model = tiny_llama()
        state = {name: value.clone() for name, value in model.state_dict().items()}
        save_model_folder(model, ordinary_tokenizer(), tmp_path / "gathered", {}, state)
        save_model_folder(model, ordinary_tokenizer(), tmp_path / "plain", {})
        sizes = [(tmp_path / name / "model.safetensors").stat().st_size for name in ("gathered", "plain")]
        assert sizes[0] == sizes[1]

    def test_generation_config_holds_the_tokenizers_ids(self, tmp_path):
        path = save_model_folder(
            tiny_llama(eos_token_id=7, pad_token_id=7), ordinary_tokenizer(), tmp_path / "model", {"max_new_tokens": 9}
        )
        saved = GenerationConfig.from_pretrained(path)
        assert (saved.eos_token_id, saved.pad_token_id, saved.max_new_tokens) == (0, 1, 9)
        config = load_model_config(str(path))
        assert (config.eos_token_id, config.pad_token_id) == (0, 1)

    def test_further_end_tokens_of_the_model_are_kept(self, tmp_path):
        """A chat model's own end of a turn: without it, servers would let responses of the base model run on."""
        model, tokenizer = tiny_llama(), ordinary_tokenizer()
        tokenizer.add_tokens(AddedToken(tokenizer.convert_ids_to_tokens(60), special=True), special_tokens=True)
        model.generation_config.eos_token_id = [60, 61, 0]
        save_model_folder(model, tokenizer, tmp_path / "model", {})
        assert GenerationConfig.from_pretrained(tmp_path / "model").eos_token_id == [0, 60]
        assert load_model_config(str(tmp_path / "model")).eos_token_id == [0, 60]
        again = load_causal_lm(str(tmp_path / "model"), ModelOptions())
        assert end_token_ids(again, tokenizer) == [0, 60]

    def test_an_earlier_folder_is_replaced_whole(self, tmp_path):
        path = tmp_path / "model"
        save_model_folder(tiny_llama(seed=1), ordinary_tokenizer(), path, {})
        (path / "stale.txt").write_text("of the run before")
        second = tiny_llama(seed=2)
        save_model_folder(second, ordinary_tokenizer(), path, {})
        assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(path)), logits(second))
        assert not (path / "stale.txt").exists()
        assert [entry.name for entry in tmp_path.iterdir()] == ["model"]

    def test_a_failed_save_leaves_the_earlier_folder(self, tmp_path, monkeypatch):
        path = tmp_path / "model"
        first = tiny_llama(seed=1)
        save_model_folder(first, ordinary_tokenizer(), path, {})
        tokenizer = ordinary_tokenizer()

        def disk_is_full(folder):
            raise OSError("No space left on device")

        monkeypatch.setattr(tokenizer, "save_pretrained", disk_is_full)
        with pytest.raises(OSError, match="No space"):
            save_model_folder(tiny_llama(seed=2), tokenizer, path, {})
        assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(path)), logits(first))

    @pytest.mark.parametrize("variant", [{}, {"lora_rslora": True}, {"lora_dora": True}], ids=str)
    @pytest.mark.parametrize("gathered", [True, False], ids=["state_dict", "model"])
    def test_lora_is_saved_merged_and_apart(self, tmp_path, gathered, variant):
        model = apply_lora(tiny_llama(), LoraOptions(lora_r=4, **variant))
        train_a_little(model)
        expected = logits(model)
        assert not torch.allclose(expected, logits(tiny_llama()), atol=1e-2), "the adapters must matter"
        before = {name: value.clone() for name, value in model.state_dict().items()}
        state = {name: value.clone() for name, value in before.items()} if gathered else None
        path = save_model_folder(model, ordinary_tokenizer(), tmp_path / "model", {}, state)

        assert torch.allclose(logits(AutoModelForCausalLM.from_pretrained(path)), expected, atol=1e-5)
        adapted = PeftModel.from_pretrained(tiny_llama(), path / "adapter")
        assert torch.allclose(logits(adapted), expected, atol=1e-5)
        # Training goes on from the same, unmerged weights.
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
        assert torch.equal(logits(model), expected)
