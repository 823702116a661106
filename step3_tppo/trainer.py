"""Token-level PPO: roll out, estimate advantages, update actor and critic, again."""

from __future__ import annotations

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
from common.engine.offload import resting_optimizers
from common.engine.preemption import Preemption
from common.engine.watchdog import Watchdog
from common.errors import Preempted
from common.evaluation.summary import Row
from common.pages.sections import tensorboard_layout
from common.progress import progress
from common.tracking import Tracker
from step3_tppo.advantages import (
    generalized_advantages,
    group_advantages,
    line_steps,
    token_discounts,
    whiten,
)
from step3_tppo.batches import PromptSampler, step_seed
from step3_tppo.config import Step3Config
from step3_tppo.guards import RolloutGuard
from step3_tppo.kl_control import KLController
from step3_tppo.losses import kl_estimate
from step3_tppo.metrics import phase_metrics, position_profiles, rollout_metrics
from step3_tppo.models import Models
from step3_tppo.monitor import OverOptimisation, RolloutMonitor
from step3_tppo.normalisation import RewardNormaliser
from step3_tppo.rollout import Rollout, RolloutMaker
from step3_tppo.samples import SampleLog, chosen_samples
from step3_tppo.updates import Updater, check_finite


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
        self._update = Updater(config, models, device)
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
                self._prompts(step), self._seed(step), lambda batch: self._update.mini_batches(batch, step)[0]
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
        if self._models.critic is None:
            steps = line_steps(lines, mask)
            advantages, returns = group_advantages(rewards, mask, discounts, steps, config.samples_per_prompt)
        else:
            advantages, returns = generalized_advantages(rewards, rollout.values, mask, discounts, config.lam)
        baseline = returns - advantages
        scalars = rollout_metrics(rollout, returns, advantages, kl_penalty, config.num_queries)
        scalars["kl/coef"] = beta
        judged = None
        if self._monitor is not None:
            judge_scalars, judged = self._monitor(rollout)
            scalars |= judge_scalars
        check_finite(torch.stack([rewards.sum(), rollout.values[mask].sum()]), step, "a reward or a value")
        if config.whiten_advantages:
            advantages = whiten(advantages, mask)
        profiles = position_profiles(rewards, baseline, advantages, mask, config.max_response_tokens)
        begun = time.perf_counter()
        self._watchdog.phase("update", step)
        scalars |= self._update(step, rollout, advantages, returns, beta)
        seconds = rollout.seconds | {"update": time.perf_counter() - begun}
        scalars["policy/learning_rate"] = self._models.actor.engine.get_lr()[0]
        self._kl.update(scalars["kl/per_sequence"], config.rollout_batch_size * config.samples_per_prompt)
        return StepResult(scalars | phase_metrics(seconds, mask.sum().double()), profiles, rollout, judged)

    def _seed(self, step: int, *parts: int) -> int:
        return step_seed(self._config.seed, step, distributed.rank(), *parts)

    def _set_learning_rates(self, step: int) -> None:
        config = self._config
        factor = min(1.0, (step + 1) / (config.warmup_steps + 1))
        if config.lr_schedule == "linear":
            factor *= 1 - step / config.total_steps
        peaks = {"actor": config.actor_learning_rate, "critic": config.critic_learning_rate}
        for name, engine in self._engines().items():
            for group in engine.optimizer.param_groups:
                group["lr"] = peaks[name] * factor

    def _engines(self) -> dict[str, deepspeed.DeepSpeedEngine]:
        hybrids = {"actor": self._models.actor, "critic": self._models.critic}
        return {name: hybrid.engine for name, hybrid in hybrids.items() if hybrid is not None}

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
