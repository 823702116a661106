"""Settings of step 2's training."""

from __future__ import annotations

from dataclasses import dataclass

from common.config import check_numbers, option
from common.engine.trainer_options import TrainerOptions, check_trainer_options
from common.errors import InputError
from common.models.reward_options import HEAD_OUTPUTS, NUM_CLASSES, RewardInputOptions

_CLASSES = "classes 0 irrelevant, 1 relevant, 2 very relevant"


@dataclass
class Step2Config(TrainerOptions):
    """Step 2: train the token-level reward model on labelled responses."""

    model_name_or_path: str = option(
        "", "Encoder: a folder or hub name, any model with a token classifier (Longformer in the paper) or step 1's.",
        group="model and data",
    )
    bidirectional: str = option(
        "auto", "Let a decoder read both ways, or each word is judged without those after it; auto: a decoder does. "
        "Encoders do so anyway.", choices=["auto", "true", "false"],
    )
    prefix_attention: str = option(
        "auto", "The history attends to itself alone, the response to both (a prefix LM). Step 3 then reads a history "
        "once for all its responses. auto: for a decoder that reads both ways.", choices=["auto", "true", "false"],
    )
    samples: str = option("", "The labelled responses: samples.jsonl, written by sample.py.")
    labels: str = option("", "Their labels: labels.jsonl, written by label.py.")
    prompt_template: str = option(
        "plain", "How a history is rendered: 'plain', 'compact', or a template file.", group="prompts and responses",
    )
    num_queries: int = option(3, "Queries a response, as the template says it (paper: 3 for AOL).", minimum=1)
    max_prompt_tokens: int = option(512, "Token budget of a history; the oldest events are left out.", minimum=1)
    max_response_tokens: int = option(
        96, "Token budget of a response in this tokenizer; longer ones are cut off.", minimum=1
    )
    heads: str = option(
        "token", "What is judged: each word (token), or queries alone, the sentence-level baseline (sentence).",
        choices=list(HEAD_OUTPUTS),
        group="labels and losses",
    )
    query_rule: str = option(
        "conjunction", "A query's score from its words': the chance that none is irrelevant and one very relevant, or "
        "learned from the query labels of the held-out responses, for annotators with another idea of a good query.",
        choices=["conjunction", "learned"],
    )
    w: float = option(
        0.5, "Weight of the local (token) loss; the global (sentence) loss has 1 - w (paper: 0.4-0.6).", maximum=1
    )
    class_weights: list[float] = option(
        [], f"Weights of the local loss, {_CLASSES}; none: inverse class frequency of the training tokens."
    )
    class_keep_ratios: list[float] = option(
        [], f"Class mask: chance of a token to stay in the local loss, {_CLASSES}; none: all stay."
    )
    learning_rate: float = option(3e-5, "Peak learning rate of AdamW.", above=0)
    per_device_train_batch_size: int = option(8, "Responses a rank and a micro-batch.", minimum=1)
    per_device_eval_batch_size: int = option(16, "Responses a rank in evaluation.", minimum=1)
    warmup_ratio: float = option(0.06, "Share of the steps in which the learning rate rises.", below=1)
    lr_scheduler_type: str = option(
        "linear", "How the learning rate falls.", choices=["cosine", "linear", "constant_with_warmup"]
    )

    @property
    def inputs(self) -> RewardInputOptions:
        """How the model's inputs are made; saved beside it, because step 3 must make them alike."""
        return RewardInputOptions(
            self.prompt_template, self.num_queries, self.max_prompt_tokens, self.max_response_tokens,
            self.prefix_attention == "true",
        )  # fmt: skip


def check_config(config: Step2Config) -> None:
    """Raise `InputError` for settings that cannot work, before anything is loaded."""
    for name in ("model_name_or_path", "samples", "labels", "output_dir"):
        if not getattr(config, name):
            raise InputError(f"--{name} is missing")
    check_numbers(config)
    if config.query_rule == "learned" and config.heads == "sentence":
        raise InputError("--query_rule learned is for words' scores; a model with --heads sentence has none")
    check_trainer_options(config)
    if config.class_weights and (len(config.class_weights) != NUM_CLASSES or min(config.class_weights) <= 0):
        raise InputError(f"--class_weights needs {NUM_CLASSES} numbers above 0, {_CLASSES}; not {config.class_weights}")
    ratios = config.class_keep_ratios
    if ratios and (len(ratios) != NUM_CLASSES or not all(0 < ratio <= 1 for ratio in ratios)):
        raise InputError(f"--class_keep_ratios needs {NUM_CLASSES} numbers in 0 < ratio <= 1, {_CLASSES}; not {ratios}")
