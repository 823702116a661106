"""From records to numbers: means over seeds, paired differences over seeds and users, how soon a level is reached."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from itertools import permutations
from typing import Any

import numpy as np

from common.evaluation.statistics import Estimate, crossed_estimate, t_estimate, wilson_estimate
from study.records import unpack
from study.settings import CONTROLS, SYSTEMS

RESAMPLES = 4000
BOOTSTRAP_SEED = 0
MAIN_JUDGE = "simulated"
SMOOTHING = 5  # rollouts' steps in a running mean of a training curve
ROLLOUT_SIZE = 64

Record = dict[str, Any]
# axis -> system -> seed -> record
Runs = dict[str, dict[str, dict[int, Record]]]


def group_runs(records: Mapping[str, Record]) -> Runs:
    """The measured records by axis, system and seed."""
    runs: Runs = defaultdict(lambda: defaultdict(dict))
    for name, record in records.items():
        if "decodings" in record:
            axis, seed, system = name.split("/")
            runs[axis][system][int(seed.removeprefix("s"))] = record
    return {axis: dict(systems) for axis, systems in runs.items()}


def summarise_axis(systems: Mapping[str, Mapping[int, Record]], judge: str = MAIN_JUDGE) -> dict[str, Any]:
    """`{"systems", "differences", "controls"}` of one axis; sampled decoding stands on top, greedy beside it."""
    shown = {name: seeds for name, seeds in systems.items() if name not in CONTROLS}
    ordered = sorted(shown, key=lambda name: SYSTEMS.index(name) if name in SYSTEMS else len(SYSTEMS))
    return {
        "systems": {name: summarise_system(shown[name], judge) for name in ordered},
        "differences": {
            f"{a}_minus_{b}": both_decodings(shown[a], shown[b], judge) for a, b in permutations(ordered, 2)
            if set(shown[a]) & set(shown[b])
        },
        "controls": {name: control_summary(systems[name], judge) for name in CONTROLS if name in systems},
    }  # fmt: skip


def summarise_system(seeds: Mapping[int, Record], judge: str) -> dict[str, Any]:
    """`{measure: {mean, low, high, seeds}}` over seeds, of sampled decoding, of greedy under `greedy`, and the KL."""
    of_decoding = {
        decoding: {
            name: over_seeds([record["decodings"][decoding][judge]["means"][name] for record in seeds.values()])
            for name in next(iter(seeds.values()))["decodings"][decoding][judge]["means"]
        }
        for decoding in ("sampled", "greedy")
    }
    kl = over_seeds([record["kl"] for record in seeds.values()])
    return {**of_decoding["sampled"], "kl": kl, "greedy": of_decoding["greedy"]}


def over_seeds(values: Sequence[float | None]) -> dict[str, Any]:
    """Mean and interval of one number a seed; `seeds` are the numbers themselves."""
    defined = [value for value in values if value is not None]
    return {**named(t_estimate(defined)), "seeds": defined}


def named(estimate: Estimate) -> dict[str, float | None]:
    """`{mean, low, high}`."""
    return {"mean": estimate.value, "low": estimate.low, "high": estimate.high}


def both_decodings(a: Mapping[int, Record], b: Mapping[int, Record], judge: str) -> dict[str, Any]:
    """`compare` for sampled decoding, and for greedy under `greedy`."""
    return {**compare(a, b, "sampled", judge), "greedy": compare(a, b, "greedy", judge)}


def compare(a: Mapping[int, Record], b: Mapping[int, Record], decoding: str, judge: str) -> dict[str, Any]:
    """a minus b on the seeds and users of both: relevance rate, recall, items won less items lost; win, tie, lose.

    An item, one response of each to the same user, is won by more relevant queries (docs/method.md, section 7).
    `unique_...` counts a line that repeats an earlier one of its list as irrelevant. Intervals are over seeds and
    users.
    """
    seeds = sorted(set(a) & set(b))
    k = queries_of(a[seeds[0]])
    more, unique, found = (
        of_responses(a, seeds, name, decoding, judge) - of_responses(b, seeds, name, decoding, judge)
        for name in ("relevant", "unique", "recall")
    )
    outcome = np.sign(more)
    estimates = {
        "relevance_rate": more / k,
        "item_win_rate": outcome,
        "unique_relevance_rate": unique / k,
        "unique_item_win_rate": np.sign(unique),
        "recall": found,
        "win": (outcome > 0).astype(float),
        "tie": (outcome == 0).astype(float),
        "lose": (outcome < 0).astype(float),
    }
    return {
        name: named(crossed_estimate(of_users(values, a[seeds[0]]["users"]), RESAMPLES, BOOTSTRAP_SEED))
        for name, values in estimates.items()
    }


def of_users(values: np.ndarray, users: int) -> np.ndarray:
    """(S, U) of (S, U J): the mean over the J responses to each user, which stand in a row."""
    return values.reshape(len(values), users, -1).mean(axis=-1)


def ablation(changed: Mapping[int, Record], plain: Mapping[int, Record], judge: str = MAIN_JUDGE) -> dict[str, Any]:
    """An arm with one thing changed, minus the arm as it is, on the seeds of both; its KL and its largest ratio.

    `max_ratio` is the largest `pi / pi_old` of any token in any update of a rollout, over all seeds: how far several
    updates a rollout leave the policy that sampled it.
    """
    ratios = [max(record["curve"]["max_ratio"]) for record in changed.values() if record.get("curve")]
    return {
        **both_decodings(changed, plain, judge),
        "kl": over_seeds([record["kl"] for record in changed.values()]),
        "max_ratio": max(ratios, default=None),
    }


def of_responses(runs: Mapping[int, Record], seeds: Sequence[int], name: str, decoding: str, judge: str) -> np.ndarray:
    """`relevant` or `unique` queries of each user's responses, or their `recall` (NaN where undefined), (S, U J)."""
    return np.stack([unpack(runs[seed]["decodings"][decoding][judge][name]) for seed in seeds])


def queries_of(record: Record) -> int:
    """k, the queries a response that the run was asked for."""
    measure = record["commands"][-1].split()
    return int(measure[measure.index("--num_queries") + 1])


def control_summary(seeds: Mapping[int, Record], judge: str) -> dict[str, Any]:
    """Means of a rule; a user's list is one item, so the share of lists with a relevant query has Wilson's interval."""
    record = next(iter(seeds.values()))
    counts = unpack(record["decodings"]["greedy"][judge]["relevant"])
    means = record["decodings"]["greedy"][judge]["means"]
    return {**means, "any_relevant": named(wilson_estimate(int((counts > 0).sum()), len(counts)))}


def mean_curves(seeds: Mapping[int, Record]) -> dict[str, np.ndarray]:
    """Training curves of an arm, (S, steps) each; empty without any."""
    curves = [record["curve"] for record in seeds.values() if record.get("curve")]
    if not curves:
        return {}
    steps = min(len(curve["kl"]) for curve in curves)
    return {name: np.array([curve[name][:steps] for curve in curves], dtype=float) for name in curves[0]}


def smoothed(curve: np.ndarray) -> np.ndarray:
    """Running mean of the last `SMOOTHING` entries along the last axis; shorter at the start."""
    sums = np.cumsum(curve, axis=-1)
    window = np.minimum(np.arange(1, curve.shape[-1] + 1), SMOOTHING)
    shifted = np.concatenate([np.zeros_like(sums[..., :SMOOTHING]), sums[..., :-SMOOTHING]], axis=-1)
    return (sums - shifted[..., : sums.shape[-1]]) / window


def rollouts_of(systems: Mapping[str, Mapping[int, Record]]) -> int:
    """Rollouts that each PPO arm was trained on; 0 without any."""
    lengths = {curves["kl"].shape[1] for seeds in systems.values() if (curves := mean_curves(seeds))}
    return max(lengths, default=0) * ROLLOUT_SIZE


def rollouts_to_reach(systems: Mapping[str, Mapping[int, Record]]) -> dict[str, dict[str, int | None]]:
    """`{"<a>_final": {b: rollouts}}`: after how many rollouts b's mean curve is at a's last level; None for never.

    Curves are the judged relevance of the rollouts, a running mean over five steps, averaged over seeds.
    """
    curves = {
        name: smoothed(found["relevance"].mean(axis=0))
        for name, seeds in systems.items()
        if (found := mean_curves(seeds)) and "relevance" in found
    }
    return {
        f"{a}_final": {
            b: int(np.argmax(curve >= curves[a][-1]) + 1) * ROLLOUT_SIZE if (curve >= curves[a][-1]).any() else None
            for b, curve in curves.items()
        }
        for a in curves
    }


def at_equal_kl(systems: Mapping[str, Mapping[int, Record]], levels: Sequence[float]) -> dict[str, list[float | None]]:
    """The judged relevance of each arm's rollouts when its KL first reaches each of `levels` (nats), over seeds."""
    found: dict[str, list[float | None]] = {}
    for name, seeds in systems.items():
        curves = mean_curves(seeds)
        if "relevance" in curves:
            kl, rate = (smoothed(curves[key].mean(axis=0)) for key in ("kl", "relevance"))
            found[name] = [float(rate[np.argmax(kl >= level)]) if (kl >= level).any() else None for level in levels]
    return found
