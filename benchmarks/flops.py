"""Useful floating-point operations: those that the models' real tokens need, with no padding and nothing twice."""

from __future__ import annotations

from typing import Any, NamedTuple


class Sizes(NamedTuple):
    """Of a decoder: weights of its layers' matrices, of its output layer, its width times layers."""

    layer_weights: int
    head_weights: int
    width_times_layers: int

    @classmethod
    def of(cls, config: Any) -> Sizes:
        """Of a Llama-like configuration: query, key, value, output; gate, up, down."""
        width, heads = config.hidden_size, config.num_attention_heads
        key_value_width = width // heads * (getattr(config, "num_key_value_heads", None) or heads)
        layer = 2 * width * width + 2 * width * key_value_width + 3 * width * config.intermediate_size
        return cls(layer * config.num_hidden_layers, width * config.vocab_size, width * config.num_hidden_layers)


def forward_flops(sizes: Sizes, begin: int, end: int, logits: int = 0) -> float:
    """Of reading the tokens at `begin` to `end` of a sequence, each attending to all before it, and making `logits`."""
    tokens = end - begin
    attended = (end * (end + 1) - begin * (begin + 1)) / 2
    return 2 * sizes.layer_weights * tokens + 4 * sizes.width_times_layers * attended + 2 * sizes.head_weights * logits


def tppo_step_flops(sizes: Sizes, prompts: int, samples: int, prompt_tokens: int, answer_tokens: int) -> float:
    """Of a whole step with one pass of updates: sampling, reference, critic, reward model, and the updates of actor and
    critic, whose backward passes cost two forward passes.

    Each prompt is read once for all its answers. In the reward model a prompt attends to itself both ways, and an
    answer to the prompt and to itself. Old log-probs are those of sampling.
    """
    whole = prompt_tokens + answer_tokens
    responses = prompts * samples
    read = prompts * forward_flops(sizes, 0, prompt_tokens)
    sampling = read + responses * forward_flops(sizes, prompt_tokens, whole - 1, logits=answer_tokens)
    with_logits = read + responses * forward_flops(sizes, prompt_tokens, whole, logits=answer_tokens)
    without = read + responses * forward_flops(sizes, prompt_tokens, whole)
    attended = prompt_tokens**2 + samples * answer_tokens * whole
    reward = prompts * (
        2 * sizes.layer_weights * (prompt_tokens + samples * answer_tokens) + 4 * sizes.width_times_layers * attended
    )
    return sampling + reward + 4 * (with_logits + without)
