"""Token-level PPO: roll out, estimate advantages, update actor and critic, again."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import deepspeed
import torch
from tqdm import tqdm

from common.data.records import Example
from common.engine import checkpoint, distributed
from common.engine.accumulation import accumulate, micro_batches
from common.engine.offload import resting_optimizers
from common.engine.preemption import Preemption
from common.engine.watchdog import Watchdog
from common.errors import Preempted, TrainingDiverged
from common.evaluation.summary import Row
from common.models.response_scores import TokenScores, response_scores
from common.models.sequences import SequenceBatch
from common.pages.sections import tensorboard_layout
from common.progress import phase_progress, progress
from common.tracking import Tracker
from step3_tppo.advantages import generalized_advantages, token_discounts, whiten
from step3_tppo.batches import PromptSampler, mini_batches, step_seed
from step3_tppo.config import Step3Config
from step3_tppo.guards import RolloutGuard
from step3_tppo.kl_control import KLController
from step3_tppo.losses import kl_estimate, policy_loss, token_denominator, value_loss
from step3_tppo.metrics import (
    UPDATE_MAXIMA,
    UPDATE_SUMS,
    imbalance,
    phase_metrics,
    position_profiles,
    rollout_metrics,
    update_metrics,
)
from step3_tppo.models import Models
from step3_tppo.monitor import OverOptimisation, RolloutMonitor
from step3_tppo.normalisation import RewardNormaliser
from step3_tppo.rollout import Rollout, RolloutMaker
from step3_tppo.samples import SampleLog, chosen_samples


class StepResult(NamedTuple):
    """What a step leaves to be logged: numbers, lists along the places of a response, and the rollout itself with the
    monitor's scores of its responses, if there is one."""

    scalars: dict[str, float]
    profiles: dict[str, list[float]]
    rollout: Rollout
    judged: list[Row] | None


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
        monitor: RolloutMonitor | None = None,
    ) -> None:
        self._config = config
        self._models = models
        self._make_rollout = make_rollout
        self._prompts = PromptSampler(examples, config.rollout_batch_size, config.seed, make_rollout.prompt_tokens)
        self._device = device
        self._kl = KLController(config.kl_coef, config.kl_target, config.kl_horizon)
        self._normalise = RewardNormaliser(config.reward_norm, config.max_response_tokens)
        self._checkpoints = Path(config.output_dir) / "checkpoints"
        self._monitor = monitor
        self._over_optimised = OverOptimisation(config.monitor_margin)
        self._scores: list[float] = []  # of the steps since the last checkpoint, which their mean tells from the best
        self._guard = RolloutGuard(config.max_kl)
        self._watchdog = Watchdog(config.output_dir, config.hang_timeout)

    def train(self) -> None:
        """Run to `total_steps`, from the newest checkpoint if there is one.

        Raises `TrainingDiverged`, `SaveFailed`, and `Preempted` once a signal has asked for a stop and all is saved.
        """
        first = self._resume()
        tracker = Tracker(
            self._config.output_dir, tensorboard=self._config.tensorboard, first_step=first, layout=tensorboard_layout()
        )
        samples = SampleLog(self._config.output_dir, first)
        bar = progress(total=self._config.total_steps, initial=first, desc="step 3: TPPO")
        try:
            with Preemption() as preemption, self._watchdog:
                for step in range(first, self._config.total_steps):
                    if self._over_optimised.found():
                        bar.write(f"stopped after {step} steps: the judge's relevance fell while the reward did not")
                        break
                    self._set_learning_rates(step)
                    result = self.step(step)
                    self._log(step, result, tracker, samples)
                    self._warn(bar, self._guard.check(step, result.scalars))
                    self._learn(result.scalars)
                    score, kl = (result.scalars[name] for name in ("reward/score_per_response", "kl/per_sequence"))
                    bar.set_postfix_str(f"score {score:+.2f}  kl {kl:.2f}")
                    bar.update()
                    asked = preemption.requested()
                    last = step + 1 == self._config.total_steps or self._over_optimised.found()
                    if last or asked or (step + 1) % self._config.save_steps == 0:
                        self._save(step + 1)
                    if asked and not last:
                        raise Preempted(f"saved after step {step + 1}")
        finally:
            bar.close()
            tracker.close()

    def _warn(self, bar: tqdm, warnings: Sequence[str]) -> None:
        if distributed.rank() == 0:
            for warning in warnings:
                bar.write(f"warning: {warning}")

    def _log(self, step: int, result: StepResult, tracker: Tracker, samples: SampleLog) -> None:
        tracker.scalars(step, result.scalars)
        tracker.profiles(step, result.profiles)
        if step % self._config.sample_steps == 0 and distributed.rank() == 0:
            samples.show(step, chosen_samples(step, result.rollout, result.judged), tracker)

    def _learn(self, scalars: dict[str, float]) -> None:
        """Take a step's reward, and the judge's relevance where there is one, into what decides on stops and on the
        best checkpoint."""
        reward = scalars["reward/score_per_response"]
        if self._monitor is not None:
            self._over_optimised.learn(scalars["judge/relevance_rate"], reward)
        self._scores.append(scalars.get("judge/relevance_rate", reward))

    def step(self, step: int) -> StepResult:
        """The rollout with this number and its updates; returns what to log. Every rank must call it."""
        config = self._config
        self._watchdog.phase("rollout", step)
        with resting_optimizers(*self._engines().values()) if config.offload_states else nullcontext():
            rollout = self._make_rollout(
                self._prompts(step), self._seed(step), lambda batch: self._mini_batches(batch, step)[0]
            )
        mask = rollout.batch.response_mask
        beta = self._kl.coef
        kl_penalty = torch.zeros_like(rollout.rewards)
        if config.kl_in == "reward":
            kl = kl_estimate(rollout.old_logprobs, rollout.reference_logprobs, mask, config.kl_estimator)
            kl_penalty = -beta * kl
        rewards = config.reward_scale * self._normalise(rollout.rewards, mask) + kl_penalty
        lines = [part.query_of_token for part in rollout.parts]
        discounts = token_discounts(lines, rollout.values, config.gamma, config.line_gamma)
        advantages, returns = generalized_advantages(rewards, rollout.values, mask, discounts, config.lam)
        scalars = rollout_metrics(rollout, returns, advantages, kl_penalty, config.num_queries)
        scalars["kl/coef"] = beta
        judged = None
        if self._monitor is not None:
            judge_scalars, judged = self._monitor(rollout)
            scalars |= judge_scalars
        _check_finite(torch.stack([rewards.sum(), rollout.values[mask].sum()]), step, "a reward or a value")
        if config.whiten_advantages:
            advantages = whiten(advantages, mask)
        profiles = position_profiles(rewards, rollout.values, advantages, mask, config.max_response_tokens)
        begun = time.perf_counter()
        self._watchdog.phase("update", step)
        scalars |= self._update(step, rollout, advantages, returns)
        seconds = rollout.seconds | {"update": time.perf_counter() - begun}
        scalars["policy/learning_rate"] = self._models.actor.engine.get_lr()[0]
        self._kl.update(scalars["kl/per_sequence"], config.rollout_batch_size * config.samples_per_prompt)
        return StepResult(scalars | phase_metrics(seconds, mask.sum().double()), profiles, rollout, judged)

    def _update(
        self, step: int, rollout: Rollout, advantages: torch.Tensor, returns: torch.Tensor
    ) -> dict[str, float]:
        """All optimizer steps on one rollout; stops early, on all ranks, once `target_kl` is exceeded."""
        config = self._config
        totals = torch.zeros(len(UPDATE_SUMS), dtype=torch.float64, device=self._device)
        maxima = torch.zeros(len(UPDATE_MAXIMA), device=self._device)
        stopped = False
        chosen = self._mini_batches(rollout.batch, step)
        with phase_progress(total=config.ppo_epochs * len(advantages), desc="update", unit="response") as bar:
            for number, rows in enumerate(chosen):
                sums, highest = self._optimizer_step(step, rollout, advantages, returns, rows, first=number == 0)
                totals += sums
                maxima = torch.maximum(maxima, highest)
                bar.update(len(rows))
                stopped = config.target_kl > 0 and _mean_kl(sums) > config.target_kl
                if stopped:
                    break
        tokens = [sum(rollout.batch.token_counts(rollout.batch.groups(rows))) for rows in chosen]
        return update_metrics(totals, maxima) | {
            "policy/stopped_early": float(stopped),
            "policy/grad_norm": _grad_norm(self._models.actor.engine),
            "value/grad_norm": _grad_norm(self._models.critic.engine),
            "rollout/token_imbalance": imbalance(tokens, self._device),
        }

    def _mini_batches(self, batch: SequenceBatch, step: int) -> list[torch.Tensor]:
        """Which of this rank's responses each optimizer step of `step` learns from."""
        size = self._config.mini_batch_size // distributed.world_size()
        epochs = (self._seed(step, epoch + 1) for epoch in range(self._config.ppo_epochs))
        return [rows for seed in epochs for rows in mini_batches(batch, size, seed)]

    def _optimizer_step(
        self,
        step: int,
        rollout: Rollout,
        advantages: torch.Tensor,
        returns: torch.Tensor,
        rows: torch.Tensor,
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
        self._models.critic.module.train()
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
            values = self._models.critic.engine(batch)
            critic = value_loss(values, old_values, micro_returns, mask, config.value_clip_range, tokens)
            self._backward(self._models.critic.engine, critic.loss, step, last)
            sums["tokens"] = sums["tokens"] + mask.sum()
            sums["value_loss"] = sums["value_loss"] + critic.loss.detach()
            sums["value_clipped"] = sums["value_clipped"] + critic.clipped
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
            self._backward(actor.engine, policy.loss + self._regulariser(scores, reference, mask, tokens), step, last)
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

    def _regulariser(
        self, scores: TokenScores, reference: torch.Tensor, mask: torch.Tensor, tokens: torch.Tensor
    ) -> torch.Tensor | float:
        """What the policy's loss has besides PPO's: the KL, when it stands there, less the entropy bonus."""
        term: torch.Tensor | float = 0.0
        if self._config.kl_in == "loss":
            kl = kl_estimate(scores.logprobs, reference, mask, self._config.kl_estimator)
            term = term + self._kl.coef * kl.sum() / tokens
        if self._config.entropy_coef > 0:
            term = term - self._config.entropy_coef * torch.where(mask, scores.entropy, 0.0).sum() / tokens
        return term

    def _backward(self, engine: deepspeed.DeepSpeedEngine, loss: torch.Tensor, step: int, last: bool) -> None:
        """Backward pass and, with the last micro-batch, the optimiser's step. Raises `TrainingDiverged`."""
        # Before the gradients meet those of other ranks: a NaN must be seen where it arose, and by all ranks.
        _check_finite(loss.detach(), step, "a loss")
        accumulate(engine, loss, last)

    def _seed(self, step: int, *parts: int) -> int:
        return step_seed(self._config.seed, step, distributed.rank(), *parts)

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
        state = {
            "kl_coef": self._kl.coef,
            "reward_sums": self._normalise.state(),
            "monitored": self._over_optimised.state(),
        }
        self._watchdog.phase("checkpoint", step - 1)
        score, self._scores = statistics.fmean(self._scores), []
        checkpoint.save_checkpoint(
            self._checkpoints, step, self._engines(), state, self._config.keep_checkpoints, score
        )

    def _resume(self) -> int:
        found = checkpoint.newest_checkpoint(self._checkpoints)
        if found is None:
            return 0
        state: dict[str, Any] = checkpoint.load_checkpoint(found, self._engines())
        self._kl.coef = state["kl_coef"]
        self._normalise.restore(state["reward_sums"])
        self._over_optimised.restore(state["monitored"])
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
