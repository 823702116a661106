"""The models of a run on the device "meta": shapes and code, no weights and no memory."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal, Self

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForTokenClassification

from common.config import LoraOptions, ModelOptions
from common.models.kernels import settle_dtype
from common.models.layouts import without_wrapper
from common.models.loading import DTYPES, apply_lora, load_model_config
from common.models.token_reward import output_names
from common.models.token_scores import VOCABULARY_PIECE
from common.models.value_model import ValueModel
from common.planning.tracking import PassTracker

Kind = Literal["causal_lm", "value_model", "token_classifier"]


@dataclass(frozen=True)
class ModelSpec:
    """What decides a model's shapes and passes; `path` is a folder, a hub name or a config.json.

    `zero3` is whether ZeRO-3 replaces the linear layer, which then keeps its input also where its weight is frozen.
    """

    path: str
    kind: Kind
    dtype: str = "fp32"
    eager: bool = False
    gradient_checkpointing: bool = False
    trust_remote_code: bool = False
    lora_r: int = 0
    lora_target_modules: str = "all-linear"
    heads: str = "token"
    bidirectional: bool = False
    zero3: bool = False

    @classmethod
    def of(cls, path: str, kind: Kind, options: ModelOptions, lora: LoraOptions | None = None, **settings: Any) -> Self:
        """From a step's config; other fields as `settings`."""
        if lora is not None:
            settings |= {"lora_r": lora.lora_r, "lora_target_modules": lora.lora_target_modules}
        return cls(
            path, kind, settle_dtype(options).dtype, options.attn_implementation == "eager",
            options.gradient_checkpointing, options.trust_remote_code, **settings,
        )


@dataclass(frozen=True)
class Weights:
    """Numbers of elements of a model's parameters, one by one, and of its largest module's together."""

    trained: tuple[int, ...]
    frozen: tuple[int, ...]
    largest_module: int
    itemsize: int
    adapted: int = 0  # elements of the layers that have LoRA adapters

    @property
    def total(self) -> int:
        """All elements."""
        return sum(self.trained) + sum(self.frozen)


@lru_cache(maxsize=32)
def meta_model(spec: ModelSpec) -> nn.Module:
    """The model without storage, as the steps build it. Raises `InputError` where its configuration cannot be read.

    Flash attention is planned as the fused kernel of `sdpa`: both hold the same.
    """
    config = load_model_config(spec.path, spec.trust_remote_code)
    dtype = DTYPES[spec.dtype]
    if spec.kind == "token_classifier":
        names = output_names(spec.heads)
        config.num_labels, config.id2label = len(names), names
    if spec.kind == "value_model" and getattr(config, "is_causal", True) is False:
        config.is_causal = True
    if spec.kind == "token_classifier" and spec.bidirectional:
        config.is_causal = False
    auto = {
        "causal_lm": AutoModelForCausalLM, "value_model": AutoModel, "token_classifier": AutoModelForTokenClassification
    }[spec.kind]
    with torch.device("meta"):
        model = auto.from_config(
            config, dtype=dtype, attn_implementation="eager" if spec.eager else "sdpa",
            trust_remote_code=spec.trust_remote_code,
        )
        model.tie_weights()
        if spec.lora_r:
            lora = LoraOptions(lora_r=spec.lora_r, lora_target_modules=spec.lora_target_modules)
            model = apply_lora(model, lora, task_type="CAUSAL_LM" if spec.kind == "causal_lm" else None)
        if spec.gradient_checkpointing:
            without_wrapper(model).activation_checkpointing_enable()
        if spec.kind == "value_model":
            model = ValueModel(model)
    return model.to(dtype)


@lru_cache(maxsize=32)
def weights_of(spec: ModelSpec, trained: bool) -> Weights:
    """The parameters' sizes; not `trained`: all of them are frozen."""
    model = meta_model(spec)
    parameters = list(model.parameters())
    modules = (sum(own.numel() for own in module.parameters(recurse=False)) for module in model.modules())
    return Weights(
        trained=tuple(p.numel() for p in parameters if trained and p.requires_grad),
        frozen=tuple(p.numel() for p in parameters if not (trained and p.requires_grad)),
        largest_module=max(modules),
        itemsize=DTYPES[spec.dtype].itemsize,
        adapted=_adapted(model),
    )


def gives_own_logits(spec: ModelSpec) -> bool:
    """Whether log-probs of a causal model are taken a piece of the vocabulary at a time.

    The vocabulary must have more than one piece, and the model must return the very tensor that its output layer gives.
    Gemma 2, for example, caps its logits after that layer. An output layer with adapters is read as a whole.
    """
    model = without_wrapper(meta_model(spec))
    if model.config.get_text_config().vocab_size <= VOCABULARY_PIECE:
        return False
    head = model.get_output_embeddings()
    if not isinstance(head, nn.Linear):
        return False
    seen: list[torch.Tensor] = []
    hook = head.register_forward_hook(lambda module, inputs, output: seen.append(output))
    try:
        with torch.no_grad(), PassTracker():
            logits = model(input_ids=torch.zeros(1, 2, dtype=torch.long, device="meta")).logits
    finally:
        hook.remove()
    return logits is seen[-1]


def _adapted(model: nn.Module) -> int:
    layers = [module.get_base_layer() for module in model.modules() if isinstance(module, BaseTunerLayer)]
    return sum(p.numel() for layer in layers for p in layer.parameters(recurse=False))
