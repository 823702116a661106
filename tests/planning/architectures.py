"""Configurations of models that people use, written from memory of their config.json: nothing is downloaded."""

from __future__ import annotations

from pathlib import Path

from transformers import LlamaConfig, MistralConfig, PreTrainedConfig, Qwen3Config

LLAMA_3 = {"vocab_size": 128_256, "num_key_value_heads": 8, "max_position_embeddings": 8192, "rope_theta": 5e5}
ARCHITECTURES: dict[str, PreTrainedConfig] = {
    "mistral_7b": MistralConfig(architectures=["MistralForCausalLM"]),
    "llama_3_8b": LlamaConfig(intermediate_size=14_336, **LLAMA_3),
    "qwen3_8b": Qwen3Config(
        vocab_size=151_936, hidden_size=4096, intermediate_size=12_288, num_hidden_layers=36, num_attention_heads=32,
        num_key_value_heads=8, head_dim=128, tie_word_embeddings=False,
    ),
    "llama_3_3b": LlamaConfig(
        hidden_size=3072, intermediate_size=8192, num_hidden_layers=28, num_attention_heads=24, head_dim=128,
        tie_word_embeddings=True, **LLAMA_3,
    ),
    "llama_3_70b": LlamaConfig(
        hidden_size=8192, intermediate_size=28_672, num_hidden_layers=80, num_attention_heads=64, **LLAMA_3
    ),
}
# As their cards say.
PARAMETERS = {
    "mistral_7b": 7_241_732_096, "llama_3_3b": 3_212_749_824, "llama_3_8b": 8_030_261_248,
    "qwen3_8b": 8_190_735_360, "llama_3_70b": 70_553_706_496,
}


def config_file(name: str, folder: Path) -> str:
    """The path of an architecture's config.json."""
    ARCHITECTURES[name].save_pretrained(folder / name)
    return str(folder / name / "config.json")
