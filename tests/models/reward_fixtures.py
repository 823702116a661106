"""Tiny random token classifiers of several families with the tokenizer that goes with each, saved as folders."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import (
    AutoModelForTokenClassification,
    BertConfig,
    BertForTokenClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    LongformerConfig,
    LongformerForTokenClassification,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    RobertaConfig,
    RobertaForTokenClassification,
)

from common.config import ModelOptions
from common.data.records import Event
from common.models.reward_options import RewardInputOptions
from tests.tokenizer_factory import byte_level, sentencepiece_bpe, word_piece

EAGER = ModelOptions(attn_implementation="eager")
SDPA = ModelOptions(attn_implementation="sdpa")
INPUTS = RewardInputOptions(prompt_template="compact", num_queries=3, max_prompt_tokens=64, max_response_tokens=48)
SIZE = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
HISTORY = (
    Event("search", query="best running shoes"),
    Event("click", query="best running shoes", title="Running shoes for flat feet", url="https://shop.example/run"),
    Event("search", query="café recipe"),
)


def tiny(kind: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A model of a family (language models where the family has no encoder) and a tokenizer of its kind."""
    torch.manual_seed(0)
    if kind == "bert":
        tokenizer = word_piece()
        config = BertConfig(vocab_size=len(tokenizer), max_position_embeddings=192, pad_token_id=0, **SIZE)
        return BertForTokenClassification(config), tokenizer
    if kind in ("roberta", "longformer"):
        tokenizer = byte_level(add_prefix_space=True)
        settings = {"vocab_size": len(tokenizer), "max_position_embeddings": 194, "pad_token_id": 1, **SIZE}
        if kind == "roberta":
            return RobertaForTokenClassification(RobertaConfig(type_vocab_size=1, **settings)), tokenizer
        settings |= {"attention_window": 16, "type_vocab_size": 1}
        return LongformerForTokenClassification(LongformerConfig(**settings)), tokenizer
    if kind == "gpt2":
        tokenizer = byte_level()
        config = GPT2Config(vocab_size=len(tokenizer), n_positions=192, n_embd=16, n_layer=2, n_head=2)
        return GPT2LMHeadModel(config), tokenizer
    tokenizer = sentencepiece_bpe()
    settings = {"vocab_size": len(tokenizer), "max_position_embeddings": 192, "num_key_value_heads": 1, **SIZE}
    if kind == "llama":
        return LlamaForCausalLM(LlamaConfig(**settings)), tokenizer
    return MistralForCausalLM(MistralConfig(sliding_window=8, **settings)), tokenizer


def tiny_classifier(kind: str, bidirectional: bool = False) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A token classifier of a family with our classes and without dropout; the same weights every time."""
    model, tokenizer = tiny(kind)
    config = model.config
    config.num_labels = 3
    if bidirectional:
        config.is_causal = False
    torch.manual_seed(1)
    classifier = AutoModelForTokenClassification.from_config(config, attn_implementation="eager")
    for module in classifier.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    return classifier, tokenizer


def save_tiny(kind: str, folder: Path) -> str:
    """`tiny(kind)` as a folder; returns its path."""
    model, tokenizer = tiny(kind)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)
