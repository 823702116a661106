"""Tiny models, tokenizers and engines that tests build from configs: nothing is downloaded."""

from __future__ import annotations

from typing import Any

import deepspeed
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

TEXTS = ["red running shoes", "best espresso grinder", "how to repair a bicycle", "blue hat price\nnext query"]
SEQUENCES = [[5, 6, 7, 8, 9], [10, 11], [12, 13, 14], [15]]
VOCABULARY = 300


def ordinary_tokenizer(pad_is_eos: bool = False) -> PreTrainedTokenizerFast:
    """Byte-level BPE over `TEXTS` with EOS, and a pad token of its own unless `pad_is_eos`."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        TEXTS,
        trainers.BpeTrainer(
            vocab_size=VOCABULARY, special_tokens=["<eos>", "<pad>"], show_progress=False,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        ),
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<eos>" if pad_is_eos else "<pad>"
    )


def tiny_llama(seed: int = 0, **changes: Any) -> LlamaForCausalLM:
    """Two layers of width 32, random weights that are large enough for distinct logits."""
    settings = {
        "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": True, "max_position_embeddings": 256,
        "initializer_range": 0.2, "bos_token_id": None, "eos_token_id": 0, "pad_token_id": 1,
    }
    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(**settings | changes))


def zero_engine(
    model: torch.nn.Module, stage: int = 3, micro_batch_size: int = 2, learning_rate: float = 1e-2,
    max_grad_norm: float = 0.0, bf16: bool = False,
) -> deepspeed.DeepSpeedEngine:
    """A DeepSpeed engine over the process group at hand; ZeRO-3 shards all but the smallest tensors."""
    world_size = torch.distributed.get_world_size()
    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=learning_rate),
        config={
            "train_batch_size": micro_batch_size * world_size,
            "train_micro_batch_size_per_gpu": micro_batch_size,
            "gradient_accumulation_steps": 1,
            "gradient_clipping": max_grad_norm,
            "bf16": {"enabled": bf16},
            "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 100},
            "steps_per_print": 1_000_000_000,
        },
    )
    return engine


def causal_loss(engine: deepspeed.DeepSpeedEngine, rank: int) -> torch.Tensor:
    """Next-token loss on two rows that differ between ranks."""
    ids = torch.tensor([[5, 6, 7, 8, 9, 10], [11, 12, 13, 14, 15, 16]]) + 20 * rank
    return engine(input_ids=ids, labels=ids).loss
