"""The study's figures, from its records; each returns whether there was anything to draw."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

from study.aggregate import ROLLOUT_SIZE, Record, Runs, mean_curves, smoothed, summarise_system
from study.settings import ABLATIONS, COMPARED, DEFAULT_NOISE

matplotlib.use("Agg")
from matplotlib import pyplot as plt

LABELS = {
    "sft": "SFT", "dpo": "DPO", "tppo": "TPPO", "ppo_response": "PPO, end of response",
    "ppo_query": "PPO, end of query",
    "ppo_response_token_rm": "token RM, end of response", "ppo_query_token_rm": "token RM, end of query",
}  # fmt: skip
COLOURS = {
    "sft": "0.5", "dpo": "#8c564b", "tppo": "#d62728", "ppo_response": "#1f77b4", "ppo_query": "#2ca02c",
    "ppo_response_token_rm": "#9ecae1", "ppo_query_token_rm": "#98df8a",
}  # fmt: skip
REWARD_HEADS = {"token_w0.5": ("token", "#d62728"), "sentence": ("sentence", "#1f77b4")}
JUDGE = "simulated"


def draw_all(runs: Runs, rewards: Mapping[str, Record], folder: Path) -> list[str]:
    """Draw every figure there is data for into `folder`; their names."""
    figures: dict[str, Callable[[], Any]] = {
        "reward_models": lambda: reward_models(rewards),
        "ppo_curves": lambda: ppo_curves(runs.get("main", {})),
        "relevance_and_kl": lambda: relevance_and_kl(runs.get("main", {})),
        "over_optimisation": lambda: over_optimisation(runs.get("main", {})),
        "credit": lambda: credit(runs.get("main", {})),
        "query_length": lambda: query_length(runs.get("main", {})),
        "label_budget": lambda: axis(
            {**_numbers(runs, "budget"), **({4500.0: runs["main"]} if "main" in runs else {})}, "labelled users", True
        ),
        "label_noise": lambda: axis(
            {**_numbers(runs, "noise"), **({DEFAULT_NOISE: runs["budget1500"]} if "budget1500" in runs else {})},
            "share of wrong labels", False,
        ),
        "queries": lambda: axis(
            # The SFT model needs no labels, so that of the main comparison stands beside the arms with fewer.
            {**_numbers(runs, "k"), **({3.0: runs["budget1500"] | _only(runs.get("main", {}), "sft")}
                                       if "budget1500" in runs else {})},
            "queries a response", False,
        ),
        "w": lambda: axis(
            {**_numbers(runs, "w"), **({0.5: {"tppo": runs["budget1500"]["tppo"]}} if "budget1500" in runs else {})},
            "w, weight of the local loss", False,
        ),
        "ablations": lambda: ablations(runs),
    }  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    drawn = []
    for name, draw in figures.items():
        if draw() is not None:
            plt.gcf().savefig(folder / f"{name}.png", dpi=110, bbox_inches="tight")
            drawn.append(name)
        plt.close("all")
    return drawn


def reward_models(rewards: Mapping[str, Record]) -> Any:
    """Held-out sentence AUC, error and word AUC against the examples seen, mean and range over seeds."""
    found = {
        heads: [record["curve"] for name, record in rewards.items()
                if name.split("/")[1:] == ["k3", "n0_noise0.09", heads] and name.split("/")[0] != "s0"]
        for heads in REWARD_HEADS
    }  # fmt: skip
    if not all(found.values()):
        return None
    figure, axes = plt.subplots(1, 3, figsize=(12, 3.4))
    for axes_, (key, title) in zip(
        axes,
        [("eval_sentence_mse", "sentence error (MSE)"), ("eval_sentence_auc", "AUC, relevant queries"),
         ("eval_word_auc", "macro AUC, words")],
        strict=True,
    ):  # fmt: skip
        for heads, (label, colour) in REWARD_HEADS.items():
            curves = [[(row["step"], row[key]) for row in curve if key in row] for curve in found[heads]]
            if not all(curves):
                continue
            steps = [step for step, _ in curves[0]]
            values = np.array([[value for _, value in curve] for curve in curves])
            _band(axes_, steps, values, label, colour)
        axes_.set(xlabel="optimiser step", title=title)
        axes_.legend(fontsize=8)
    return figure


def ppo_curves(systems: Mapping[str, Mapping[int, Record]]) -> Any:
    """Judged relevance of the rollouts (a common scale) against rollouts and seconds, and its spread over seeds."""
    curves = {name: mean_curves(systems[name]) for name in COMPARED if name in systems}
    if not curves:
        return None
    figure, axes = plt.subplots(1, 3, figsize=(13, 3.6))
    for name, found in curves.items():
        rates = smoothed(found["relevance"])
        rollouts = ROLLOUT_SIZE * np.arange(1, rates.shape[1] + 1)
        _band(axes[0], rollouts, rates, LABELS[name], COLOURS[name])
        _band(axes[1], found["seconds"].cumsum(axis=1).mean(axis=0), rates, LABELS[name], COLOURS[name])
        if len(rates) > 1:
            axes[2].plot(rollouts, rates.std(axis=0, ddof=1), color=COLOURS[name])
    axes[0].set(xlabel="rollouts", ylabel="relevance rate of the rollouts", title="mean and range over seeds")
    axes[1].set(xlabel="seconds (one core)", title="the same against time")
    axes[2].set(xlabel="rollouts", title="standard deviation over seeds")
    axes[0].legend(fontsize=8)
    return figure


def relevance_and_kl(systems: Mapping[str, Mapping[int, Record]]) -> Any:
    """The path of each arm: KL to the reference against judged relevance, and where it ended on test users."""
    curves = {name: mean_curves(systems[name]) for name in LABELS if name in systems}
    if not any(curves.values()):
        return None
    figure, axes = plt.subplots(figsize=(6, 4.2))
    for name, found in curves.items():
        if found:
            path = [smoothed(found[key].mean(axis=0)) for key in ("kl", "relevance")]
            axes.plot(*path, color=COLOURS[name], label=LABELS[name])
    for name, seeds in systems.items():
        if name in LABELS:
            summary = summarise_system(seeds, JUDGE)
            label = None if curves.get(name) else LABELS[name]  # the line has it
            axes.scatter(summary["kl"]["mean"], summary["relevance_rate"]["mean"], color=COLOURS[name], marker="x",
                         label=label)  # fmt: skip
    axes.set(xlabel="KL to SFT, nats a response", ylabel="relevance rate",
             title="lines: rollouts while training; crosses: test users at the end")  # fmt: skip
    axes.legend(fontsize=8)
    return figure


def over_optimisation(systems: Mapping[str, Mapping[int, Record]]) -> Any:
    """Reward against judgement while training, and the reward model's error on words as the policy drifts."""
    curves = {name: mean_curves(systems[name]) for name in COMPARED if name in systems}
    if not curves:
        return None
    figure, axes = plt.subplots(1, 3, figsize=(13, 3.6))
    for name, found in curves.items():
        for axes_, key in zip(axes, ("reward", "word_gap", "calibration_error"), strict=True):
            rollouts = ROLLOUT_SIZE * np.arange(1, found[key].shape[1] + 1)
            _band(axes_, rollouts, smoothed(found[key]), LABELS[name], COLOURS[name])
    axes[0].set(xlabel="rollouts", title="own reward (scales differ)")
    axes[1].set(xlabel="rollouts", title="reward model less judge, a word (0..2)")
    axes[2].set(xlabel="rollouts", title="calibration error of word scores")
    axes[0].legend(fontsize=8)
    return figure


def credit(systems: Mapping[str, Mapping[int, Record]]) -> Any:
    """Mean magnitude of the advantage, and mean reward, at each place of a response, late in the runs."""
    found = {
        name: [record["profile"] for record in systems[name].values() if "profile" in record]
        for name in COMPARED if name in systems
    }  # fmt: skip
    if not any(found.values()):
        return None
    figure, axes = plt.subplots(1, 2, figsize=(10, 3.4))
    for name, rows in found.items():
        tokens = np.array([row["tokens"] for row in rows])
        common = tokens.sum(axis=0) > 0.02 * tokens[:, 0].sum()
        for axes_, key in zip(axes, ("credit", "reward"), strict=True):
            means = (np.array([row[key] for row in rows]) * tokens).sum(axis=0) / np.maximum(tokens.sum(axis=0), 1)
            axes_.plot(np.flatnonzero(common) + 1, means[common], color=COLOURS[name], label=LABELS[name])
    axes[0].set(xlabel="token of the response", title="|advantage| (whitened)")
    axes[1].set(xlabel="token of the response", title="reward, KL included")
    axes[0].legend(fontsize=8)
    return figure


def query_length(systems: Mapping[str, Mapping[int, Record]]) -> Any:
    """Relevance of sampled queries by their number of words."""
    names = [name for name in ("sft", *COMPARED) if name in systems]
    if not names:
        return None
    figure, axes = plt.subplots(1, 2, figsize=(10, 3.4))
    for name in names:
        counts = np.zeros((6, 2))
        for record in systems[name].values():
            for words, (written, good) in record["decodings"]["sampled"][JUDGE]["by_length"].items():
                if int(words) > 0:
                    counts[int(words) - 1] += written, good
        share = counts[:, 0] / counts[:, 0].sum()
        seen = counts[:, 0] > 50
        axes[0].plot(np.flatnonzero(seen) + 1, counts[seen, 1] / counts[seen, 0], "o-", color=COLOURS[name],
                     label=LABELS[name])  # fmt: skip
        axes[1].plot(range(1, 7), share, "o-", color=COLOURS[name])
    axes[0].set(xlabel="words of the query (6: six and more)", title="relevance rate")
    axes[1].set(xlabel="words of the query", title="share of the queries")
    axes[0].legend(fontsize=8)
    return figure


def axis(by_value: Mapping[float, Mapping[str, Mapping[int, Record]]], label: str, logarithmic: bool) -> Any:
    """Relevance rate of the compared arms along one axis, sampled and greedy, with 95 % intervals over seeds."""
    values = sorted(by_value)
    if len(values) < 2:
        return None
    figure, axes = plt.subplots(1, 2, figsize=(10, 3.6))
    for place, name in enumerate(("sft", *COMPARED)):
        points = [(value, summarise_system(runs[name], JUDGE)) for value in values if name in (runs := by_value[value])]
        if len(points) < 2:
            continue
        for axes_, pick in zip(axes, (lambda summary: summary, lambda summary: summary["greedy"]), strict=True):
            rates = [pick(summary)["relevance_rate"] for _, summary in points]
            _errorbars(axes_, [value for value, _ in points], rates, place, logarithmic, name)
    for axes_, title in zip(axes, ("sampled", "greedy"), strict=True):
        axes_.set(xlabel=label, title=f"relevance rate, {title}")
        if logarithmic:
            axes_.set_xscale("log")
            axes_.set_xticks(values, [f"{value:g}" for value in values])
            axes_.minorticks_off()
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, fontsize=8, ncols=4, loc="upper center", bbox_to_anchor=(0.5, 1.06))
    return figure


def _only(systems: Mapping[str, Any], name: str) -> dict[str, Any]:
    return {name: systems[name]} if name in systems else {}


def ablations(runs: Runs) -> Any:
    """TPPO with one thing changed, less TPPO as it is, on the same seeds: each seed a dot."""
    base = runs.get("main", {}).get("tppo", {})
    changes = {
        name: [(record, base[seed]) for seed, record in runs[f"ablation_{name}"]["tppo"].items() if seed in base]
        for name in ABLATIONS if f"ablation_{name}" in runs
    }  # fmt: skip
    if not changes:
        return None
    figure, axes = plt.subplots(1, 2, figsize=(11, 0.32 * len(changes) + 1.2), sharey=True)
    for axes_, decoding in zip(axes, ("sampled", "greedy"), strict=True):
        for place, pairs in enumerate(changes.values()):
            rates = [[record["decodings"][decoding][JUDGE]["means"]["relevance_rate"] for record in pair]
                     for pair in pairs]  # fmt: skip
            differences = [100 * (changed - plain) for changed, plain in rates]
            axes_.plot(differences, [place] * len(differences), "o", color=COLOURS["tppo"], alpha=0.6)
            axes_.plot(np.mean(differences), place, "|", color="black", markersize=12)
        axes_.axvline(0, color="0.7", linewidth=1)
        axes_.set(yticks=range(len(changes)), yticklabels=list(changes), title=f"points of relevance rate, {decoding}")
    return figure


def _numbers(runs: Runs, prefix: str) -> dict[float, Mapping[str, Mapping[int, Record]]]:
    """The axes named `prefix` and a number."""
    found = {}
    for name, systems in runs.items():
        rest = name.removeprefix(prefix)
        if rest != name and rest.replace(".", "", 1).isdigit():
            found[float(rest)] = systems
    return found


def _band(axes: Any, places: Sequence[float], values: np.ndarray, label: str, colour: str) -> None:
    axes.plot(places, values.mean(axis=0), color=colour, label=label)
    axes.fill_between(places, values.min(axis=0), values.max(axis=0), color=colour, alpha=0.15, linewidth=0)


def _errorbars(
    axes: Any, places: Sequence[float], rates: Sequence[Mapping[str, Any]], order: int, logarithmic: bool, name: str
) -> None:
    """Points with their intervals, moved a little so that the arms' bars stand side by side."""
    width = 0 if logarithmic else (max(places) - min(places)) * 0.008
    moved = [place * 1.03 ** (order - 1.5) if logarithmic else place + width * (order - 1.5) for place in places]
    means = np.array([rate["mean"] for rate in rates])
    bounds = np.array([[rate[side] if rate[side] is not None else rate["mean"] for rate in rates]
                       for side in ("low", "high")])  # fmt: skip
    axes.errorbar(moved, means, yerr=np.abs(bounds - means), color=COLOURS[name], label=LABELS[name], marker="o",
                  capsize=2)  # fmt: skip
