"""The loss of step 1: a token-weighted mean over the whole optimiser step, whatever way it is cut into batches."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch.nn.functional import cross_entropy
from transformers import EvalPrediction

from common.alignment import IGNORE_LABEL
from common.engine.trainer import RecipeTrainer


def token_nll(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """`-log p(targets_t | <t)` of positions 1..T-1.

    `logits` `(B, T, V)`, `targets` `(B, T)` ids; position t is predicted from the logits at t-1. Returns `(B, T-1)` in
    nats, 0 where the target is `IGNORE_LABEL`.
    """
    # Flat, because a softmax over a strided dimension takes twice as long.
    predicted, wanted = logits[:, :-1].float(), targets[:, 1:]
    flat = cross_entropy(predicted.flatten(0, 1), wanted.flatten(), reduction="none", ignore_index=IGNORE_LABEL)
    return flat.view_as(wanted)


def token_weights(labels: torch.Tensor, attention_mask: torch.Tensor, prompt_loss_weight: float) -> torch.Tensor:
    """Weights `(B, T)` of the tokens as targets: 1 in the response (EOS included), `prompt_loss_weight` in the prompt,
    0 on padding and on the first token, which nothing predicts."""
    weights = torch.where(labels != IGNORE_LABEL, 1.0, prompt_loss_weight * attention_mask)
    weights[:, 0] = 0.0
    return weights


class SftTrainer(RecipeTrainer):
    """`L = sum_t w_t nll_t / sum_t w_t`, both sums over all micro-batches and ranks of an optimiser step.

    A mean of means would weigh a token by how short the other responses of its micro-batch are.
    """

    loss_is_scaled_for_ga = True

    def __init__(self, *args: Any, prompt_loss_weight: float = 0.0, **kwargs: Any) -> None:
        super().__init__(*args, preprocess_logits_for_metrics=token_nll, compute_metrics=response_metrics, **kwargs)
        self.prompt_loss_weight = prompt_loss_weight

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, torch.Tensor],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, Any]:
        """This micro-batch's part of the loss; `num_items_in_batch` is the denominator."""
        outputs = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"])
        nll = token_nll(outputs.logits, inputs["input_ids"])
        # Gradients are averaged over the ranks, but the parts of the loss are to be summed.
        loss = (nll * self._weights(inputs)[:, 1:]).sum() / num_items_in_batch * self.accelerator.num_processes
        return (loss, outputs) if return_outputs else loss

    def _get_num_items_in_batch(self, batch_samples: list[dict[str, torch.Tensor]], device: torch.device) -> Any:
        """The weights' sum over these micro-batches and all ranks; the base class would count tokens."""
        total = sum(self._weights(batch).sum() for batch in batch_samples)
        return self.accelerator.gather(total.to(device)).sum()

    def _weights(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        return token_weights(batch["labels"], batch["attention_mask"], self.prompt_loss_weight)


def response_metrics(prediction: EvalPrediction) -> dict[str, float]:
    """Mean nll a response token over all evaluated examples (in place of the Trainer's mean of batch means), and its
    exponential. `predictions` are `token_nll` of the labels `(N, T-1)`, `label_ids` `(N, T)`."""
    counted = prediction.label_ids[:, 1:] != IGNORE_LABEL
    loss = float(prediction.predictions[counted].mean())
    return {"loss": loss, "perplexity": math.exp(loss)}
