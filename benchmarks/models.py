"""Random models for benchmarks, of real architectures; nothing is downloaded."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from common.config import ModelOptions
from common.data.simulator import SimulatorConfig, simulate
from common.models.reward_options import RewardInputOptions
from common.models.tiny import train_tokenizer
from common.models.token_reward import load_token_reward_model, save_token_reward_model

VOCABULARY = 2048
CONSTANT = 30.0  # of a residual stream whose other entries stay far below it


def query_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE trained on the embedded log."""
    users = simulate(SimulatorConfig(num_users=1000))
    return train_tokenizer([event.text for user in users for event in user.record.events], VOCABULARY)


def random_llama(
    tokenizer: PreTrainedTokenizerFast, mean_answer: float = 0.0, seed: int = 0, **sizes: Any
) -> LlamaForCausalLM:
    """Six layers of width 256 (or `sizes`) with random weights, in eval mode.

    With `mean_answer` every token ends the response with probability `1 / mean_answer`, whatever came before, so that
    answer lengths are geometric in every system that samples the model: an entry of the residual stream is a constant
    and speaks for EOS alone. Without it responses hardly ever end.
    """
    settings = {"hidden_size": 256, "intermediate_size": 688, "num_hidden_layers": 6, "num_attention_heads": 8} | sizes
    torch.manual_seed(seed)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer), max_position_embeddings=1024, tie_word_embeddings=False, bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, **settings,
        )
    )  # fmt: skip
    if mean_answer:
        _end_with_probability(model, 1 / mean_answer)
    return model.eval()


def save_reward_model(
    source: Path, target: Path, tokenizer: PreTrainedTokenizerFast, prompt_tokens: int, response_tokens: int
) -> None:
    """A token reward model on the trunk in `source`, with a random head, as step 2 writes it for a decoder."""
    model = load_token_reward_model(str(source), ModelOptions(), bidirectional=True)
    inputs = RewardInputOptions("compact", 3, prompt_tokens, response_tokens, prefix_attention=True)
    save_token_reward_model(target, model, tokenizer, inputs, {"heads": "token", "class_weights": [1.0, 1.0, 1.0]})


@torch.no_grad()
def _end_with_probability(model: LlamaForCausalLM, probability: float) -> None:
    model.model.embed_tokens.weight[:, 0] = CONSTANT
    for layer in model.model.layers:
        layer.self_attn.o_proj.weight[0] = layer.mlp.down_proj.weight[0] = 0.0
    head, eos = model.lm_head.weight, model.config.eos_token_id
    head[:, 0] = 0.0
    head[eos] = 0.0
    # After the last norm the constant is sqrt(H), and the other logits are close to 0.
    others = math.log(len(head) - 1)
    head[eos, 0] = (others + math.log(probability / (1 - probability))) / math.sqrt(model.config.hidden_size)
