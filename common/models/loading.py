"""Causal language models and their tokenizers: loaded with what this project needs of them, saved as whole folders."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)
from transformers.utils import cached_file

from common.access import naming
from common.alignment import TokenDecoder
from common.config import LoraOptions, ModelOptions
from common.data.prompt_settings import save_prompt_settings, serving_tokenizer
from common.data.prompts import PromptBuilder
from common.errors import InputError
from common.models.kernels import apply_liger, check_attention, check_liger, check_liger_family, settle_dtype
from common.models.quantization import check_quantization, is_packed, quantization_config, unpacked_state

ADAPTER_FOLDER = "adapter"
TOKENIZER_FILE = "tokenizer.json"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def load_tokenizer(path: str, trust_remote_code: bool = False, pad_token: str = "") -> PreTrainedTokenizerBase:
    """A fast tokenizer with EOS and padding (on the left, where generation needs it) whose ids can be traced to text.

    `pad_token` is `eos` (padding looks like EOS; masks are made from lengths, so EOS is learned all the same) or a
    token of the vocabulary; empty keeps the tokenizer's own. Raises `InputError` when one of these is missing.
    """
    tokenizer = load_fast_tokenizer(path, trust_remote_code)
    if tokenizer.eos_token_id is None:
        raise InputError(f"{path}: the tokenizer has no EOS token, so no response can end; set eos_token in its folder")
    TokenDecoder(tokenizer)  # raises for a kind that rewards could not be traced through
    if pad_token == "eos":
        tokenizer.pad_token = tokenizer.eos_token
    elif pad_token:
        if pad_token not in tokenizer.get_vocab():
            raise InputError(f"{path}: --pad_token {pad_token!r} is no token of this vocabulary; 'eos' always is")
        tokenizer.pad_token = pad_token
    if tokenizer.pad_token_id is None:
        raise InputError(f"{path}: the tokenizer has no pad token; add --pad_token eos, or name a token that is unused")
    tokenizer.padding_side = "left"
    return tokenizer


def load_fast_tokenizer(path: str, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The tokenizer under `path`, a folder or hub name; raises `InputError` where it is missing or has no offsets.

    With mistral-common installed, transformers gives Mistral models a backend of another kind; of those the folder's
    tokenizer.json is used, where there is one.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)
        if not hasattr(tokenizer, "is_fast") and _has_file(path, TOKENIZER_FILE):
            tokenizer = PreTrainedTokenizerFast.from_pretrained(path)
    except (OSError, ValueError, ImportError, KeyError) as error:
        raise InputError(f"{path}: cannot load a tokenizer ({_reason(path, error)})") from error
    if not getattr(tokenizer, "is_fast", False):
        raise InputError(
            f"{path}: {type(tokenizer).__name__} has no fast version, so its tokens have no character offsets; "
            "choose a model with a tokenizer.json, or convert it with transformers.convert_slow_tokenizer"
        )
    return tokenizer


def _has_file(path: str, name: str) -> bool:
    """Whether the folder or hub repository `path` holds a file."""
    return cached_file(path, name, _raise_exceptions_for_missing_entries=False) is not None


def load_model_config(path: str, trust_remote_code: bool = False) -> PreTrainedConfig:
    """The model's configuration alone, for checks before the weights are read. Raises `InputError`."""
    try:
        return AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, ImportError, KeyError) as error:
        raise InputError(f"{path}: cannot read a model configuration ({_reason(path, error)})") from error


def causal_lm_skeleton(path: str, options: ModelOptions) -> PreTrainedModel:
    """The language model under `path` without storage (device "meta"): what can be asked before weights are read.

    Raises `InputError` when it is no causal language model, or its architecture has not the attention kernel asked for.
    """
    config = load_model_config(path, options.trust_remote_code)
    check_attention(options.attn_implementation, options.dtype)
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=options.trust_remote_code)
    except (ValueError, ImportError) as error:
        raise InputError(f"{path}: cannot build a causal language model ({_first_line(error)})") from error
    if not has_attention(model, options.attn_implementation):
        raise InputError(f"{path}: {no_attention(model, options.attn_implementation)}")
    return model


def has_attention(model: PreTrainedModel, implementation: str) -> bool:
    """Whether the model's architecture has this attention kernel; all have eager."""
    supported = {
        "sdpa": model._supports_sdpa,
        "flash_attention_2": model._supports_flash_attn,
        "flex_attention": model._supports_flex_attn,
    }
    return supported.get(implementation, True)


def no_attention(model: PreTrainedModel, implementation: str) -> str:
    """What to tell a user who asked for a kernel that the architecture has not."""
    return f"{type(model).__name__} has no {implementation} attention; add --attn_implementation eager"


def without_dropout(config: PreTrainedConfig) -> PreTrainedConfig:
    """A copy of `config` with all its dropout probabilities at 0.

    PPO compares log-probs of two passes: with dropout in one of them (GPT-2 and OPT have 0.1) the ratio would be noise.
    transformers names these settings alike (`attention_dropout`, `resid_pdrop`, `layerdrop`, ...).
    """
    config = copy.deepcopy(config)
    for part in (config, config.get_text_config()):
        for name, value in part.to_dict().items():
            if "drop" in name and isinstance(value, float):
                setattr(part, name, 0.0)
    return config


def check_machine(path: str, options: ModelOptions, quantize: str = "none") -> None:
    """Raise `InputError` unless the kernels that `options` choose and `quantize` can run here on the model at `path`.

    Reads its configuration alone, and that only where a kernel depends on it.
    """
    check_attention(options.attn_implementation, options.dtype)
    check_quantization(quantize)
    if options.liger:
        check_liger()
        check_liger_family(load_model_config(path, options.trust_remote_code).model_type)


def load_causal_lm(
    path: str, options: ModelOptions, quantize: str = "none", config: PreTrainedConfig | None = None
) -> PreTrainedModel:
    """The language model under `path` (folder or hub name), on the CPU, or sharded where ZeRO-3 has been set up.

    With `quantize` (`LoraOptions`) its linear layers but the head in 4 bits, on the GPU. `config` takes the place of
    the one in the folder. Raises `InputError` when it is no causal language model, lacks weights, or its kernels cannot
    run here.
    """
    check_machine(path, options, quantize)
    try:
        model, report = AutoModelForCausalLM.from_pretrained(
            path,
            config=config,
            dtype=DTYPES[settle_dtype(options).dtype],
            attn_implementation=options.attn_implementation,
            trust_remote_code=options.trust_remote_code,
            quantization_config=quantization_config(quantize),
            output_loading_info=True,
        )
    except (OSError, ValueError, ImportError, KeyError) as error:
        raise InputError(f"{path}: cannot load a causal language model ({_reason(path, error)})") from error
    if report["missing_keys"]:
        missing = sorted(report["missing_keys"])
        raise InputError(
            f"{path}: no trained causal language model, {len(missing)} of its weights are missing ({missing[0]}, ...); "
            "give a model that was trained to generate"
        )
    if options.liger:
        apply_liger(model)
    return model


def check_lengths(config: PreTrainedConfig, max_tokens: int) -> None:
    """Raise `InputError` when `max_tokens` (prompt and response) are more than the model has positions for."""
    positions = getattr(config.get_text_config(), "max_position_embeddings", None)
    if positions is not None and max_tokens > positions:
        raise InputError(
            f"a prompt and its response may have {max_tokens} tokens, but the model has {positions} positions; "
            "lower --max_prompt_tokens or --max_response_tokens"
        )


def check_vocabulary(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise `InputError` when the tokenizer can write an id that the model has no embedding for."""
    embeddings = model.get_input_embeddings().num_embeddings
    largest = max(tokenizer.get_vocab().values())
    if largest >= embeddings:
        raise InputError(
            f"the tokenizer has ids up to {largest}, but the model embeds only {embeddings} of them: "
            "they do not belong together"
        )


def apply_lora(
    model: PreTrainedModel, options: LoraOptions, task_type: str | None = "CAUSAL_LM"
) -> PreTrainedModel | PeftModel:
    """`model` with trainable adapters and everything else frozen; `model` itself when `lora_r` is 0.

    `task_type` is peft's; None for a trunk, which has no head and cannot generate. Raises `InputError` when no
    module has the names asked for.
    """
    if options.lora_r == 0:
        return model
    names = options.lora_target_modules
    config = LoraConfig(
        task_type=task_type,
        r=options.lora_r,
        lora_alpha=options.lora_alpha,
        lora_dropout=options.lora_dropout,
        use_rslora=options.lora_rslora,
        use_dora=options.lora_dora,
        target_modules=names if names == "all-linear" else [name.strip() for name in names.split(",")],
    )
    try:
        # Adapters in the model's precision, as all that ZeRO-3 trains of a model must be; ZeRO keeps masters in fp32.
        return get_peft_model(model, config, autocast_adapter_dtype=False)
    except ValueError as error:
        raise InputError(f"--lora_target_modules {names}: {_first_line(error)}") from error


def end_token_ids(model: PreTrainedModel | PeftModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens that end a response: the tokenizer's EOS, which training writes, then others that the model ends with.

    Chat models end a turn with a token of their own (<|eot_id|>, <end_of_turn>), and list it in their generation
    config, as transformers' `generate` reads it. An id of that list counts if it is an added token of the tokenizer: a
    folder without a generation config gets the ids of the architecture, which may be those of ordinary text.
    """
    listed = model.generation_config.eos_token_id if model.generation_config is not None else None
    others = [listed] if isinstance(listed, int) else listed or []
    added = tokenizer.added_tokens_decoder
    return list(dict.fromkeys([tokenizer.eos_token_id, *(int(id_) for id_ in others if int(id_) in added)]))


def save_model_folder(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    path: str | Path,
    generation: Mapping[str, Any],
    state_dict: Mapping[str, torch.Tensor] | None = None,
    prompts: PromptBuilder | None = None,
) -> Path:
    """Write a complete Hugging Face folder: safetensors, tokenizer, and a generation config with EOS and pad ids.

    A model with LoRA adapters is saved merged, so that the folder loads like any other, and its adapters alone in the
    subfolder `adapter`, with all that is not weights; 4-bit weights are unpacked for it. `generation` holds
    further settings (`max_new_tokens`, ...). `state_dict` are the whole weights where the model's own are sharded.
    `prompts` is how the model was asked in training: it is recorded, and the tokenizer gets the chat template that
    gives the same ids (`common.data.prompt_settings`). The folder appears under `path` only once it is complete, in the
    place of an earlier one. Call it on one process; `model` is left as it was. Returns `path`.
    """
    if prompts is not None:
        tokenizer = serving_tokenizer(prompts)
    special = {name: getattr(tokenizer, name) for name in ("bos_token_id", "pad_token_id")}
    ends = end_token_ids(model, tokenizer)
    special["eos_token_id"] = ends if len(ends) > 1 else ends[0]
    generation_config = GenerationConfig(**special, **generation)
    with complete_folder(Path(path)) as temporary:
        if isinstance(model, PeftModel):
            adapter = temporary / ADAPTER_FOLDER
            if any(map(is_packed, model.parameters())):
                state_dict = unpacked_state(model)
            state_dict = state_dict or model.state_dict()
            model.save_pretrained(str(adapter), state_dict=dict(state_dict))
            _save_companions(adapter, tokenizer, generation_config, prompts)
            model, state_dict = merged_copy(model, state_dict), None
        if state_dict is not None:
            # Gathered copies no longer look tied, and would be written twice.
            state_dict = {name: value for name, value in state_dict.items() if name not in model.all_tied_weights_keys}
        model.save_pretrained(temporary, state_dict=state_dict)
        config = copy.deepcopy(model.config)
        # Training turns the cache off in the configuration; whoever loads the folder wants it.
        config.update({**special, "use_cache": True})
        config.save_pretrained(temporary)
        _save_companions(temporary, tokenizer, generation_config, prompts)
    return Path(path)


def _save_companions(
    folder: Path, tokenizer: PreTrainedTokenizerBase, generation_config: GenerationConfig, prompts: PromptBuilder | None
) -> None:
    """What must lie beside weights, or adapters, for others to use them."""
    generation_config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    if prompts is not None:
        save_prompt_settings(prompts, folder)


def merged_copy(model: PeftModel, state_dict: Mapping[str, torch.Tensor]) -> PreTrainedModel:
    """A copy of the base model with the adapters added to its weights; built from `state_dict`, which is left alone.

    The copy starts without storage (device "meta") and takes its weights from `state_dict`: the model at hand may be
    sharded, and may have to go on training with its adapters apart.
    """
    base = model.get_base_model()
    config = copy.deepcopy(base.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config  # what `state_dict` holds is unpacked
    with torch.device("meta"):
        skeleton = get_peft_model(type(base)(config), copy.deepcopy(model.peft_config["default"]))
    skeleton.load_state_dict(dict(state_dict), assign=True)
    skeleton.get_base_model().tie_weights()
    # safe_merge adds into copies instead of in place, which would reach the tensors of `state_dict`.
    return skeleton.merge_and_unload(safe_merge=True)


@contextmanager
def complete_folder(path: Path) -> Iterator[Path]:
    """A folder beside `path` that takes its place on leaving; after an error it is gone, and so is what it took of a
    full disk."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        with naming(path):
            yield temporary
        _replace_folder(temporary, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _replace_folder(temporary: Path, path: Path) -> None:
    """Rename `temporary` to `path`; a folder cannot replace a full one, so an earlier one steps aside first."""
    old = path.with_name(f".{path.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if path.exists():
        path.rename(old)
    temporary.rename(path)
    shutil.rmtree(old, ignore_errors=True)


def _reason(path: str, error: BaseException) -> str:
    """Why nothing could be loaded from `path`, which is a hub name when no such folder exists."""
    return _first_line(error) if Path(path).exists() else f"no such folder, and as a hub name: {_first_line(error)}"


def _first_line(error: BaseException) -> str:
    """The first line of a library's message; the whole stands in the chained exception."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
