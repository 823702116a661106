"""Invented examples, a judge with a rule that can be done by hand, and a tiny model with random weights."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from common.data.records import Event, Example
from common.feedback.annotator import Annotation, FeedbackItem
from common.text import split_queries, split_words
from tests.tokenizer_factory import byte_level

HISTORIES = [
    ["running shoes", "running shoes for flat feet", "best running socks"],
    ["suede boots", "clean suede boots"],
    ["wine bar", "wine bar tokyo", "cheap restaurant tokyo", "tokyo weather"],
    ["cheap routers", "wi-fi routers sale"],
    ["emoji meaning"],
    ["café near me", "crème brûlée recipe"],
]
TARGETS = [
    ["running shoes sale", "running shoes", "socks"],
    ["boots sale", "clean boots", "suede brush"],
    ["tokyo weather", "tokyo restaurant", "wine sale"],
    ["best routers", "wi-fi routers", "routers near me"],
    ["party emoji", "emoji keyboard", "emoji meaning"],
    ["café sale", "recipe", "brûlée"],
]


def make_examples() -> list[Example]:
    """Six examples of five users: the last two belong to one."""
    users = ["u0", "u1", "u2", "u3", "u4", "u4"]
    return [
        Example(
            id=f"e{place}", user_id=user, group=user, source="invented", split="test",
            history=tuple(Event(type="search", query=query, ts=float(i)) for i, query in enumerate(queries)),
            targets=tuple(targets),
        )
        for place, (user, queries, targets) in enumerate(zip(users, HISTORIES, TARGETS, strict=True))
    ]


class LetterJudge:
    """A word scores the number of its letters modulo 3; a query scores what its first word does."""

    name = "letters"

    def annotate(self, item: FeedbackItem) -> Annotation:
        """Scores that depend on the response alone."""
        words = split_words(item.response)
        scores = tuple(
            tuple(len(word.text) % 3 for word in words if word.line == line)
            for line in range(len(split_queries(item.response)))
        )
        return Annotation(word_scores=scores, query_scores=tuple(line[0] if line else 0 for line in scores))


def save_tiny_model(folder: Path, seed: int, **generation_config: object) -> str:
    """A random Llama and its tokenizer as a model folder whose generation config says `generation_config`."""
    tokenizer = byte_level()
    torch.manual_seed(seed)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=256, initializer_range=0.3,
            bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    model.generation_config.update(**generation_config)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)
