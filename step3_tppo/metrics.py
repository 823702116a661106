"""What is logged of a rollout and of its updates, each number reduced over all ranks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import chain

import torch

from common.engine.distributed import gather_from_ranks, max_over_ranks, sum_over_ranks, world_size
from common.evaluation.metrics import copy_counts, distinct_n, has_format_error, word_counts
from common.text import normalise, split_queries
from step3_tppo.normalisation import ROUNDING
from step3_tppo.rollout import Rollout, part_tensor

REWARD_PARTS = ("model", "sentence", "length_penalty", "guard")
UPDATE_SUMS = (
    "policy_loss", "value_loss", "policy_clipped", "value_clipped", "approx_kl", "tokens", "steps", "entropy",
    "policy_tokens", "mismatch", "first_tokens",
)  # fmt: skip
UPDATE_MAXIMA = ("ratio", "mismatch")


def rollout_metrics(
    rollout: Rollout, returns: torch.Tensor, advantages: torch.Tensor, kl_penalty: torch.Tensor, k: int
) -> dict[str, float]:
    """Scalars of one rollout: rewards and their parts per token, per query and per response, KL, lengths, formats.

    `returns`, `advantages` (before whitening) and `kl_penalty`, the KL's part of the reward, are (B, T); `k` is the
    number of queries asked for. Explained variance is that of the baseline, a critic's before its update.
    `response/distinct_2`, 0 for a rollout without a bigram, is comparable between rollouts of the same size alone.
    """
    mask = rollout.batch.response_mask
    responses = [split_queries(response.text) for response in rollout.generated]
    queries = [normalise(query) for response in responses for query in response]
    copied = [
        copy_counts(lines, example.searched, k) for lines, example in zip(responses, rollout.examples, strict=True)
    ]
    sums = {name: part_tensor(rollout, name)[mask].sum() for name in REWARD_PARTS} | {
        "kl_penalty": kl_penalty[mask].sum(),
        "kl": rollout.kl[mask].sum(),
        "tokens": mask.sum(),
        "responses": len(mask),
        "queries": len(queries),
        "finished": sum(response.finished for response in rollout.generated),
        "format_errors": sum(
            has_format_error(lines, generated.finished, k)
            for lines, generated in zip(responses, rollout.generated, strict=True)
        ),
        "repeats": sum(len(response) - len(set(map(normalise, response))) for response in responses),
        "copied_queries": sum(copies for copies, _ in copied),
        "written_queries": sum(written for _, written in copied),
        "words": sum(len(query.split()) for query in queries),
        "word_scores": sum(score for scores in rollout.word_scores for score in scores),
        "word_squares": sum(score * score for scores in rollout.word_scores for score in scores),
        "scored_words": sum(map(len, rollout.word_scores)),
        **dict(zip(("counted_words", "repeated_words", "function_words"), word_counts(responses, k), strict=True)),
    }
    total = _summed(sums)
    tokens, count = max(total["tokens"], 1.0), max(total["responses"], 1.0)
    lines = max(total["queries"], 1.0)
    scored = max(total["scored_words"], 1.0)
    variance = total["word_squares"] / scored - (total["word_scores"] / scored) ** 2
    metrics = {f"reward/{name}_per_token": total[name] / tokens for name in (*REWARD_PARTS, "kl_penalty")}
    metrics |= {f"reward/{name}_per_query": total[name] / lines for name in (*REWARD_PARTS, "kl_penalty")}
    metrics |= {
        "reward/score_per_response": sum(total[name] for name in REWARD_PARTS) / count,
        "reward/total_per_response": sum(total[name] for name in (*REWARD_PARTS, "kl_penalty")) / count,
        "reward/word_score_std": math.sqrt(max(variance, 0.0)),
        "kl/per_token": total["kl"] / tokens,
        "kl/per_sequence": total["kl"] / count,
        "response/tokens": total["tokens"] / count,
        "response/queries": total["queries"] / count,
        "response/words_per_query": total["words"] / lines,
        "response/eos_rate": total["finished"] / count,
        "response/format_error_rate": total["format_errors"] / count,
        "response/repeated_query_rate": total["repeats"] / lines,
        "response/copy_rate": total["copied_queries"] / max(total["written_queries"], 1.0),
        "response/distinct_2": distinct_n(chain.from_iterable(gather_from_ranks(responses)), 2, k) or 0.0,
        "response/repeated_word_rate": total["repeated_words"] / max(total["counted_words"], 1.0),
        "response/function_word_rate": total["function_words"] / max(total["counted_words"], 1.0),
    }
    return metrics | _value_metrics(returns, advantages, mask)


def update_metrics(totals: torch.Tensor, maxima: torch.Tensor, has_critic: bool) -> dict[str, float]:
    """Scalars of a rollout's updates from this rank's sums and maxima, in the order of `UPDATE_SUMS` and
    `UPDATE_MAXIMA`.

    Without a critic there is no `loss/value` and no `value/clip_fraction`. `rollout/mismatch_*` is the distance between
    the log-probs of sampling and those of the first optimizer step, whose policy is the same. It and the entropy are
    left out of a step that updates the critic alone.
    """
    sums = dict(zip(UPDATE_SUMS, sum_over_ranks(totals).tolist(), strict=True))
    highest = dict(zip(UPDATE_MAXIMA, max_over_ranks(maxima).tolist(), strict=True))
    tokens = max(sums["tokens"], 1.0)
    steps = max(sums["steps"] / world_size(), 1.0)
    metrics = {
        "loss/policy": sums["policy_loss"] / world_size() / steps,
        "policy/clip_fraction": sums["policy_clipped"] / tokens,
        "policy/approx_kl": sums["approx_kl"] / tokens,
        "policy/max_ratio": highest["ratio"],
        "policy/optimizer_steps": steps,
    }
    if has_critic:
        metrics |= {
            "loss/value": sums["value_loss"] / world_size() / steps,
            "value/clip_fraction": sums["value_clipped"] / tokens,
        }
    if sums["policy_tokens"]:
        metrics |= {
            "policy/entropy": sums["entropy"] / sums["policy_tokens"],
            "rollout/mismatch_mean": sums["mismatch"] / sums["first_tokens"],
            "rollout/mismatch_max": highest["mismatch"],
        }
    return metrics


def imbalance(tokens: Sequence[int], device: torch.device) -> float:
    """By what share the rank with most tokens has more than the mean rank, averaged over mini-batches.

    `tokens` are this rank's in each mini-batch, a shared prompt counted once. 0: no rank waits for another.
    """
    counts = torch.tensor(tokens, dtype=torch.float64, device=device)
    return float((max_over_ranks(counts) * world_size() / sum_over_ranks(counts) - 1).mean())


def phase_metrics(seconds: dict[str, float], tokens: torch.Tensor) -> dict[str, float]:
    """Seconds of each phase on the slowest rank, and response tokens a second over all ranks."""
    names = sorted(seconds)
    slowest = max_over_ranks(torch.tensor([seconds[name] for name in names], device=tokens.device)).tolist()
    metrics = {f"seconds/{name}": value for name, value in zip(names, slowest, strict=True)}
    metrics["seconds/step"] = sum(slowest)
    all_tokens = float(sum_over_ranks(tokens))
    throughput = {
        f"tokens_per_second/{name}": all_tokens / metrics[f"seconds/{name}"] for name in ("generate", "update", "step")
    }
    return metrics | throughput


def position_profiles(
    rewards: torch.Tensor, values: torch.Tensor, advantages: torch.Tensor, mask: torch.Tensor, max_tokens: int
) -> dict[str, list[float]]:
    """Where credit falls: at each place of a response the `tokens` there, and over them the means of `reward`, `value`
    and `credit`, the advantage's magnitude; lists of `max_tokens`. All tensors are (B, T); every rank must call it."""
    columns = [torch.where(mask, row, 0).double().sum(0) for row in (mask, rewards, values, advantages.abs())]
    places = torch.zeros(len(columns), max_tokens, dtype=torch.float64, device=mask.device)
    places[:, : mask.shape[1]] = torch.stack(columns)
    tokens, *sums = sum_over_ranks(places)
    names = ("reward", "value", "credit")
    means = {name: (total / tokens.clamp(min=1)).tolist() for name, total in zip(names, sums, strict=True)}
    return {"tokens": tokens.tolist(), **means}


def _value_metrics(returns: torch.Tensor, advantages: torch.Tensor, mask: torch.Tensor) -> dict[str, float]:
    """Means and deviations over the tokens of all ranks, and `1 - Var[advantages] / Var[returns]`: advantages are what
    the baseline leaves of the returns."""
    columns = {"returns": returns[mask], "advantages": advantages[mask]}
    columns = {name: column.double() for name, column in columns.items()}
    moments = _summed(
        {"tokens": mask.sum()}
        | {f"{name}_sum": column.sum() for name, column in columns.items()}
        | {f"{name}_squares": column.square().sum() for name, column in columns.items()}
    )
    count = max(moments["tokens"], 1.0)
    mean = {name: moments[f"{name}_sum"] / count for name in columns}
    variance = {name: max(moments[f"{name}_squares"] / count - mean[name] ** 2, 0.0) for name in columns}
    differ = variance["returns"] > ROUNDING**2 * moments["returns_squares"] / count
    explained = 1 - variance["advantages"] / variance["returns"] if differ else 0.0
    return {
        "value/explained_variance": explained,
        "value/returns_mean": mean["returns"],
        "value/returns_std": variance["returns"] ** 0.5,
        "policy/advantages_mean": mean["advantages"],
        "policy/advantages_std": variance["advantages"] ** 0.5,
    }


def _summed(values: dict[str, torch.Tensor | float]) -> dict[str, float]:
    device = next((value.device for value in values.values() if isinstance(value, torch.Tensor)), torch.device("cpu"))
    numbers = torch.tensor([float(value) for value in values.values()], dtype=torch.float64, device=device)
    totals = sum_over_ranks(numbers)
    return dict(zip(values, totals.tolist(), strict=True))
