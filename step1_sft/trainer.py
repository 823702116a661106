"""The loss of step 1: a token-weighted mean over the whole optimiser step, whatever way it is cut into batches."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch.nn.functional import cross_entropy
from transformers import EvalPrediction, PreTrainedModel

from common.alignment import IGNORE_LABEL
from common.engine.trainer import RecipeTrainer
from common.models.layouts import without_wrapper
from common.models.token_scores import token_scores_of_head


def token_weights(labels: torch.Tensor, attention_mask: torch.Tensor, prompt_loss_weight: float) -> torch.Tensor:
    """Weights `(B, T)` of the tokens as targets: 1 in the response (EOS included), `prompt_loss_weight` in the prompt,
    0 on padding and on the first token, which nothing predicts."""
    weights = torch.where(labels != IGNORE_LABEL, 1.0, prompt_loss_weight * attention_mask)
    weights[:, 0] = 0.0
    return weights


def token_nll(
    forward: Callable[..., Any],
    model: PreTrainedModel,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor,
    wanted: torch.Tensor,
    chunks: bool = False,
) -> torch.Tensor:
    """`-log p(input_ids_t | <t)` in nats of the tokens that are `wanted` `(B, T)` bool, row by row: `(M,)` fp32.

    Token t is predicted from the logits at t-1. `forward`, which runs `model`, computes logits there and nowhere else:
    over a large vocabulary those of whole prompts would be most of a step's memory. In `chunks` of the vocabulary not
    even these exist as a whole (`common.models.token_scores`). The first token of a row is never wanted.
    """
    arguments = {
        "input_ids": input_ids,
        "attention_mask": attention_mask,
        "logits_to_keep": torch.nn.functional.pad(wanted[:, 1:], (0, 1)),
    }
    if chunks:
        return -token_scores_of_head(forward, model, arguments, input_ids[wanted])[0]
    return cross_entropy(forward(**arguments).logits.float(), input_ids[wanted], reduction="none")


class SftTrainer(RecipeTrainer):
    """`L = sum_t w_t nll_t / sum_t w_t`, both sums over all micro-batches and ranks of an optimiser step.

    A mean of means would weigh a token by how short the other responses of its micro-batch are. `chunks` as in
    `token_nll`.
    """

    loss_is_scaled_for_ga = True

    def __init__(
        self, *args: Any, prompt_loss_weight: float = 0.0, chunks: bool = False, **kwargs: Any
    ) -> None:
        super().__init__(*args, compute_metrics=response_metrics, **kwargs)
        self.prompt_loss_weight = prompt_loss_weight
        self._chunks = chunks

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, torch.Tensor],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """This micro-batch's part of the loss; `num_items_in_batch` is the denominator.

        The outputs are `nll` `(B, T)`, 0 where no token is predicted with a weight.
        """
        weights = self._weights(inputs)
        wanted = weights > 0
        inner = without_wrapper(self.accelerator.unwrap_model(model))
        nll = token_nll(model, inner, inputs["input_ids"], inputs["attention_mask"], wanted, self._chunks)
        # Gradients are averaged over the ranks, but the parts of the loss are to be summed.
        loss = (nll * weights[wanted]).sum() / num_items_in_batch * self.accelerator.num_processes
        if not return_outputs:
            return loss
        return loss, {"nll": torch.zeros_like(weights).masked_scatter(wanted, nll)}

    def _get_num_items_in_batch(self, batch_samples: list[dict[str, torch.Tensor]], device: torch.device) -> Any:
        """The weights' sum over these micro-batches and all ranks; the base class would count tokens."""
        total = sum(self._weights(batch).sum() for batch in batch_samples)
        return self.accelerator.gather(total.to(device)).sum()

    def _weights(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        return token_weights(batch["labels"], batch["attention_mask"], self.prompt_loss_weight)


def response_metrics(prediction: EvalPrediction) -> dict[str, float]:
    """Mean nll a response token over all evaluated examples (in place of the Trainer's mean of batch means), and its
    exponential. `predictions` are the nll and `label_ids` the labels, both `(N, T)`."""
    loss = float(prediction.predictions[prediction.label_ids != IGNORE_LABEL].mean())
    return {"loss": loss, "perplexity": math.exp(loss)}
