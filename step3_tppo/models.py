"""The four models of step 3 under DeepSpeed: actor, reference, critic, reward model."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import deepspeed
import torch
from torch import nn
from transformers import PreTrainedTokenizerBase
from transformers.integrations.deepspeed import HfDeepSpeedConfig, unset_hf_deepspeed_config

from common.engine import distributed
from common.engine.deepspeed_config import inference_config, training_config
from common.engine.hybrid import HybridEngine
from common.engine.memory import cache_bytes, free_bytes, gathered_bytes, weights_that_fit
from common.errors import InputError
from common.generation.decode import check_decodable
from common.models.layouts import Layout, forward_arguments, lay_out, why_not_shared
from common.models.loading import (
    apply_lora,
    causal_lm_skeleton,
    check_lengths,
    check_vocabulary,
    has_attention,
    load_causal_lm,
    without_dropout,
)
from common.models.response_scores import ScoringOptions, response_scores
from common.models.sequences import SequenceBatch
from common.models.token_reward import (
    TokenRewardModel,
    load_token_reward_scorer,
    may_share_histories,
    token_classifier_skeleton,
)
from common.models.value_model import ValueModel, load_value_model
from common.planning.models import ModelSpec, gives_own_logits
from step3_tppo.config import DORA_NEEDS_WHOLE_WEIGHTS, Step3Config


class Models(NamedTuple):
    """Engines that can step into inference. `reference` is None with LoRA: the actor without adapters is it. `critic`
    is None with the group baseline. `scoring` is how response tokens are scored."""

    actor: HybridEngine
    reference: HybridEngine | None
    critic: HybridEngine | None
    reward: HybridEngine
    scorer: TokenRewardModel
    scoring: ScoringOptions


def build_models(config: Step3Config, tokenizer: PreTrainedTokenizerBase) -> Models:
    """Load the four models and hand them to DeepSpeed. Raises `InputError` where they do not fit together."""
    world_size = distributed.world_size()
    training = training_config(
        config,
        micro_batch_size=config.micro_batch_size,
        world_size=world_size,
        max_grad_norm=config.max_grad_norm,
    )
    frozen = inference_config(config, world_size=world_size)

    skeleton = causal_lm_skeleton(config.actor_path, config)
    check_decodable(skeleton)
    check_lengths(skeleton.config, config.max_prompt_tokens + config.max_response_tokens)
    load_policy = partial(load_causal_lm, config.actor_path, config, config=without_dropout(skeleton.config))
    # Adapters within the sharded loading too, because DoRA's magnitudes begin as the norms of whole weights.
    actor = _load(training, lambda: apply_lora(load_policy(quantize=config.quantize), config))
    check_vocabulary(actor, tokenizer)
    critic = _load_critic(config, training, tokenizer) if config.baseline == "critic" else None
    if config.gradient_checkpointing:
        for model in filter(None, (actor, critic)):
            model.gradient_checkpointing_enable()
    reference = None
    if config.lora_r == 0:
        reference = _frozen(_load(frozen, load_policy), frozen)
    reward_options = _reward_options(config)
    scorer = _load(frozen, lambda: load_token_reward_scorer(config.reward_path, reward_options))
    models = Models(
        actor=_trained(actor, config.actor_learning_rate, training, config),
        reference=reference,
        critic=_trained(critic, config.critic_learning_rate, training, config) if critic is not None else None,
        reward=_frozen(scorer.module, frozen),
        scorer=scorer,
        scoring=ScoringOptions(),
    )
    _choose_weights(models, config)
    layout = _choose_layout(models, config)
    if models.critic is not None:
        models.critic.module.layout = layout
    scorer.shares_prompts = layout == "shared" and _reward_model_shares(models)
    chunks = gives_own_logits(ModelSpec.of(config.actor_path, "causal_lm", config, config))
    return models._replace(scoring=ScoringOptions(layout, chunks))


def _load_critic(
    config: Step3Config, training: dict[str, Any], tokenizer: PreTrainedTokenizerBase
) -> ValueModel:
    path = config.critic_path or config.actor_path
    critic = _load(training, lambda: load_value_model(path, config, lora=config.of_critic()))
    check_vocabulary(critic.trunk, tokenizer)
    check_lengths(critic.trunk.config, config.max_prompt_tokens + config.max_response_tokens)
    return critic


def _reward_options(config: Step3Config) -> Step3Config:
    """How the reward model is loaded: as the others, but with its own attention where it has not their kernel."""
    if has_attention(token_classifier_skeleton(config.reward_path, config), config.attn_implementation):
        return config
    said = f"the reward model has no {config.attn_implementation} attention: it runs with eager"
    distributed.on_main_first(lambda: print(said, flush=True))
    return dataclasses.replace(config, attn_implementation="eager")


def _load(config: dict[str, Any], load: Callable[[], Any]) -> Any:
    with _sharded_loading(config):
        return load()


@contextmanager
def _sharded_loading(config: dict[str, Any]) -> Iterator[None]:
    """Let `from_pretrained` shard each weight as it loads it when `config` asks for ZeRO-3.

    transformers reads a global that it holds weakly; it is set while a model loads and never longer, because
    `generate` would take it as a reason to run every rank to the longest response.
    """
    if config.get("zero_optimization", {}).get("stage") != 3:
        yield
        return
    setting = HfDeepSpeedConfig(config)
    try:
        yield
    finally:
        unset_hf_deepspeed_config()
        del setting


def _trained(module: nn.Module, learning_rate: float, ds_config: dict[str, Any], config: Step3Config) -> HybridEngine:
    parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(
        parameters, lr=learning_rate, betas=(0.9, 0.95), eps=config.adam_epsilon, weight_decay=config.weight_decay,
        fused=config.fused_adam or None,  # None lets torch choose between its other two ways
    )  # fmt: skip
    engine, *_ = deepspeed.initialize(model=module, optimizer=optimizer, config=ds_config)
    return HybridEngine(engine)


def _frozen(module: nn.Module, ds_config: dict[str, Any]) -> HybridEngine:
    module.requires_grad_(False)
    engine, *_ = deepspeed.initialize(model=module, config=ds_config)
    return HybridEngine(engine)


def _choose_weights(models: Models, config: Step3Config) -> None:
    """How all models see sharded weights outside training: as `--hybrid_weights` says, or as the largest one fits."""
    hybrids = [hybrid for hybrid in (models.actor, models.reference, models.critic, models.reward) if hybrid]
    mode = config.hybrid_weights
    needed = max(gathered_bytes(hybrid.engine) for hybrid in hybrids)
    if mode == "auto" and needed:
        model = models.actor.module
        rows = config.rollout_batch_size * config.samples_per_prompt // distributed.world_size()
        cache = cache_bytes(
            model.config.get_text_config(), config.decode_rows or rows,
            config.max_prompt_tokens + config.max_response_tokens, model.dtype,
        )  # fmt: skip
        mode, reason = weights_that_fit(needed, cache, free_bytes(model.device))
        distributed.on_main_first(lambda: print(reason, flush=True))
        if mode == "sharded" and config.lora_dora:
            raise InputError(DORA_NEEDS_WHOLE_WEIGHTS)
    for hybrid in hybrids:
        hybrid.weights = "gathered" if mode == "auto" else mode
        hybrid.graphs = config.cuda_graphs


def _choose_layout(models: Models, config: Step3Config) -> Layout:
    """What `--sequence_layout` asks for, or the padded one where actor or critic cannot share prompts."""
    layout = config.wanted_layout()
    if layout != "shared":
        return layout
    actor, critic = models.actor, models.critic

    def read_by_actor(batch: SequenceBatch, layout: Layout) -> None:
        response_scores(actor.module, actor.module, batch, 1.0, ScoringOptions(layout))

    def read_by_critic(batch: SequenceBatch, layout: Layout) -> None:
        critic.module.layout = layout
        critic.module(batch)

    with actor.inference() as module:
        reason = why_not_shared(module, read_by_actor)
    if critic is not None:
        with critic.inference() as module:
            reason = why_not_shared(module.trunk, read_by_critic) or reason
    if not reason:
        return "shared"
    message = f"every prompt is read once for each of its responses: {reason}"
    distributed.on_main_first(lambda: print(message, flush=True))
    return "padded"


def _reward_model_shares(models: Models) -> bool:
    """Whether the reward model may read a history once for all its responses, and can."""
    module, prefix = models.reward.module, models.scorer.encoder.options.prefix_attention
    if not may_share_histories(module, prefix):
        return False

    def read(batch: SequenceBatch, layout: Layout) -> None:
        if layout == "padded" and prefix:
            # With the positions that the model itself counts.
            module(**forward_arguments(module, lay_out(batch, "shared"), causal=False) | {"position_ids": None})
        else:
            module(**forward_arguments(module, lay_out(batch, layout), causal=not prefix))

    with models.reward.inference() as module:
        return not why_not_shared(module, read)
