"""Which numbers answer which question: the charts of a report, and TensorBoard's tab "Custom scalars"."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Chart:
    """Curves that share an axis: `curves` maps a metric to its name in the legend; `reading` says how to read them."""

    title: str
    unit: str
    curves: Mapping[str, str]
    reading: str = ""


# Step 3's, by the question that a person has. What stands under judge/ is there only with --monitor,
# the value's loss, clipped tokens and gradient only with a critic.
QUESTIONS: dict[str, tuple[Chart, ...]] = {
    "Is it learning?": (
        Chart(
            "Reward of a response", "reward", {"reward/score_per_response": "scores alone",
                                               "reward/total_per_response": "less the KL's cost"},
            "Rises. Flat: the learning rate is too low or kl_coef too high.",
        ),
        Chart(
            "What the reward is made of", "reward a query",
            {"reward/model_per_query": "words", "reward/sentence_per_query": "whole query",
             "reward/length_penalty_per_query": "length penalty", "reward/guard_per_query": "list guards"},
            "Words and whole queries should carry the rise; the guards' cost goes to 0.",
        ),
        Chart(
            "Judged relevance of the rollouts", "share of queries", {"judge/relevance_rate": "relevant queries"},
            "Rises with the reward. Reward up and this down is over-optimisation.",
        ),
        Chart(
            "The critic's explained variance", "1 is perfect", {"value/explained_variance": "before the update"},
            "Above 0 after the warm-up. Below 0: longer critic_warmup_steps, more updates a rollout.",
        ),
    ),
    "Is it drifting?": (
        Chart(
            "KL to the reference", "nats a response", {"kl/per_sequence": "KL"},
            "Grows to some nats and levels off. Keeps growing: raise kl_coef, lower the learning rate.",
        ),
        Chart(
            "Entropy of the policy", "nats a token", {"policy/entropy": "entropy"},
            "Falls slowly. A cliff is a policy that says the same to everybody.",
        ),
        Chart(
            "Length of a query", "words", {"response/words_per_query": "words a query"},
            "Steady. Drifting up: length_alpha, normalise_rewards.",
        ),
        Chart("Length of a response", "tokens", {"response/tokens": "tokens, EOS included"}, "Steady."),
        Chart("The KL's price", "beta", {"kl/coef": "kl_coef"}, "Moves only with kl_target."),
    ),
    "Is it cheating?": (
        Chart(
            "Copies and repeats", "share",
            {"response/copy_rate": "queries copied from the history",
             "response/repeated_query_rate": "queries said before in the list",
             "response/repeated_word_rate": "words said before in the query"},
            "Steady or falling. Rising: the reward is paid for saying what was said already.",
        ),
        Chart(
            "Diversity", "distinct / all word pairs", {"response/distinct_2": "distinct-2"},
            "Falls somewhat. Falling on: everybody gets the same queries.",
        ),
        Chart(
            "Broken answers", "share of responses",
            {"response/format_error_rate": "format errors", "response/eos_rate": "ended by themselves"},
            "Errors fall, ends rise.",
        ),
        Chart("Function words", "share of words", {"response/function_word_rate": "the, of, for, ..."}, "Steady."),
        Chart(
            "Reward model less judge", "word score, 0..2",
            {"judge/word_gap": "mean gap", "judge/word_calibration_error": "calibration error"},
            "Near 0. Growing: the policy has found what the reward model overrates.",
        ),
    ),
    "Is it stable?": (
        Chart(
            "Clipped tokens", "share", {"policy/clip_fraction": "policy", "value/clip_fraction": "value"},
            "A few percent. Much more: updates too large for clip_range.",
        ),
        Chart("KL of an update", "nats a token", {"policy/approx_kl": "approx. KL"}, "Far below target_kl."),
        Chart("Largest ratio", "new / old probability", {"policy/max_ratio": "largest of a rollout"}, "Near 1."),
        Chart(
            "Gradient norms", "before clipping", {"policy/grad_norm": "policy", "value/grad_norm": "critic"},
            "No spikes, no growth.",
        ),
        Chart("Losses", "loss", {"loss/policy": "policy", "loss/value": "value"}, "The value's falls."),
        Chart(
            "Sampling against training", "nats a token",
            {"rollout/mismatch_mean": "mean", "rollout/mismatch_max": "largest"},
            "Rounding alone. Large: generation and training compute different log-probs.",
        ),
    ),
    "Speed": (
        Chart(
            "Seconds of a step", "seconds",
            {"seconds/step": "whole step", "seconds/generate": "generation", "seconds/update": "update",
             "seconds/actor_scoring": "actor's scores", "seconds/reference_critic_scoring": "reference, critic",
             "seconds/reward_scoring": "reward model", "seconds/switch": "gathering weights"},
        ),
        Chart(
            "Imbalance of ranks", "share of the mean",
            {"rollout/token_imbalance": "tokens of the longest rank above the mean"},
            "Near 0. The other ranks wait for the longest one in every mini-batch.",
        ),
        Chart(
            "Response tokens a second", "tokens / second",
            {"tokens_per_second/generate": "generation", "tokens_per_second/update": "update",
             "tokens_per_second/step": "whole step"},
        ),
    ),
}  # fmt: skip

STEP1 = (
    Chart("Loss", "nats a token", {"loss": "training", "eval_loss": "held-out users"},
          "Both fall. Held-out rising: fewer epochs, or a lower learning rate."),
    Chart("Perplexity of held-out users", "perplexity", {"eval_perplexity": "perplexity"}, "Falls."),
)  # fmt: skip

STEP2 = (
    Chart("Loss", "loss", {"loss": "training", "eval_loss": "held-out users"},
          "Held-out rising: the reward model learns its labels by heart."),
    Chart("Ranking of held-out words and queries", "AUC, 0.5 is chance",
          {"eval_word_auc": "words", "eval_sentence_auc": "whole queries"},
          "Well above 0.5: a policy can only learn what the reward model can tell apart."),
    Chart("Error of held-out query scores", "mean squared error", {"eval_sentence_mse": "queries"}, "Falls."),
)  # fmt: skip


def tensorboard_layout() -> dict[str, dict[str, list[Any]]]:
    """`QUESTIONS` as `SummaryWriter.add_custom_scalars` takes them; tags are regular expressions there."""
    return {
        question: {chart.title: ["Multiline", [f"^{tag}$" for tag in chart.curves]] for chart in charts}
        for question, charts in QUESTIONS.items()
    }
