"""What step 2's training will hold on each GPU, phase by phase, before anything is loaded."""

from __future__ import annotations

from common.engine.deepspeed_config import zero_stage
from common.planning.models import ModelSpec
from common.planning.passes import classifier_inputs, classifier_pass, training_pass
from common.planning.plan import Machine, Plan
from common.planning.trainer import plan_trainer
from step2_token_reward.config import Step2Config


def plan_step2(config: Step2Config, machine: Machine) -> Plan:
    """The plan of training the reward model. Raises `InputError` for a configuration that cannot be read."""
    spec = ModelSpec.of(
        config.model_name_or_path, "token_classifier", config, heads=config.heads,
        bidirectional=config.bidirectional != "false", zero3=zero_stage(config) == 3,
    )
    tokens, rows = config.max_prompt_tokens + config.max_response_tokens, config.per_device_train_batch_size
    update = training_pass(
        spec, lambda model: model(**classifier_inputs(model, rows, tokens)).logits.float().sum(), padded=True
    )
    evaluation = classifier_pass(spec, config.per_device_eval_batch_size, tokens)
    return plan_trainer("step 2", config, machine, spec, update, evaluation)
