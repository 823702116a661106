"""Invented sample rows with annotations: what a word means decides its score, so that a small model can learn it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from common.feedback.annotator import Annotation, words_by_query
from common.feedback.labels import label_row
from common.files import write_jsonl

WORD_SCORES = {"running": 2, "shoes": 2, "boots": 2, "best": 1, "near": 1, "me": 1}
RESPONSES = [
    "best running shoes\ncafé recipe\nwi-fi",
    "boots near me\nemoji party",
    "recipe, home!",
    "suede boots\nbest café\nrunning at home",
    "shoes sale near me",
    "cheap routers\nbest boots\nclean suede shoes",
]


def annotate(response: str) -> Annotation:
    """Word scores from `WORD_SCORES`, else 0; a query's score is their mean, rounded."""
    scores = [tuple(WORD_SCORES.get(word.text, 0) for word in words) for words in words_by_query(response)]
    return Annotation(tuple(scores), tuple(round(sum(line) / max(1, len(line))) for line in scores))


def sample(place: int, split: str, response: str) -> dict[str, Any]:
    """A row of samples.jsonl."""
    history = [
        {"type": "search", "query": "running shoes for flat feet"},
        {"type": "click", "title": f"Boots and shoes, page {place}", "url": "https://shop.example/boots"},
    ]
    return {
        "id": f"{split}{place}#0", "example_id": f"{split}{place}", "user_id": f"u{place}", "group": f"u{place}",
        "split": split, "origin": "sample", "history": history, "targets": ["best boots"], "response": response,
        "finished": True,
    }  # fmt: skip


def labelled(split: str, responses: list[str]) -> list[tuple[dict[str, Any], Annotation]]:
    """Sample rows of one split with their annotations."""
    return [(sample(place, split, response), annotate(response)) for place, response in enumerate(responses)]


def write_files(folder: Path, rows: list[tuple[dict[str, Any], Annotation]]) -> tuple[str, str]:
    """The rows as samples.jsonl and labels.jsonl; returns their paths."""
    write_jsonl(folder / "samples.jsonl", (row for row, _ in rows))
    write_jsonl(folder / "labels.jsonl", (label_row(row, "invented", annotation) for row, annotation in rows))
    return str(folder / "samples.jsonl"), str(folder / "labels.jsonl")
