"""Which tokens the reward model's tokens see: what `auto` stands for with the model at hand."""

from __future__ import annotations

from typing import NamedTuple

from transformers import PreTrainedModel

from common.models.token_reward import reads_causally, takes_prefix_attention
from step2_token_reward.config import Step2Config


class Attention(NamedTuple):
    """Whether a decoder is made to read both ways, and whether the history attends to itself alone."""

    bidirectional: bool
    prefix: bool


def settle_attention(config: Step2Config, skeleton: PreTrainedModel) -> Attention:
    """`--bidirectional` and `--prefix_attention` for the model `skeleton`, whose weights may be without storage.

    `auto`: a decoder reads both ways, with prefix attention where it can. Its judgments are as good, and step 3 reads
    each history once. An encoder keeps the attention of its pretraining: there prefix attention costs accuracy
    (docs/performance.md). A causal decoder shares histories without it.
    """
    is_decoder = reads_causally(skeleton)
    bidirectional = config.bidirectional == "true" or (config.bidirectional == "auto" and is_decoder)
    if config.prefix_attention != "auto":
        return Attention(bidirectional, config.prefix_attention == "true")
    can = is_decoder and takes_prefix_attention(skeleton, config.attn_implementation)
    return Attention(bidirectional, can and bidirectional)
