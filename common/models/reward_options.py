"""What a reward model judges and reads; settings that need no torch."""

from __future__ import annotations

from dataclasses import dataclass

NUM_CLASSES = 3
MAX_SCORE = NUM_CLASSES - 1
# Outputs a token by what the model judges: words, or queries alone.
HEAD_OUTPUTS = {"token": NUM_CLASSES, "sentence": 1}


@dataclass(frozen=True, slots=True)
class RewardInputOptions:
    """How a history is rendered for the reward model, and how many of its tokens history and response may have.

    With `prefix_attention` the history attends to itself alone, and the response to both (a prefix LM): what a model
    makes of a history is then the same for every response.
    """

    prompt_template: str
    num_queries: int
    max_prompt_tokens: int
    max_response_tokens: int
    prefix_attention: bool = False
