"""What the numbers of a run warn of, and where to look. Thresholds stand here, each with its reason."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from common.evaluation.over_optimisation import WINDOW, over_optimised
from common.evaluation.summary import MARKED_CHANGE, own_teacher_warning

Row = Mapping[str, Any]

# A share's change is the evaluation's MARKED_CHANGE, 5 points. Over a window of 10 steps of 64 responses with three
# queries a share of 0.1 is known to 0.7 points: 5 points are no noise, also for rollouts a quarter as large.
# Queries have two or three words: a quarter more is half a word in every query, which users see.
LENGTH_DRIFT = 0.25
# A reward model that rated the first rollout's words a quarter of a point above the judge called mediocre words good
# and had to be mended (docs/results/findings.md, what was changed in the method, 1).
WORD_GAP = 0.25
# Arms of the study that gained ended at 2 to 6 nats a response; those at 10 and more had gained nothing by the last
# nats (docs/results/findings.md: raw rewards, whitening at each place, sentence-level models of 150 users).
HIGH_KL = 10.0
# One answer in five cannot be shown to a user as it is; the main job's SFT model, of 0.6 million parameters, has .15.
FORMAT_ERRORS = 0.2
# A critic that explains nothing of the returns adds noise to the advantages instead of taking it out.
EXPLAINED_VARIANCE = 0.0


@dataclass(frozen=True, slots=True)
class Finding:
    """A warning: what was found, its numbers, and what to look at or do next."""

    title: str
    detail: str
    next: str


class _Drift(NamedTuple):
    """A metric that should not move by more than `threshold` in the direction of `sign` from beginning to end."""

    metric: str
    title: str
    sign: int
    threshold: float
    next: str


_DRIFTS = (
    _Drift(
        "response/copy_rate", "Copies from the history rose", 1, MARKED_CHANGE,
        "The examples below: is a copied query paid for? Raise --kl_coef, and have copies labelled 0 in step 2 if "
        "users gain nothing by them.",
    ),
    _Drift(
        "response/distinct_2", "Diversity fell", -1, MARKED_CHANGE,
        "The examples below: does everybody get the same queries? Raise --kl_coef or --entropy_coef, or stop earlier.",
    ),
    _Drift(
        "response/repeated_query_rate", "Lists repeat their own queries more", 1, MARKED_CHANGE,
        "The list guards' part of the reward: a repeat should cost a whole query.",
    ),
    _Drift(
        "response/repeated_word_rate", "Queries repeat their own words more", 1, MARKED_CHANGE,
        "The examples below: step 2's samples may hold too few such queries to learn their price from.",
    ),
    _Drift(
        "response/function_word_rate", "Function words rose", 1, MARKED_CHANGE,
        "What the reward model pays for of, the, in: the numbers of each token below; --normalise_rewards.",
    ),
    _Drift(
        "response/format_error_rate", "Format errors rose", 1, MARKED_CHANGE,
        "Cut-off answers (--max_response_tokens) and the number of lines; raise --list_cost.",
    ),
    _Drift(
        "judge/word_gap", "The reward model overrates the policy's words more and more", 1, WORD_GAP,
        "Label responses of this policy and train step 2 again, or stop where the judge was at its best.",
    ),
)  # fmt: skip


def run_findings(rows: Sequence[Row]) -> list[Finding]:
    """What step 3's metrics (a row a step) warn of; beginning and end are means of `WINDOW` steps each.

    KL and format errors are judged of any run, the others of a `comparable` one. A metric that a run does not have
    warns of nothing; see `unchecked`.
    """
    found = [_high_kl(rows), _format(rows)]
    if comparable(rows):
        found = [_over_optimisation(rows), *(_drift(rows, drift) for drift in _DRIFTS), _length(rows), *found]
        found.append(_critic(rows))
    return [finding for finding in found if finding is not None]


def comparable(rows: Sequence[Row]) -> bool:
    """Whether a run is long enough to tell its end from its beginning."""
    return len(rows) >= 2 * WINDOW


def unchecked(rows: Sequence[Row]) -> list[str]:
    """Metrics that warnings need and that a run has not measured."""
    needed = [*(drift.metric for drift in _DRIFTS), "response/words_per_query", "kl/per_sequence",
              "judge/relevance_rate", "value/explained_variance"]  # fmt: skip
    return [metric for metric in needed if not values_of(rows, metric)]


def judge_findings(judges: Mapping[str, str], teacher: str) -> list[Finding]:
    """Warns if a judge, named by what it judges, is `teacher`, whose labels trained the reward model."""
    judged = [what for what, judge in judges.items() if judge and judge == teacher]
    if not judged:
        return []
    return [
        Finding(
            f"The judge of {' and of '.join(judged)} is the reward model's own teacher",
            own_teacher_warning(teacher),
            "Believe differences only as far as this annotator is right; judge with another one (another "
            "--judge_model or annotator, or people).",
        )
    ]


def evaluation_findings(report: Mapping[str, Any]) -> list[Finding]:
    """The warnings of report.json, but for the judge's, which `judge_findings` gives."""
    own = own_teacher_warning(report["annotator"])
    return [
        Finding(
            "On held-out users", warning,
            "The tables of held-out users, and the answers themselves in generations/.",
        )
        for warning in report["warnings"]
        if warning != own
    ]  # fmt: skip


def values_of(rows: Sequence[Row], metric: str) -> list[float]:
    """A metric's values in order, without those that were not finite."""
    return [row[metric] for row in rows if row.get(metric) is not None]


def ends(rows: Sequence[Row], metric: str) -> tuple[float, float] | None:
    """Means of a metric over the first and the last `WINDOW` steps; None where it was not measured that often."""
    values = values_of(rows, metric)
    if len(values) < 2 * WINDOW:
        return None
    return statistics.fmean(values[:WINDOW]), statistics.fmean(values[-WINDOW:])


def _drift(rows: Sequence[Row], drift: _Drift) -> Finding | None:
    found = ends(rows, drift.metric)
    if found is None or drift.sign * (found[1] - found[0]) <= drift.threshold:
        return None
    return Finding(drift.title, f"{_from_to(*found)} ({drift.metric}).", drift.next)


def _length(rows: Sequence[Row]) -> Finding | None:
    found = ends(rows, "response/words_per_query")
    if found is None or found[0] == 0 or abs(found[1] / found[0] - 1) <= LENGTH_DRIFT:
        return None
    longer = found[1] > found[0]
    return Finding(
        f"Queries got {'longer' if longer else 'shorter'}",
        f"{_from_to(*found)} words a query ({found[1] / found[0] - 1:+.0%}).",
        "Is length paid for? --normalise_rewards and --centre_rewards should be on, --length_alpha below 1."
        if longer
        else "Is a short query the safest one? Look at the length penalty (--length_alpha, --suggested_length).",
    )


def _over_optimisation(rows: Sequence[Row]) -> Finding | None:
    judged, rewards = values_of(rows, "judge/relevance_rate"), values_of(rows, "reward/score_per_response")
    if len(judged) != len(rewards) or not over_optimised(judged, rewards, MARKED_CHANGE):
        return None
    best = max(statistics.fmean(judged[end - WINDOW : end]) for end in range(WINDOW, len(judged) + 1))
    return Finding(
        "Over-optimisation: the judge turned away while the reward did not",
        f"Judged relevance over {WINDOW} steps fell from its best, {best:.3f}, to "
        f"{statistics.fmean(judged[-WINDOW:]):.3f}.",
        "Take the checkpoint of the highest judged relevance, which is kept, or end runs by --monitor_margin; raise "
        "--kl_coef; a better reward model (step 2) moves the point.",
    )


def _high_kl(rows: Sequence[Row]) -> Finding | None:
    values = values_of(rows, "kl/per_sequence")[-WINDOW:]
    if not values or statistics.fmean(values) <= HIGH_KL:
        return None
    return Finding(
        "The policy is far from its reference",
        f"{statistics.fmean(values):.1f} nats a response in the last {len(values)} steps; above {HIGH_KL:g}.",
        "Whether the judge rose with it; raise --kl_coef, lower --actor_learning_rate, or set --kl_target.",
    )


def _format(rows: Sequence[Row]) -> Finding | None:
    values = values_of(rows, "response/format_error_rate")[-WINDOW:]
    if not values or statistics.fmean(values) <= FORMAT_ERRORS:
        return None
    return Finding(
        "Many answers are no list of queries",
        f"{statistics.fmean(values):.1%} of the responses of the last {len(values)} steps have too many or too few "
        "lines, an empty one, or no end.",
        "Cut-off answers (--max_response_tokens), step 1 trained too little, or --list_cost too low.",
    )


def _critic(rows: Sequence[Row]) -> Finding | None:
    values = values_of(rows, "value/explained_variance")[-WINDOW:]
    without_critic = values_of(rows, "policy/grad_norm") and not values_of(rows, "value/grad_norm")
    if not values or without_critic or statistics.fmean(values) > EXPLAINED_VARIANCE:
        return None
    return Finding(
        "The critic explains nothing",
        f"Explained variance {statistics.fmean(values):+.2f} over the last {WINDOW} steps.",
        "Start it from the reward model (--critic_path), more updates a rollout (a smaller --mini_batch_size), a "
        "higher --critic_learning_rate, longer --critic_warmup_steps.",
    )


def _from_to(begin: float, end: float) -> str:
    return f"From {begin:.3f} (first {WINDOW} steps) to {end:.3f} (last {WINDOW})"
