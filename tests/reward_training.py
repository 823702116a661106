"""A tiny reward model, labelled responses in its tokens, and a trainer for them that needs no DeepSpeed."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from transformers import PreTrainedModel, TrainingArguments

from common.models.reward_encoder import RewardEncoder
from step2_token_reward.dataset import RewardCollator, RewardData, build_data
from step2_token_reward.trainer import RewardTrainer
from tests.labelled_samples import RESPONSES, labelled
from tests.models.reward_fixtures import INPUTS, tiny_classifier

CLASS_WEIGHTS = [0.5, 1.0, 1.5]


class Parts(NamedTuple):
    """What a `RewardTrainer` is made of."""

    model: PreTrainedModel
    encoder: RewardEncoder
    data: RewardData


def tiny_parts(kind: str, bidirectional: bool = False) -> Parts:
    """A model without dropout that trains on `RESPONSES` and is judged on them; the same weights every time."""
    model, tokenizer = tiny_classifier(kind, bidirectional)
    encoder = RewardEncoder(tokenizer, INPUTS, model)
    return Parts(model, encoder, build_data(labelled("train", RESPONSES) + labelled("dev", RESPONSES), encoder))


def trainer_of(
    parts: Parts, folder: Path, w: float = 0.5, keep_ratios: tuple[float, ...] = (), learns_query_rule: bool = False,
    **settings: Any,
) -> RewardTrainer:
    """A trainer on the CPU that takes all six responses as one batch and logs every step."""
    arguments = {
        "output_dir": str(folder), "use_cpu": True, "report_to": "none", "remove_unused_columns": False,
        "logging_steps": 1, "save_strategy": "no", "disable_tqdm": True, "lr_scheduler_type": "constant",
        "per_device_train_batch_size": 6, "max_grad_norm": 0.0, "logging_nan_inf_filter": False, "seed": 3,
    }  # fmt: skip
    return RewardTrainer(
        model=parts.model, args=TrainingArguments(**arguments | settings), train_dataset=parts.data.train,
        held_out=parts.data.held_out, data_collator=RewardCollator(parts.encoder), w=w, class_weights=CLASS_WEIGHTS,
        class_keep_ratios=keep_ratios, learns_query_rule=learns_query_rule,
    )  # fmt: skip
