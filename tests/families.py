"""Tiny models of every family in docs/models.md, from the real configuration classes, and the three steps."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, PreTrainedModel
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from common.data.records import Event, Example
from common.errors import InputError
from common.files import write_jsonl
from common.models.loading import save_model_folder
from tests.labelled_samples import RESPONSES, labelled, write_files
from tests.tiny_models import VOCABULARY
from tests.tokenizer_factory import ALL

SIZES = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 128,
    "initializer_range": 0.2, "bos_token_id": None, "eos_token_id": 0, "pad_token_id": 1,
}
WINDOW = 7  # shorter than prompts and responses here, so that it cuts
PROBE = torch.tensor([[7, 8, 9, 30, 31, 40, 41, 9, 12, 60, 61], [12, 9, 8, 9, 9, 9, 9, 50, 51, 52, 53]])


class Family(NamedTuple):
    """`tokenizer` is a kind of `tests.tokenizer_factory`, as the family's own; `kernel` an attention kernel it has."""

    model_type: str
    tokenizer: str
    settings: dict[str, Any]
    kernel: str = "sdpa"


ACTORS = {
    "llama": Family("llama", "byte_level", {}),
    "mistral": Family("mistral", "sentencepiece_bpe", {"sliding_window": WINDOW}),
    "qwen2": Family("qwen2", "byte_level", {}),
    "qwen2, some layers with a window": Family(
        "qwen2", "byte_level", {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1}
    ),
    "qwen3": Family("qwen3", "byte_level", {}),
    "gemma": Family("gemma", "sentencepiece_bpe", {}),
    "gemma2": Family(
        "gemma2", "sentencepiece_bpe", {"sliding_window": WINDOW, "query_pre_attn_scalar": 8}, "eager"
    ),
    "gemma3_text": Family("gemma3_text", "sentencepiece_bpe", {"sliding_window": WINDOW, "query_pre_attn_scalar": 8}),
    "phi": Family("phi", "byte_level", {}),
    "phi3": Family("phi3", "sentencepiece_bpe", {}),
    "gpt_neox": Family("gpt_neox", "byte_level", {}),
    "opt": Family("opt", "byte_level", {"ffn_dim": 48, "word_embed_proj_dim": 32}),
    "opt, narrow embeddings": Family(  # OPT-350m
        "opt", "byte_level", {"ffn_dim": 48, "word_embed_proj_dim": 16, "do_layer_norm_before": False}
    ),
    "gpt2": Family("gpt2", "byte_level", {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128}),
    "granite": Family("granite", "byte_level", {"logits_scaling": 4.0}),
}
_ENCODER = {"num_key_value_heads": 4, "max_position_embeddings": 160, "type_vocab_size": 1}
REWARDS = {
    "longformer": Family("longformer", "byte_level_prefix_space", _ENCODER | {"attention_window": 16}, "eager"),
    "modernbert": Family("modernbert", "byte_level", _ENCODER | {"local_attention": 8}),
    "deberta-v2": Family(
        "deberta-v2", "unigram",
        _ENCODER | {
            "type_vocab_size": 0, "relative_attention": True, "position_buckets": 16, "max_relative_positions": -1,
            "pos_att_type": ["p2c", "c2p"], "position_biased_input": False,
        },
        "eager",
    ),
    "roberta": Family("roberta", "byte_level_prefix_space", _ENCODER),
    "xlm-roberta": Family("xlm-roberta", "unigram", _ENCODER),
    "bert": Family("bert", "word_piece", _ENCODER | {"type_vocab_size": 2}),
}  # fmt: skip


def family_config(family: Family, **changes: Any) -> Any:
    """The family's own configuration class in tiny; `changes` are further settings."""
    return AutoConfig.for_model(family.model_type, **SIZES | family.settings | changes)


def family_model(name: str) -> PreTrainedModel:
    """A random language model of a family of `ACTORS`, over the vocabulary of `tests.tiny_models`."""
    torch.manual_seed(0)
    family = ACTORS[name]
    return AutoModelForCausalLM.from_config(family_config(family), attn_implementation=family.kernel).eval()


def save_family(family: Family, folder: Path) -> Path:
    """A random model of the family with a tokenizer of its kind, as the folder that a run starts from.

    Of an encoder the trunk alone, which step 2 gives its head.
    """
    tokenizer = ALL[family.tokenizer]()
    special = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    config = family_config(family, vocab_size=len(tokenizer), **special)
    torch.manual_seed(0)
    if family.model_type in {encoder.model_type for encoder in REWARDS.values()}:
        AutoModel.from_config(config, attn_implementation=family.kernel).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        return folder
    return save_model_folder(AutoModelForCausalLM.from_config(config), tokenizer, folder, {})


def write_data(folder: Path) -> Path:
    """Examples (`data/`) and labelled samples that all families learn from."""
    history = (Event("search", query="running shoes"), Event("click", title="boots"), Event("search", query="café"))
    targets = ("boots near me", "café", "red hat")
    for split, count in (("train", 8), ("dev", 2)):
        examples = [
            Example(f"{split}{i}", f"u{i}", f"u{i}", "test", split, history[: 1 + i % 3], targets)
            for i in range(count)
        ]
        write_jsonl(folder / "data" / f"{split}.jsonl", (example.to_dict() for example in examples))
    write_files(folder, labelled("train", RESPONSES) + labelled("dev", RESPONSES[:3]))
    return folder


LIMITS = {"prompt_template": "compact", "num_queries": 3, "max_prompt_tokens": 64, "max_response_tokens": 48}
TRAINER = {
    "max_steps": 2, "learning_rate": 1e-2, "warmup_ratio": 0, "per_device_train_batch_size": 2, "logging_steps": 1,
    "lr_scheduler_type": "constant_with_warmup", "tensorboard": False,
}  # fmt: skip


def sft_flags(inputs: Path, model: Path, output: Path, kernel: str) -> list[str]:
    """Step 1, two updates."""
    return flags(
        LIMITS | TRAINER, model_name_or_path=model, data_dir=inputs / "data", output_dir=output,
        attn_implementation=kernel,
    )  # fmt: skip


def sample_flags(inputs: Path, model: Path, output: Path, kernel: str) -> list[str]:
    """Step 2's responses to ten examples."""
    return flags(
        LIMITS | {"max_response_tokens": 8}, model_name_or_path=model, data_dir=inputs / "data", output_dir=output,
        attn_implementation=kernel,
    )  # fmt: skip


def reward_flags(
    inputs: Path, model: Path, output: Path, kernel: str, bidirectional: bool = False, prefix: str = "auto"
) -> list[str]:
    """Step 2's training, two updates."""
    return flags(
        LIMITS | TRAINER, model_name_or_path=model, samples=inputs / "samples.jsonl", labels=inputs / "labels.jsonl",
        output_dir=output, attn_implementation=kernel, bidirectional=bidirectional, prefix_attention=prefix,
    )  # fmt: skip


def tppo_flags(inputs: Path, actor: Path, reward: Path, output: Path, kernel: str) -> list[str]:
    """Step 3, two rollouts with one update each, so that every minibatch is a first one: its ratio must be 1."""
    return flags(
        LIMITS, actor_path=actor, reward_path=reward, data_dir=inputs / "data", output_dir=output,
        attn_implementation=kernel, max_response_tokens=8, total_steps=2, rollout_batch_size=4, mini_batch_size=4,
        micro_batch_size=2, critic_warmup_steps=0, actor_learning_rate=1e-2, critic_learning_rate=1e-2, max_kl=0,
        tensorboard=False,
    )  # fmt: skip


def flags(settings: dict[str, Any], **more: Any) -> list[str]:
    """A command's arguments."""
    values = (settings | more).items()
    return [f"--{name}={str(value).lower() if isinstance(value, bool) else value}" for name, value in values]


def run_steps(rank: int, world_size: int, steps: list[tuple[str, list[str]]]) -> list[str]:
    """Run the `main` of each module with its arguments; an `InputError` ends the run. Returns its message, if any.

    What the trained model says of `PROBE` just before it is saved goes to `probe.pt` in the output folder.
    """
    for module, arguments in steps:
        with mock.patch("sys.argv", [module, *arguments]), _probed(import_module(module)):
            try:
                import_module(module).main()
            except InputError as error:
                return [str(error)]
            finally:
                unset_hf_deepspeed_config()
    return []


@contextlib.contextmanager
def _probed(module: Any) -> Iterator[None]:
    """Let the step's own function that saves the model keep its logits first."""
    name = next((name for name in ("save", "export_models") if hasattr(module, name)), None)
    if name is None:  # a command without training
        yield
        return
    save: Callable[..., None] = getattr(module, name)

    def probe_and_save(trained: Any, *others: Any) -> None:
        config = next(other for other in others if hasattr(other, "output_dir"))
        torch.save(_logits(trained), Path(config.output_dir) / "probe.pt")
        save(trained, *others)

    with mock.patch.object(module, name, probe_and_save):
        yield


@torch.no_grad()
def _logits(trained: Any) -> torch.Tensor:
    """From step 3's models, or from a Trainer."""
    if hasattr(trained, "actor"):
        with trained.actor.inference() as actor:
            return actor(input_ids=PROBE).logits
    trained.model_wrapped.eval()
    return trained.model_wrapped(input_ids=PROBE, attention_mask=torch.ones_like(PROBE)).logits
