"""What step 1 will hold on each GPU, phase by phase, before anything is loaded."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from common.engine.deepspeed_config import zero_stage
from common.models.layouts import without_wrapper
from common.planning.models import ModelSpec, gives_own_logits
from common.planning.passes import evaluation_pass, training_pass
from common.planning.plan import Machine, Plan
from common.planning.trainer import plan_trainer
from step1_sft.config import SftConfig
from step1_sft.trainer import token_nll


def plan_step1(config: SftConfig, machine: Machine) -> Plan:
    """The plan of supervised fine-tuning. Raises `InputError` for a configuration that cannot be read."""
    spec = ModelSpec.of(config.model_name_or_path, "causal_lm", config, config, zero3=zero_stage(config) == 3)
    length = config.max_prompt_tokens + config.max_response_tokens
    predicted = length - 1 if config.prompt_loss_weight else config.max_response_tokens
    chunks = gives_own_logits(spec)

    def nll(model: nn.Module, rows: int) -> Tensor:
        ids = torch.zeros(rows, length, dtype=torch.long, device="meta")
        return token_nll(model, without_wrapper(model), ids, ids, ids.bool(), chunks)

    train, held_out = config.per_device_train_batch_size, config.per_device_eval_batch_size
    update = training_pass(spec, lambda model: nll(model, train).sum(), train * predicted, padded=True)
    evaluate = evaluation_pass(spec, lambda model: nll(model, held_out), held_out * predicted)
    return plan_trainer("step 1", config, machine, spec, update, evaluate)
