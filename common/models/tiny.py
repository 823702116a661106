"""A tiny base model for the embedded log: a byte-level BPE tokenizer and a small random Llama.

    python -m common.models.tiny --data_dir outputs/demo/data --output_dir outputs/demo/base_model

Nothing is downloaded, and nothing is pretrained: step 1 must teach this model the language of the log as well, see
`prompt_loss_weight` there.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from common.access import check_writable
from common.config import MAX_SEED, option, parse_config
from common.data.examples import load_examples
from common.data.prompts import PromptBuilder
from common.data.records import Example
from common.errors import InputError, run_command
from common.models.loading import save_model_folder

EOS, PAD = "<|end|>", "<|pad|>"
BYTES = 256


@dataclass
class TinyModelConfig:
    """Makes a tiny, untrained base model with a tokenizer that fits the examples of a run."""

    data_dir: str = option(
        "", "Folder with train.jsonl; the tokenizer is trained on it.", group="what is read and written",
    )
    output_dir: str = option("", "Model folder to write.")
    overwrite: bool = option(False, "Replace the model that output_dir holds.")
    prompt_template: str = option("plain", "Template that step 1 will render prompts with: a name or a file.")
    num_queries: int = option(3, "Queries a response.", minimum=1)
    vocab_size: int = option(1800, "Largest vocabulary; a small log may fill less.", group="the model", minimum=1)
    hidden_size: int = option(128, "Width of the model.", minimum=1)
    num_layers: int = option(2, "Number of layers.", minimum=1)
    num_heads: int = option(4, "Attention heads; they divide hidden_size.", minimum=1)
    max_positions: int = option(1024, "Longest prompt and response together, in tokens.", minimum=1)
    seed: int = option(0, "Seed of the initial weights.", maximum=MAX_SEED)


def main() -> None:
    """Train the tokenizer, make the model, save both as one Hugging Face folder."""
    config = parse_config(TinyModelConfig)
    _check(config)
    examples = load_examples(config.data_dir, "train")
    texts = list(training_texts(examples, config.prompt_template, config.num_queries))
    tokenizer = train_tokenizer(texts, config.vocab_size)
    model = tiny_llama(config, tokenizer)
    save_model_folder(model, tokenizer, config.output_dir, generation={})
    print(
        f"base model: {config.output_dir} ({model.num_parameters():,} parameters, {len(tokenizer)} tokens, "
        f"trained on {len(texts)} texts of {len(examples)} examples)\n"
        f"next: bash scripts/run_step1.sh --model_name_or_path {config.output_dir} --data_dir {config.data_dir} "
        f"--output_dir {Path(config.output_dir).parent / 'step1_sft'}"
    )


def training_texts(examples: Iterable[Example], template: str, num_queries: int) -> Iterator[str]:
    """What step 1 will show the model: the rendered prompt and the response of every example."""
    # A prompt builder needs a tokenizer: one of bare bytes, with room for every event.
    builder = PromptBuilder(train_tokenizer([], BYTES + 2), template, max_prompt_tokens=10**9, num_queries=num_queries)
    for example in examples:
        yield builder.text(example.history)
        yield builder.response_text(example.targets)


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE with EOS and a separate pad token, no BOS; any text of any language round-trips.

    The vocabulary has all 256 bytes and at most `vocab_size` entries.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[EOS, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        min_frequency=2,
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=EOS,
        pad_token=PAD,
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )


def tiny_llama(config: TinyModelConfig, tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """A Llama with tied embeddings and random weights; the same seed gives the same weights."""
    torch.manual_seed(config.seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=config.hidden_size,
            intermediate_size=8 * config.hidden_size // 3,
            num_hidden_layers=config.num_layers,
            num_attention_heads=config.num_heads,
            max_position_embeddings=config.max_positions,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def _check(config: TinyModelConfig) -> None:
    if not config.data_dir or not config.output_dir:
        raise InputError("give --data_dir and --output_dir")
    if Path(config.output_dir).exists() and not config.overwrite:
        raise InputError(f"{config.output_dir} is there already; add --overwrite to replace it")
    check_writable(Path(config.output_dir).parent, "choose another --output_dir")
    if config.vocab_size < BYTES + 2:
        raise InputError(f"--vocab_size {config.vocab_size}: all bytes, EOS and pad need at least {BYTES + 2}")
    if config.num_heads < 1 or config.hidden_size % (2 * config.num_heads):
        raise InputError(
            f"--hidden_size {config.hidden_size} must be a multiple of twice --num_heads {config.num_heads}: "
            "rotary positions turn pairs of a head's dimensions"
        )


if __name__ == "__main__":
    run_command(main)
