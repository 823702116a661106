"""DPO on `transformers.Trainer`, and the reference's log-probs, which are taken once before it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from transformers import EvalPrediction

from baselines.dpo.loss import PreferenceLoss, dpo_loss
from baselines.dpo.pairs import Pair, PairCollator
from common.engine import distributed
from common.engine.trainer import RecipeTrainer
from common.models.response_scores import response_scores
from common.models.sequences import SequenceBatch
from common.progress import progress


class DpoTrainer(RecipeTrainer):
    """Minimises the mean `dpo_loss` of the pairs. All micro-batches of a step hold as many pairs."""

    def __init__(self, *args: Any, beta: float, temperature: float, **kwargs: Any) -> None:
        super().__init__(*args, compute_metrics=pair_metrics, **kwargs)
        self._beta = beta
        self._temperature = temperature

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, torch.Tensor],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The mean over the pairs of this micro-batch."""
        return self._losses(model, inputs).losses.mean()

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, torch.Tensor],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Mean loss, margins (P,) and, as the Trainer wants labels, the losses (P,)."""
        with torch.no_grad():
            losses, margins = self._losses(model, self._prepare_inputs(inputs))
        return losses.mean(), margins, losses

    def _losses(self, model: nn.Module, inputs: dict[str, torch.Tensor]) -> PreferenceLoss:
        batch = SequenceBatch(*(inputs[name] for name in SequenceBatch._fields))
        logprobs = sequence_logprobs(model, self.accelerator.unwrap_model(model), batch, self._temperature)
        return dpo_loss(*logprobs.chunk(2), *inputs["reference"].chunk(2), self._beta)


def sequence_logprobs(
    forward: nn.Module, module: nn.Module, batch: SequenceBatch, temperature: float
) -> torch.Tensor:
    """Log-prob of each whole response, (B,)."""
    scores = response_scores(forward, module, batch, temperature)
    return torch.where(batch.response_mask, scores.logprobs, 0.0).sum(1)


def pair_metrics(prediction: EvalPrediction) -> dict[str, float]:
    """Mean loss and share of the pairs ranked right."""
    return {"loss": float(prediction.label_ids.mean()), "accuracy": float((prediction.predictions > 0).mean())}


@torch.no_grad()
def add_reference(
    pairs: Sequence[Pair], model: nn.Module, collator: PairCollator, batch_size: int, temperature: float
) -> None:
    """Fill `reference` of all pairs with the log-probs of `model`, whole on each rank; ranks share the work."""
    mine = range(distributed.rank() * batch_size, len(pairs), distributed.world_size() * batch_size)
    found: dict[int, list[tuple[float, float]]] = {}
    for start in progress(mine, desc="reference"):
        inputs = collator(pairs[start : start + batch_size])
        batch = SequenceBatch(*(inputs[name].to(model.device) for name in SequenceBatch._fields))
        chosen, rejected = sequence_logprobs(model, model, batch, temperature).chunk(2)
        found[start] = list(zip(chosen.tolist(), rejected.tolist(), strict=True))
    everywhere: list[Any] = [found]
    if distributed.world_size() > 1:
        everywhere = [None] * distributed.world_size()
        dist.all_gather_object(everywhere, found)
    for part in everywhere:
        for start, references in part.items():
            for pair, reference in zip(pairs[start : start + batch_size], references, strict=True):
                pair["reference"] = reference
