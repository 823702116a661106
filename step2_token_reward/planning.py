"""What step 2's training will hold on each GPU, phase by phase, before anything is loaded."""

from __future__ import annotations

from common.engine.deepspeed_config import zero_stage
from common.models.token_reward import token_classifier_skeleton
from common.planning.models import ModelSpec, meta_model
from common.planning.passes import Rows, classifier_inputs, classifier_pass, training_pass
from common.planning.plan import Machine, Plan
from common.planning.trainer import plan_trainer
from step2_token_reward.attention import settle_attention
from step2_token_reward.config import Step2Config


def plan_step2(config: Step2Config, machine: Machine) -> Plan:
    """The plan of training the reward model. Raises `InputError` for a configuration that cannot be read."""
    bidirectional, prefix = settle_attention(config, token_classifier_skeleton(config.model_name_or_path, config))
    spec = ModelSpec.of(
        config.model_name_or_path, "token_classifier", config, heads=config.heads, bidirectional=bidirectional,
        zero3=zero_stage(config) == 3,
    )
    train, held_out = (
        Rows(size, config.max_prompt_tokens, config.max_response_tokens)
        for size in (config.per_device_train_batch_size, config.per_device_eval_batch_size)
    )
    inputs = classifier_inputs(meta_model(spec), train, prefix)
    update = training_pass(spec, lambda model: model(**inputs).logits.float().sum(), padded=True)
    # The Trainer holds all micro-batches of an optimiser step while it learns from them.
    held = config.gradient_accumulation_steps * sum(tensor.nbytes for tensor in inputs.values())
    update = update._replace(peak=update.peak + held)
    return plan_trainer("step 2", config, machine, spec, update, classifier_pass(spec, held_out, prefix))
