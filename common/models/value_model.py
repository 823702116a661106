"""The critic: a language model's trunk with one number per token, the value of the state before the next token."""

from __future__ import annotations

from pathlib import Path

import torch
from peft import PeftModel
from safetensors.torch import save_file
from torch import nn
from transformers import AutoConfig, AutoModel, PreTrainedModel

from common.config import LoraOptions, ModelOptions
from common.errors import InputError
from common.models.kernels import apply_liger
from common.models.layouts import Layout, ModelRows, hidden_of_predictions, lay_out
from common.models.loading import apply_lora, check_machine, merged_copy, without_dropout
from common.models.sequences import SequenceBatch, unflattened

VALUE_HEAD_NAME = "value_head.safetensors"


class ValueModel(nn.Module):
    """Trunk and linear value head; `forward` gives V(s_t) for each response token t.

    `layout` says how the trunk reads a batch (`common.models.layouts`).
    """

    def __init__(self, trunk: PreTrainedModel, layout: Layout = "padded") -> None:
        super().__init__()
        self.trunk: PreTrainedModel | PeftModel = trunk
        self.layout: Layout = layout
        config = trunk.config.get_text_config()
        # OPT-350m's hidden states leave the trunk at the width of its embeddings.
        hidden_size = getattr(config, "word_embed_proj_dim", config.hidden_size)
        self.value_head = nn.Linear(hidden_size, 1)
        # Initial values near 0, as OpenRLHF's: hidden states of a pretrained trunk are large, and with a deviation of
        # 1 / sqrt(h + 1) the first values of SmolLM2-135M vary four times as much as the returns.
        nn.init.normal_(self.value_head.weight, std=1 / (hidden_size + 1))
        nn.init.zeros_(self.value_head.bias)

    def forward(self, batch: SequenceBatch) -> torch.Tensor:
        """Values (B, T) in fp32, 0 where masked: V_t is read at position P + t - 1, before token t is there."""
        return self.values_of_rows(lay_out(batch, self.layout))

    def values_of_rows(self, rows: ModelRows) -> torch.Tensor:
        """`forward` of a batch that is laid out already."""
        hidden = hidden_of_predictions(self.trunk, rows)
        return unflattened(self.value_head(hidden).squeeze(-1).float(), rows.response_mask)

    def apply_lora(self, options: LoraOptions) -> None:
        """Freeze the trunk and train adapters on its linear layers beside the head, which keeps all its weights.

        Nothing happens when `lora_r` is 0. Raises `InputError` when no module has the names asked for.
        """
        self.trunk = apply_lora(self.trunk, options, task_type=None)

    def gradient_checkpointing_enable(self) -> None:
        """Recompute the trunk's activations in the backward pass."""
        self.trunk.gradient_checkpointing_enable()


def load_value_model(
    path: str | Path, options: ModelOptions, lora: LoraOptions | None = None
) -> ValueModel:
    """A critic on the trunk of the model at `path`, with a fresh value head, and with `lora` adapters on the trunk.

    The folder is a causal language model's, or a reward model's made of one: if that reads both ways, the critic does
    not, because a value may not know the tokens to come. Raises `InputError` when weights of the trunk are missing.
    """
    check_machine(str(path), options)
    config = AutoConfig.from_pretrained(path, trust_remote_code=options.trust_remote_code)
    if getattr(config, "is_causal", True) is False:
        config.is_causal = True
    dtype = torch.bfloat16 if options.dtype == "bf16" else torch.float32
    trunk, report = AutoModel.from_pretrained(
        path,
        config=without_dropout(config),
        dtype=dtype,
        attn_implementation=options.attn_implementation,
        trust_remote_code=options.trust_remote_code,
        output_loading_info=True,
    )
    if report["missing_keys"]:
        missing = sorted(report["missing_keys"])
        raise InputError(
            f"{path}: no critic can be made of it, {len(missing)} of its weights are missing ({missing[0]}, ...); give "
            "the folder of a trained model"
        )
    if options.liger:
        apply_liger(trunk)
    model = ValueModel(trunk)
    model.value_head.to(dtype)
    if lora is not None:
        # After the head has been drawn, so that values begin as those of the same run without adapters.
        model.apply_lora(lora)
    return model


def save_value_model(model: ValueModel, state: dict[str, torch.Tensor], path: str | Path) -> None:
    """Write the trunk as a Hugging Face folder and the head beside it; `state` holds the whole weights.

    A trunk with adapters is written merged, so that the folder loads like any other; `model` is left as it was.
    """
    trunk = {key.removeprefix("trunk."): value for key, value in state.items() if key.startswith("trunk.")}
    head = {key.removeprefix("value_head."): value for key, value in state.items() if key.startswith("value_head.")}
    if isinstance(model.trunk, PeftModel):
        merged_copy(model.trunk, trunk).save_pretrained(path)
    else:
        model.trunk.save_pretrained(path, state_dict=trunk)
    save_file(head, Path(path) / VALUE_HEAD_NAME)
