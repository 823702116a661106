"""The loss of step 2 over a whole optimiser step, and evaluation on held-out users."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from transformers import EvalPrediction

from common.engine.trainer import RecipeTrainer
from common.errors import TrainingDiverged
from common.models.query_score import QueryRule
from common.models.reward_losses import (
    Denominators,
    count_queries,
    keep_classes,
    summed_class_weights,
    token_reward_loss,
)
from step2_token_reward.dataset import LabelledResponse, Row
from step2_token_reward.evaluation import METRIC_NAMES, held_out_metrics

_TARGETS = ("labels", "query_index", "query_scores", "row")


class RewardTrainer(RecipeTrainer):
    """`L = w L_local + (1 - w) L_global`, each a mean over all micro-batches and ranks of an optimiser step.

    A mean of means would weigh a token by how few others its micro-batch holds, and make the result depend on how a
    batch is cut. `class_keep_ratios` draws anew for every step which tokens stay in the local loss.
    """

    loss_is_scaled_for_ga = True

    def __init__(
        self,
        *args: Any,
        train_dataset: Sequence[Row],
        held_out: Sequence[LabelledResponse],
        w: float,
        class_weights: Sequence[float],
        class_keep_ratios: Sequence[float] = (),
        learns_query_rule: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(
            *args,
            train_dataset=train_dataset,
            eval_dataset=[item.row(place) for place, item in enumerate(held_out)],
            compute_metrics=self._metrics,
            **kwargs,
        )
        self._held_out = held_out
        self._w = w
        self._class_weights = torch.tensor(class_weights, device=self.args.device)
        self._keep_ratios = class_keep_ratios
        self._learns_query_rule = learns_query_rule
        self.query_rule: QueryRule | None = None  # of the last evaluation, if one is learned
        self._parts = torch.zeros(2, device=self.args.device)
        self._steps_in_parts = 0

    def get_batch_samples(
        self, epoch_iterator: Iterator[dict[str, torch.Tensor]], num_batches: int, device: torch.device
    ) -> tuple[list[dict[str, torch.Tensor]], torch.Tensor]:
        """The micro-batches of the next optimiser step, class masks drawn, and the denominators of its losses."""
        self._steps_in_parts += 1
        batches = map(self._class_mask(), epoch_iterator) if self._keep_ratios else epoch_iterator
        return super().get_batch_samples(batches, num_batches, device)

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, torch.Tensor],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, Any]:
        """This micro-batch's part of the loss; `num_items_in_batch` holds the `Denominators` of the step."""
        outputs = model(**_model_inputs(inputs))
        losses = token_reward_loss(
            outputs.logits,
            inputs["labels"],
            inputs["query_index"],
            inputs["query_scores"],
            self._class_weights,
            self._w,
            Denominators(*num_items_in_batch),
        )
        self._parts += torch.stack([losses.local_loss, losses.global_loss]).detach()
        # Gradients are averaged over the ranks, but the parts of the loss are to be summed.
        loss = losses.total * self.accelerator.num_processes
        return (loss, outputs) if return_outputs else loss

    def prediction_step(
        self,
        model: torch.nn.Module,
        inputs: dict[str, torch.Tensor],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[None, torch.Tensor, torch.Tensor]:
        """Logits and row numbers; the losses of the whole held-out set are among the metrics."""
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad():
            logits = model(**_model_inputs(inputs)).logits
        return None, logits.float(), inputs["row"]

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """As in the base class; a training loss is joined by its two parts."""
        if "loss" in logs:
            local_loss, global_loss = (self.accelerator.reduce(self._parts, "sum") / self._steps_in_parts).tolist()
            logs |= {"local_loss": local_loss, "global_loss": global_loss}
            self._parts.zero_()
            self._steps_in_parts = 0
        super().log(logs, start_time)

    def final_metrics(self) -> dict[str, float | None]:
        """The measures of `METRIC_NAMES` after the last step, None where undefined. Call on all ranks."""
        logged = [row for row in self.state.log_history if "eval_loss" in row and row["step"] == self.state.global_step]
        metrics = logged[-1] if logged else self.evaluate()
        return {name: metrics.get(f"eval_{name}") for name in METRIC_NAMES}

    def _get_num_items_in_batch(
        self, batch_samples: list[dict[str, torch.Tensor]], device: torch.device
    ) -> torch.Tensor:
        """The denominators over these micro-batches and all ranks, (2,); the base class would count tokens."""
        weights = sum(summed_class_weights(batch["labels"], self._class_weights) for batch in batch_samples)
        queries = sum(count_queries(batch["query_index"]) for batch in batch_samples)
        return self.accelerator.reduce(torch.stack([weights, queries.float()]).to(device), "sum")

    def _class_mask(self) -> Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]:
        """The draw of the next optimiser step, on this rank."""
        # Seeded by the step, so that a resumed run draws what an unbroken one would have drawn.
        place = self.state.global_step * self.accelerator.num_processes + self.accelerator.process_index
        generator = torch.Generator().manual_seed(self.args.seed * 1_000_003 + place)
        return lambda batch: batch | {"labels": keep_classes(batch["labels"], self._keep_ratios, generator)}

    def _metrics(self, prediction: EvalPrediction) -> dict[str, float]:
        """Measures that are defined; the Trainer puts `eval_` before their names."""
        logits = torch.from_numpy(prediction.predictions)
        pairs = []
        for row, scores in zip(prediction.label_ids.tolist(), logits, strict=True):
            item = self._held_out[row]
            pairs.append((scores[: len(item.encoded.spans)], item))
        metrics, self.query_rule = held_out_metrics(
            pairs, self._class_weights.cpu(), self._w, self._learns_query_rule
        )
        if not math.isfinite(metrics["loss"]):
            raise TrainingDiverged(f"held-out loss {metrics['loss']} after step {self.state.global_step}")
        return {name: value for name, value in metrics.items() if not math.isnan(value)}


def _model_inputs(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: value for name, value in batch.items() if name not in _TARGETS}
