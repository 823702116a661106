"""Token-level PPO: roll out, estimate advantages, update actor and critic, again."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import deepspeed
import torch

from common.data.records import Example
from common.engine import checkpoint, distributed
from common.errors import TrainingDiverged
from common.models.sequences import response_scores
from common.tracking import Tracker, progress
from step3_tppo.advantages import generalized_advantages, whiten
from step3_tppo.config import Step3Config
from step3_tppo.losses import policy_loss, token_denominator, value_loss
from step3_tppo.metrics import UPDATE_SUMS, phase_metrics, rollout_metrics, samples_markdown, update_metrics
from step3_tppo.models import Models
from step3_tppo.rollout import Rollout, RolloutMaker

MAX_SEED = 2**31


class TPPOTrainer:
    """Owns the loop and its state: the step number is all that a resumed run needs besides weights and optimisers,
    because the order of prompts and every seed follow from it and `config.seed`.
    """

    def __init__(
        self,
        config: Step3Config,
        models: Models,
        make_rollout: RolloutMaker,
        examples: Sequence[Example],
        device: torch.device,
    ) -> None:
        self._config = config
        self._models = models
        self._make_rollout = make_rollout
        self._examples = examples
        self._device = device
        self._checkpoints = Path(config.output_dir) / "checkpoints"
        self._order_made: tuple[int, list[int]] = (-1, [])

    def train(self) -> None:
        """Run to `total_steps`, from the newest checkpoint if there is one. Raises `TrainingDiverged`."""
        first = self._resume()
        tracker = Tracker(self._config.output_dir, tensorboard=self._config.tensorboard, first_step=first)
        bar = progress(total=self._config.total_steps, initial=first, desc="step 3: TPPO")
        try:
            for step in range(first, self._config.total_steps):
                self._set_learning_rates(step)
                scalars, rollout = self._step(step)
                tracker.scalars(step, scalars)
                if step % self._config.sample_steps == 0:
                    tracker.text(step, "samples", samples_markdown(rollout))
                bar.set_postfix_str(
                    f"score {scalars['reward/score_per_response']:+.2f}  kl {scalars['kl/per_sequence']:.2f}"
                )
                bar.update()
                if (step + 1) % self._config.save_steps == 0 or step + 1 == self._config.total_steps:
                    self._save(step + 1)
        finally:
            bar.close()
            tracker.close()

    def _step(self, step: int) -> tuple[dict[str, float], Rollout]:
        """One rollout and its updates; returns what to log."""
        config = self._config
        rollout = self._make_rollout(self._examples_of(step), seed=self._seed(step, distributed.rank()))
        mask = rollout.batch.response_mask
        rewards = rollout.rewards - config.kl_coef * rollout.kl
        advantages, returns = generalized_advantages(rewards, rollout.values, mask, config.gamma, config.lam)
        scalars = rollout_metrics(rollout, returns, advantages, config.kl_coef, config.num_queries)
        _check_finite(torch.stack([rewards.sum(), rollout.values[mask].sum()]), step, "a reward or a value")
        if config.whiten_advantages:
            advantages = whiten(advantages, mask)
        begun = time.perf_counter()
        scalars |= self._update(step, rollout, advantages, returns)
        seconds = rollout.seconds | {"update": time.perf_counter() - begun}
        scalars["policy/learning_rate"] = self._models.actor.engine.get_lr()[0]
        return scalars | phase_metrics(seconds, mask.sum().double()), rollout

    def _update(
        self, step: int, rollout: Rollout, advantages: torch.Tensor, returns: torch.Tensor
    ) -> dict[str, float]:
        """All optimiser steps on one rollout; stops early, on all ranks, once `target_kl` is exceeded."""
        config = self._config
        per_rank = config.mini_batch_size // distributed.world_size()
        totals = torch.zeros(len(UPDATE_SUMS), dtype=torch.float64, device=self._device)
        max_ratio = torch.zeros((), device=self._device)
        stopped = False
        for epoch in range(config.ppo_epochs):
            generator = torch.Generator().manual_seed(self._seed(step, distributed.rank(), epoch + 1))
            order = torch.randperm(len(advantages), generator=generator)
            for start in range(0, len(order), per_rank):
                rows = order[start : start + per_rank]
                sums, ratio = self._optimizer_step(step, rollout, advantages, returns, rows)
                totals += sums
                max_ratio = torch.maximum(max_ratio, ratio)
                stopped = config.target_kl > 0 and _mean_kl(sums) > config.target_kl
                if stopped:
                    break
            if stopped:
                break
        return update_metrics(totals, max_ratio) | {
            "policy/stopped_early": float(stopped),
            "policy/grad_norm": _grad_norm(self._models.actor.engine),
            "value/grad_norm": _grad_norm(self._models.critic.engine),
        }

    def _optimizer_step(
        self, step: int, rollout: Rollout, advantages: torch.Tensor, returns: torch.Tensor, rows: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """One update of critic and actor from this rank's `rows`; sums in the order of `UPDATE_SUMS`, largest ratio."""
        config = self._config
        micro_batches = rows.to(self._device).split(config.micro_batch_size)
        tokens = token_denominator(rollout.batch.response_mask[rows], len(micro_batches))
        sums = dict.fromkeys(UPDATE_SUMS, torch.zeros((), dtype=torch.float64, device=self._device))
        sums["steps"] = sums["steps"] + 1
        max_ratio = torch.zeros((), device=self._device)
        self._models.actor.module.train()
        self._models.critic.module.train()
        for micro in micro_batches:
            batch = rollout.batch.rows(micro)
            mask = batch.response_mask
            old_values, old_logprobs, micro_advantages, micro_returns = (
                tensor[micro, : mask.shape[1]]
                for tensor in (rollout.values, rollout.old_logprobs, advantages, returns)
            )
            values = self._models.critic.engine(batch)
            critic = value_loss(values, old_values, micro_returns, mask, config.value_clip_range, tokens)
            self._backward(self._models.critic.engine, critic.loss, step)
            sums["tokens"] = sums["tokens"] + mask.sum()
            sums["value_loss"] = sums["value_loss"] + critic.loss.detach() / len(micro_batches)
            sums["value_clipped"] = sums["value_clipped"] + critic.clipped
            if step < config.critic_warmup_steps:
                continue
            actor = self._models.actor
            scores = response_scores(actor.engine, actor.module, batch, config.temperature)
            policy = policy_loss(scores.logprobs, old_logprobs, micro_advantages, mask, config.clip_range, tokens)
            self._backward(actor.engine, policy.loss, step)
            sums["policy_loss"] = sums["policy_loss"] + policy.loss.detach() / len(micro_batches)
            sums["policy_clipped"] = sums["policy_clipped"] + policy.clipped
            sums["approx_kl"] = sums["approx_kl"] + policy.approx_kl
            max_ratio = torch.maximum(max_ratio, policy.max_ratio)
        return torch.stack([sums[name].double() for name in UPDATE_SUMS]), max_ratio

    def _backward(self, engine: deepspeed.DeepSpeedEngine, loss: torch.Tensor, step: int) -> None:
        """Backward pass and, at the end of the accumulation, the optimiser's step. Raises `TrainingDiverged`."""
        # Before the gradients meet those of other ranks: a NaN must be seen where it arose, and by all ranks.
        _check_finite(loss.detach(), step, "a loss")
        engine.backward(loss)
        engine.step()

    def _examples_of(self, step: int) -> list[Example]:
        """This rank's share of the prompts of `step`: epochs over all examples, each in its own random order."""
        size = self._config.rollout_batch_size
        picked = []
        for position in range(step * size, (step + 1) * size):
            epoch, place = divmod(position, len(self._examples))
            picked.append(self._examples[self._order(epoch)[place]])
        return picked[distributed.rank() :: distributed.world_size()]

    def _order(self, epoch: int) -> list[int]:
        """The examples' order in `epoch`; the last one made is kept, because a step asks for it at every prompt."""
        if self._order_made[0] != epoch:
            generator = torch.Generator().manual_seed(self._seed(-1, epoch))
            self._order_made = (epoch, torch.randperm(len(self._examples), generator=generator).tolist())
        return self._order_made[1]

    def _seed(self, *parts: int) -> int:
        """A seed that differs between steps, ranks and epochs and repeats in a resumed run."""
        return hash((self._config.seed, *parts)) % MAX_SEED

    def _set_learning_rates(self, step: int) -> None:
        config = self._config
        factor = min(1.0, (step + 1) / (config.warmup_steps + 1))
        if config.lr_schedule == "linear":
            factor *= 1 - step / config.total_steps
        peaks = (config.actor_learning_rate, config.critic_learning_rate)
        for engine, peak in zip(self._engines().values(), peaks, strict=True):
            for group in engine.optimizer.param_groups:
                group["lr"] = peak * factor

    def _engines(self) -> dict[str, deepspeed.DeepSpeedEngine]:
        return {"actor": self._models.actor.engine, "critic": self._models.critic.engine}

    def _save(self, step: int) -> None:
        checkpoint.save_checkpoint(self._checkpoints, step, self._engines(), {}, self._config.keep_checkpoints)

    def _resume(self) -> int:
        found = checkpoint.list_checkpoints(self._checkpoints)
        if not found:
            return 0
        state: dict[str, Any] = checkpoint.load_checkpoint(found[-1], self._engines())
        return state["step"]


def _check_finite(values: torch.Tensor, step: int, what: str) -> None:
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
    """Norm of the last optimiser step's gradient before clipping; 0 before the first one."""
    norm = engine.get_global_grad_norm()
    norm = 0.0 if norm is None else float(norm)
    if not math.isfinite(norm):
        raise TrainingDiverged("a gradient is NaN or infinite; the last checkpoint is kept")
    return norm
