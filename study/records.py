"""What a finished job leaves for the tables: one small JSON file, kept after the job's folder is gone."""

from __future__ import annotations

import json
import string
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from common.files import atomic_write, read_json
from common.tracking import read_metrics
from study.jobs import Job, shell_line

# Of step 3's metrics: the judge's view, the reward's, the KL, and what tells whether the updates are sane.
CURVE = {
    "judge/relevance_rate": "relevance",
    "judge/mean_word_score": "word_score",
    "judge/word_gap": "word_gap",
    "judge/word_calibration_error": "calibration_error",
    "reward/score_per_response": "reward",
    "kl/per_sequence": "kl",
    "value/explained_variance": "explained_variance",
    "policy/max_ratio": "max_ratio",
    "response/format_error_rate": "format_errors",
    "response/words_per_query": "words_per_query",
    "seconds/step": "seconds",
}
LATE = 10  # rollouts at the end of a run that its credit profile is taken over
DIGITS = string.digits + string.ascii_letters
REWARD_CURVE = ("loss", "local_loss", "sentence_mse", "sentence_auc", "word_auc")


class Records:
    """The records under one folder, `axis/s1/system.json` and `.../reward` by job name."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def has(self, job: Job, fingerprint: str) -> bool:
        """Whether the job left its record, made with this fingerprint."""
        path = self._path(job.name)
        return path.is_file() and read_json(path)["fingerprint"] == fingerprint

    def write(self, job: Job, job_folder: Path, seconds: float, fingerprint: str) -> dict[str, Any] | None:
        """Make the record of a finished job; None for a job that leaves none."""
        if (job_folder / "measure.json").is_file():
            record = _measured(read_json(job_folder / "measure.json"))
            metrics = job_folder / "run" / "metrics.jsonl"
            if metrics.is_file() and "step3_tppo.main" in dict(job.commands):
                record["curve"] = _curve(read_metrics(metrics))
                record["profile"] = _late_profile(read_metrics(job_folder / "run" / "profiles.jsonl"))
        elif (job_folder / "reward" / "metrics.json").is_file():
            record = {
                "metrics": _rounded(read_json(job_folder / "reward" / "metrics.json")),
                "curve": _reward_curve(read_metrics(job_folder / "reward" / "metrics.jsonl")),
            }
        else:
            return None
        record |= {"fingerprint": fingerprint, "seconds": round(seconds, 1)}
        record |= {"commands": [shell_line(command) for command in job.commands]}
        with atomic_write(self._path(job.name)) as stream:
            json.dump(record, stream, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
            stream.write("\n")
        return record

    def read(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """All records with their jobs' names, sorted."""
        for path in sorted(self._folder.rglob("*.json")):
            yield path.relative_to(self._folder).with_suffix("").as_posix(), read_json(path)

    def _path(self, name: str) -> Path:
        return self._folder / f"{name}.json"


def leaves_record(job: Job) -> bool:
    """Whether the job is one whose result the tables need."""
    modules = {module for module, _ in job.commands}
    return bool(modules & {"study.measure", "step2_token_reward.main"})


def _measured(measure: dict[str, Any]) -> dict[str, Any]:
    """The measure with its lists, an entry a response, packed."""
    for judges in measure["decodings"].values():
        for judged in judges.values():
            judged |= {name: pack(judged[name]) for name in ("relevant", "unique", "recall")}
            judged["means"] = _rounded(judged["means"])
    kept = {name: measure[name] for name in ("kl", "examples", "decodings")}
    return {**kept, "users": len(measure["users"])}


def pack(values: Sequence[float | None]) -> dict[str, Any]:
    """A long list of few different values: `values`, and `places`, the character of each entry's place in `values`."""
    found = sorted({value for value in values if value is not None})
    shown: list[float | None] = [*found, *([None] if None in values else [])]
    digit = {value: DIGITS[place] for place, value in enumerate(shown)}
    return {"values": shown, "places": "".join(digit[value] for value in values)}


def unpack(packed: Mapping[str, Any]) -> np.ndarray:
    """The list that `pack` was given, (N,), NaN for None."""
    values = np.array([np.nan if value is None else value for value in packed["values"]], dtype=float)
    return values[[DIGITS.index(place) for place in packed["places"]]]


def _curve(rows: list[dict[str, Any]]) -> dict[str, list[float]]:
    return {
        short: [_digits(row[name]) for row in rows] for name, short in CURVE.items() if rows and name in rows[0]
    }


def _late_profile(rows: list[dict[str, Any]]) -> dict[str, list[float]]:
    """Tokens, mean reward and mean |advantage| at each place of a response, over the last rollouts together."""
    tokens, reward, credit = (np.array([row[name] for row in rows[-LATE:]]) for name in ("tokens", "reward", "credit"))
    total = tokens.sum(axis=0)
    means = {
        name: ((values * tokens).sum(axis=0) / np.maximum(total, 1)).tolist()
        for name, values in (("reward", reward), ("credit", credit))
    }
    return {"tokens": total.tolist(), **{name: list(map(_digits, values)) for name, values in means.items()}}


def _reward_curve(rows: list[dict[str, Any]]) -> list[dict[str, float]]:
    """Step, training losses and held-out measures wherever one of them was logged."""
    kept = []
    for row in rows:
        names = [name for name in (*REWARD_CURVE, *(f"eval_{name}" for name in REWARD_CURVE)) if name in row]
        if names:
            kept.append({"step": row["step"], **{name: _digits(row[name]) for name in names}})
    return kept


def _rounded(values: dict[str, Any]) -> dict[str, Any]:
    return {name: _digits(value) for name, value in values.items()}


def _digits(value: Any) -> Any:
    return float(f"{value:.5g}") if isinstance(value, float) else value
