"""From sharded engines to folders that anyone can load."""

from __future__ import annotations

from pathlib import Path

import torch

from common.data.prompts import PromptBuilder
from common.engine.distributed import on_main_first
from common.engine.hybrid import HybridEngine
from common.models.loading import complete_folder, save_model_folder
from common.models.value_model import save_value_model
from step3_tppo.config import Step3Config
from step3_tppo.models import Models


def export_models(models: Models, prompts: PromptBuilder, config: Step3Config) -> None:
    """Write the tuned actor (`model/`, with LoRA also its adapters) and the critic, if there is one (`critic/`). All
    ranks must call."""
    folder = Path(config.output_dir)
    state = whole_state_dict(models.actor)
    generation = {
        "do_sample": True, "temperature": config.temperature, "top_k": 0,
        "max_new_tokens": config.max_response_tokens,
    }  # fmt: skip
    on_main_first(
        lambda: save_model_folder(
            models.actor.module, prompts.tokenizer, folder / "model", generation, state, prompts
        )
    )
    if models.critic is not None:
        _export_critic(models.critic, folder)


def _export_critic(critic: HybridEngine, folder: Path) -> None:
    state = whole_state_dict(critic)

    def write() -> None:
        with complete_folder(folder / "critic") as temporary:
            save_value_model(critic.module, state, temporary)

    on_main_first(write)


def whole_state_dict(hybrid: HybridEngine) -> dict[str, torch.Tensor]:
    """The engine's whole weights on rank 0 (elsewhere what it returns is incomplete); parameter by parameter under
    ZeRO-3, so that no rank but the first needs memory for them. All ranks must call.
    """
    engine = hybrid.engine
    if engine.zero_optimization_partition_weights():
        return engine._zero3_consolidated_16bit_state_dict()
    return hybrid.module.state_dict()
