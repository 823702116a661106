"""What makes a rollout useless, seen from numbers that all ranks share, so that all ranks decide alike."""

from __future__ import annotations

from collections.abc import Mapping

from common.errors import TrainingDiverged

CONSTANT_STD = 1e-4  # of word scores on the scale 0..2: below it the reward model tells no word from another

# A condition by the metric that shows it, and what to look at.
_WARNINGS = {
    "no response has ended": (
        lambda scalars: scalars["response/eos_rate"] == 0.0,
        "raise --max_response_tokens, or train step 1 longer: PPO learns from cut-off answers alone",
    ),
    "no response holds a word": (
        lambda scalars: scalars["response/words_per_query"] == 0.0,
        "look at the pages in samples/: the policy has collapsed, or the actor's tokenizer is not its own",
    ),
    "the reward model gives every word the same score": (
        lambda scalars: scalars["reward/word_score_std"] < CONSTANT_STD,
        "look at eval/word_auc of step 2: there is nothing to learn from such rewards",
    ),
}


class RolloutGuard:
    """Stops a run whose KL explodes, and says once when a rollout can teach nothing; see `_WARNINGS`."""

    def __init__(self, max_kl: float) -> None:
        self._max_kl = max_kl
        self._present: set[str] = set()

    def check(self, step: int, scalars: Mapping[str, float]) -> list[str]:
        """What is newly wrong with the rollout of `step`; a condition is told again only after it has ended.

        Raises `TrainingDiverged` once the mean KL of a response exceeds `max_kl` nats (0: never).
        """
        kl = scalars["kl/per_sequence"]
        if 0 < self._max_kl < kl:
            raise TrainingDiverged(
                f"the KL to the reference is {kl:.1f} nats a response at step {step}, above --max_kl {self._max_kl:g}; "
                "the last checkpoint is kept. Raise --kl_coef, lower --actor_learning_rate or --reward_scale, or set "
                "--target_kl; kl/* and policy/max_ratio in TensorBoard show when it began"
            )
        found = {name for name, (holds, _) in _WARNINGS.items() if holds(scalars)}
        new = [f"{name} in the rollout of step {step}: {_WARNINGS[name][1]}" for name in sorted(found - self._present)]
        self._present = found
        return new
