"""The updates of actor and critic on one rollout."""

from __future__ import annotations

import math

import deepspeed
import torch

from common.engine import distributed
from common.engine.accumulation import accumulate, micro_batches
from common.errors import TrainingDiverged
from common.models.response_scores import TokenScores, response_scores
from common.models.sequences import SequenceBatch
from common.progress import phase_progress
from step3_tppo.batches import mini_batches, step_seed
from step3_tppo.config import Step3Config
from step3_tppo.losses import kl_estimate, policy_loss, token_denominator, value_loss
from step3_tppo.metrics import UPDATE_MAXIMA, UPDATE_SUMS, imbalance, update_metrics
from step3_tppo.models import Models
from step3_tppo.rollout import Rollout


class Updater:
    """Makes all optimizer steps on a rollout."""

    def __init__(self, config: Step3Config, models: Models, device: torch.device) -> None:
        self._config = config
        self._models = models
        self._device = device

    def __call__(
        self, step: int, rollout: Rollout, advantages: torch.Tensor, returns: torch.Tensor, kl_coef: float
    ) -> dict[str, float]:
        """Learn from the rollout of `step`; returns the scalars of its updates.

        Stops early, on all ranks, once `target_kl` is exceeded. `kl_coef` weighs the KL where it is a part of the loss.
        Raises `TrainingDiverged`.
        """
        config = self._config
        totals = torch.zeros(len(UPDATE_SUMS), dtype=torch.float64, device=self._device)
        maxima = torch.zeros(len(UPDATE_MAXIMA), device=self._device)
        stopped = False
        chosen = self.mini_batches(rollout.batch, step)
        with phase_progress(total=config.ppo_epochs * len(advantages), desc="update", unit="response") as bar:
            for number, rows in enumerate(chosen):
                sums, highest = self._optimizer_step(
                    step, rollout, advantages, returns, rows, kl_coef, first=number == 0
                )
                totals += sums
                maxima = torch.maximum(maxima, highest)
                bar.update(len(rows))
                stopped = config.target_kl > 0 and _mean_kl(sums) > config.target_kl
                if stopped:
                    break
        tokens = [sum(rollout.batch.token_counts(rollout.batch.groups(rows))) for rows in chosen]
        critic = self._models.critic
        return update_metrics(totals, maxima, has_critic=critic is not None) | {
            "policy/stopped_early": float(stopped),
            "policy/grad_norm": _grad_norm(self._models.actor.engine),
            "rollout/token_imbalance": imbalance(tokens, self._device),
        } | ({"value/grad_norm": _grad_norm(critic.engine)} if critic is not None else {})

    def mini_batches(self, batch: SequenceBatch, step: int) -> list[torch.Tensor]:
        """Which of this rank's responses each optimizer step of `step` learns from."""
        size = self._config.mini_batch_size // distributed.world_size()
        seeds = (
            step_seed(self._config.seed, step, distributed.rank(), epoch + 1)
            for epoch in range(self._config.ppo_epochs)
        )
        return [rows for seed in seeds for rows in mini_batches(batch, size, seed)]

    def _optimizer_step(
        self,
        step: int,
        rollout: Rollout,
        advantages: torch.Tensor,
        returns: torch.Tensor,
        rows: torch.Tensor,
        kl_coef: float,
        first: bool,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """One update of critic and actor from this rank's `rows`; sums and maxima in the order of `UPDATE_SUMS` and
        `UPDATE_MAXIMA`. The `first` one of a rollout also gives the old log-probs that are pending."""
        config = self._config
        blocks = micro_batches(rollout.batch, rows, config.micro_batch_size, config.micro_batch_tokens)
        tokens = token_denominator(rollout.batch.response_mask[rows])
        sums = dict.fromkeys(UPDATE_SUMS, torch.zeros((), dtype=torch.float64, device=self._device))
        maxima = dict.fromkeys(UPDATE_MAXIMA, torch.zeros((), device=self._device))
        sums["steps"] = sums["steps"] + 1
        self._models.actor.module.train()
        critic = self._models.critic
        if critic is not None:
            critic.module.train()
        for number, micro in enumerate(blocks, start=1):
            last = number == len(blocks)
            batch = rollout.batch.rows(micro)
            mask = batch.response_mask
            width = mask.shape[1]
            old_values, reference, sampled, micro_advantages, micro_returns = (
                tensor[micro, :width]
                for tensor in (
                    rollout.values, rollout.reference_logprobs, rollout.sampled_logprobs, advantages, returns
                )
            )
            sums["tokens"] = sums["tokens"] + mask.sum()
            if critic is not None:
                values = critic.engine(batch)
                value = value_loss(values, old_values, micro_returns, mask, config.value_clip_range, tokens)
                self._backward(critic.engine, value.loss, step, last)
                sums["value_loss"] = sums["value_loss"] + value.loss.detach()
                sums["value_clipped"] = sums["value_clipped"] + value.clipped
                if step < config.critic_warmup_steps:
                    continue
            actor = self._models.actor
            scores = response_scores(
                actor.engine, actor.module, batch, config.temperature, self._models.scoring, config.entropy_coef > 0
            )
            if first:
                pending = rollout.pending[micro]
                rollout.old_logprobs[micro[pending], :width] = scores.logprobs.detach()[pending]
                mismatch = torch.where(mask, (scores.logprobs.detach() - sampled).abs(), 0.0)
                sums["mismatch"] = sums["mismatch"] + mismatch.sum()
                sums["first_tokens"] = sums["first_tokens"] + mask.sum()
                maxima["mismatch"] = torch.maximum(maxima["mismatch"], mismatch.max())
            policy = policy_loss(
                scores.logprobs,
                rollout.old_logprobs[micro, :width],
                micro_advantages,
                mask,
                config.clip_range,
                tokens,
                config.clip_range_high,
                config.dual_clip,
            )
            loss = policy.loss + self._regularizer(scores, reference, mask, tokens, kl_coef)
            self._backward(actor.engine, loss, step, last)
            sums["policy_loss"] = sums["policy_loss"] + policy.loss.detach()
            sums["policy_clipped"] = sums["policy_clipped"] + policy.clipped
            sums["approx_kl"] = sums["approx_kl"] + policy.approx_kl
            sums["entropy"] = sums["entropy"] + scores.entropy.detach().sum()
            sums["policy_tokens"] = sums["policy_tokens"] + mask.sum()
            maxima["ratio"] = torch.maximum(maxima["ratio"], policy.max_ratio)
        return (
            torch.stack([sums[name].double() for name in UPDATE_SUMS]),
            torch.stack([maxima[name].float() for name in UPDATE_MAXIMA]),
        )

    def _regularizer(
        self, scores: TokenScores, reference: torch.Tensor, mask: torch.Tensor, tokens: torch.Tensor, kl_coef: float
    ) -> torch.Tensor | float:
        """What the policy's loss has besides PPO's: the KL, when it stands there, less the entropy bonus."""
        term: torch.Tensor | float = 0.0
        if self._config.kl_in == "loss":
            kl = kl_estimate(scores.logprobs, reference, mask, self._config.kl_estimator)
            term = term + kl_coef * kl.sum() / tokens
        if self._config.entropy_coef > 0:
            term = term - self._config.entropy_coef * torch.where(mask, scores.entropy, 0.0).sum() / tokens
        return term

    def _backward(self, engine: deepspeed.DeepSpeedEngine, loss: torch.Tensor, step: int, last: bool) -> None:
        """Backward pass and, with the last micro-batch, the optimizer's step. Raises `TrainingDiverged`."""
        # Before the gradients meet those of other ranks: a NaN must be seen where it arose, and by all ranks.
        check_finite(loss.detach(), step, "a loss")
        accumulate(engine, loss, last)


def check_finite(values: torch.Tensor, step: int, what: str) -> None:
    """Raise `TrainingDiverged` on all ranks when any of `values` on any rank is NaN or infinite."""
    bad = distributed.sum_over_ranks((~torch.isfinite(values)).sum())
    if bad > 0:
        raise TrainingDiverged(
            f"{what} is NaN or infinite at step {step}; the last checkpoint is kept. "
            "Lower the learning rates, or look at reward/* and kl/* in TensorBoard just before"
        )


def _mean_kl(sums: torch.Tensor) -> float:
    total = dict(zip(UPDATE_SUMS, distributed.sum_over_ranks(sums).tolist(), strict=True))
    return total["approx_kl"] / max(total["tokens"], 1.0)


def _grad_norm(engine: deepspeed.DeepSpeedEngine) -> float:
    """Norm of the last optimizer step's gradient before clipping; 0 before the first one."""
    norm = engine.get_global_grad_norm()
    norm = 0.0 if norm is None else float(norm)
    if not math.isfinite(norm):
        raise TrainingDiverged("a gradient is NaN or infinite; the last checkpoint is kept")
    return norm
