"""Samples and their labels on disk: the files between `sample.py`, `label.py` and the reward model's training.

A sample row: {"id", "example_id", "user_id", "group", "split", "origin", "history", "targets", "response", "finished"}.
A label row: {"id", "sample_digest", "annotator", "words": [[0, 2], ...], "queries": [1, ...]}, one line a sample; the
digest binds it to the sample's response. Samples that an annotator could not label stand in a quarantine file beside
the labels, each with the reason.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from common.data.records import Event
from common.errors import InputError, one_line
from common.feedback.annotator import Annotation, FeedbackItem, Unlabelled, check_annotation
from common.files import digest, read_jsonl

_TEXT_FIELDS = ("id", "example_id", "user_id", "group", "split", "origin", "response")


def read_samples(path: str | Path) -> dict[str, dict[str, Any]]:
    """Sample rows by id, in the file's order.

    Raises `InputError` for a missing or empty file, a row that is no sample, and an id that occurs twice.
    """
    samples: dict[str, dict[str, Any]] = {}
    for number, row in read_jsonl(path):
        for field in _TEXT_FIELDS:
            if not isinstance(row.get(field), str):
                raise InputError(f"{path}:{number}: a sample needs a text {field!r}; is this a file of sample.py?")
        for field in ("history", "targets"):
            if not isinstance(row.get(field), list):
                raise InputError(f"{path}:{number}: a sample needs a list {field!r}; is this a file of sample.py?")
        if not all(isinstance(target, str) for target in row["targets"]):
            raise InputError(f"{path}:{number}: the targets of a sample must be texts")
        if row["id"] in samples:
            raise InputError(f"{path}:{number}: sample {row['id']!r} occurs twice")
        samples[row["id"]] = row
    if not samples:
        raise InputError(f"{path}: no samples; run sample.py first")
    return samples


def sample_item(row: dict[str, Any]) -> FeedbackItem:
    """What an annotator gets to see of a sample row; raises `InputError` for an event that is none."""
    try:
        history = tuple(Event.from_dict(event) for event in row["history"])
    except ValueError as error:
        raise InputError(f"sample {row['id']!r}: {error}") from None
    return FeedbackItem(row["example_id"], row["user_id"], history, tuple(row["targets"]), row["response"])


def sample_digest(sample: dict[str, Any]) -> str:
    """What binds a label to the response that it was given for."""
    return digest(sample["id"], sample["response"])


def label_row(sample: dict[str, Any], annotator: str, annotation: Annotation) -> dict[str, Any]:
    """The label row of a sample; raises `ValueError` for an annotation that does not fit its response."""
    check_annotation(annotation, sample["response"])
    return {
        "id": sample["id"],
        "sample_digest": sample_digest(sample),
        "annotator": annotator,
        "words": [list(scores) for scores in annotation.word_scores],
        "queries": list(annotation.query_scores),
    }


def quarantine_path(labels_path: str | Path) -> Path:
    """Where the samples stand that an annotator could not label: `labels.jsonl` -> `labels.quarantine.jsonl`."""
    return Path(labels_path).with_suffix(".quarantine.jsonl")


def quarantine_row(sample: dict[str, Any], annotator: str, failure: Unlabelled) -> dict[str, Any]:
    """The quarantine row of a sample: why it has no label, and what the annotator answered."""
    return {
        "id": sample["id"],
        "sample_digest": sample_digest(sample),
        "annotator": annotator,
        "reason": failure.reason,
        "replies": list(failure.replies),
    }


def read_quarantine(labels_path: str | Path, samples: dict[str, dict[str, Any]]) -> dict[str, str]:
    """Reasons by id of the samples that were given up; empty without a quarantine file.

    Raises `InputError` for a row that belongs to other samples.
    """
    path = quarantine_path(labels_path)
    reasons: dict[str, str] = {}
    for number, row in read_jsonl(path) if path.is_file() else ():
        id_ = row.get("id")
        sample = samples.get(id_) if isinstance(id_, str) else None
        if sample is None or row.get("sample_digest") != sample_digest(sample):
            name = one_line(repr(id_), 80)
            raise InputError(f"{path}:{number}: {name} belongs to another sample file; remove this file")
        reasons[id_] = str(row.get("reason"))
    return reasons


def read_existing_labels(
    labels_path: str | Path, samples: dict[str, dict[str, Any]], *, annotator: str | None = None
) -> dict[str, Annotation]:
    """Annotations by sample id, in the file's order; the file need not cover all samples.

    Raises `InputError` with file and line for a row that is no label, a sample that `samples` lacks or that had
    another response, an id that occurs twice, scores that do not fit the response, and labels of two annotators or
    of another one than `annotator`.
    """
    labels: dict[str, Annotation] = {}
    for number, row in read_jsonl(labels_path):
        place = f"{labels_path}:{number}"
        id_ = row.get("id")
        sample = samples.get(id_) if isinstance(id_, str) else None
        if sample is None or row.get("sample_digest") != sample_digest(sample):
            raise InputError(
                f"{place}: label {one_line(repr(id_), 80)} belongs to another sample file; "
                "give the file that was labelled, or label this one into a new file"
            )
        annotator = annotator or row.get("annotator")
        if row.get("annotator") != annotator:
            raise InputError(
                f"{place}: labelled by {one_line(repr(row.get('annotator')), 80)}, not by {annotator!r}; "
                "one file holds one annotator's labels: choose another labels file"
            )
        if id_ in labels:
            raise InputError(f"{place}: sample {id_!r} is labelled twice")
        labels[id_] = _annotation(row, sample["response"], place)
    return labels


def read_labels(samples_path: str | Path, labels_path: str | Path) -> list[tuple[dict[str, Any], Annotation]]:
    """Each sample row with its annotation, in the order of the samples; those in quarantine are left out.

    Raises `InputError` where the labels do not fit (see `read_existing_labels`) or a sample has neither a label nor a
    place in quarantine.
    """
    samples = read_samples(samples_path)
    labels = read_existing_labels(labels_path, samples)
    quarantined = read_quarantine(labels_path, samples)
    missing = [id_ for id_ in samples if id_ not in labels and id_ not in quarantined]
    if missing:
        raise InputError(
            f"{labels_path}: {len(missing)} of {len(samples)} samples have no label, the first is {missing[0]!r}; "
            "run label.py again, it goes on where it stopped"
        )
    return [(sample, labels[id_]) for id_, sample in samples.items() if id_ in labels]


def _annotation(row: dict[str, Any], response: str, place: str) -> Annotation:
    words, queries = row.get("words"), row.get("queries")
    if not isinstance(queries, list) or not isinstance(words, list) or not all(isinstance(q, list) for q in words):
        raise InputError(f"{place}: a label needs a list 'queries' and a list of lists 'words'")
    annotation = Annotation(tuple(map(tuple, words)), tuple(queries))
    try:
        check_annotation(annotation, response)
    except ValueError as error:
        raise InputError(f"{place}: {error}") from None
    return annotation
