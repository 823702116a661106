"""label.py and the files it writes: killed and resumed, refused where they do not belong together."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest

from common.errors import InputError
from common.feedback.annotator import Annotation, FeedbackItem
from common.feedback.labels import read_labels, read_samples
from common.feedback.lexical import LexicalAnnotator
from common.files import digest, write_jsonl
from step2_token_reward.label import label_samples, main


class CountingAnnotator(LexicalAnnotator):
    """Remembers what it was asked to score, and can die on the way."""

    def __init__(self, dies_after: int | None = None) -> None:
        self.asked: list[str] = []
        self.dies_after = dies_after

    def annotate(self, item: FeedbackItem) -> Annotation:
        if len(self.asked) == self.dies_after:
            raise KeyboardInterrupt
        self.asked.append(item.response)
        return super().annotate(item)


def sample(number: int, origin: str, response: str) -> dict:
    return {
        "id": f"münze-{number}#{origin}",
        "example_id": f"münze-{number}",
        "user_id": "u",
        "group": "u",
        "split": "train",
        "origin": "gold" if origin == "gold" else "sample",
        "history": [{"type": "search", "query": "silver coin"}, {"type": "click", "title": "Coin price - Digest"}],
        "targets": ["coin auction", "sell silver coin"],
        "response": response,
        "finished": True,
    }


ROWS = [
    sample(0, "gold", "coin auction\nsell silver coin"),
    sample(0, "0", "coin price\n\ncoin coin\n"),
    sample(0, "1", ""),
    sample(1, "gold", "硬币 auction\nsell coin"),
]
LABELS = [
    ([[2, 2], [2, 2, 2]], [2, 2]),
    ([[2, 1], [], [2, 0]], [2, 0, 1]),
    ([], []),
    ([[0, 0, 2], [2, 2]], [0, 2]),
]


@pytest.fixture
def samples(tmp_path: Path) -> Path:
    path = tmp_path / "samples.jsonl"
    write_jsonl(path, ROWS)
    return path


@pytest.fixture
def labels(samples: Path, tmp_path: Path) -> Path:
    path = tmp_path / "labels.jsonl"
    label_samples(read_samples(samples), path, LexicalAnnotator())
    return path


def test_label_rows_by_hand(labels: Path) -> None:
    rows = [json.loads(line) for line in labels.read_text(encoding="utf-8").splitlines()]
    assert rows == [
        {
            "id": row["id"],
            "sample_digest": digest(row["id"], row["response"]),
            "annotator": "lexical",
            "words": words,
            "queries": queries,
        }
        for row, (words, queries) in zip(ROWS, LABELS, strict=True)
    ]


def test_read_labels_pairs_samples_with_annotations_in_the_order_of_the_samples(samples: Path, labels: Path) -> None:
    lines = labels.read_bytes().splitlines(keepends=True)
    labels.write_bytes(b"".join(reversed(lines)))
    pairs = read_labels(samples, labels)
    assert [row for row, _ in pairs] == ROWS
    assert [
        ([list(line) for line in annotation.word_scores], list(annotation.query_scores)) for _, annotation in pairs
    ] == LABELS


def test_killed_at_any_byte_of_the_last_line_and_resumed(samples: Path, labels: Path) -> None:
    whole = labels.read_bytes()
    start = whole.rindex(b"\n", 0, -1) + 1
    for end in range(start, len(whole) + 1):
        labels.write_bytes(whole[:end])
        annotator = CountingAnnotator()
        label_samples(read_samples(samples), labels, annotator)
        assert labels.read_bytes() == whole
        # The last line is complete from its closing brace on; all others are never labelled again.
        assert annotator.asked == ([ROWS[-1]["response"]] if end < len(whole) - 1 else [])


def test_each_label_is_on_disk_before_the_next_is_asked_for(samples: Path, tmp_path: Path) -> None:
    path = tmp_path / "labels.jsonl"

    class WatchingAnnotator(LexicalAnnotator):
        def __init__(self) -> None:
            self.seen: list[int] = []

        def annotate(self, item: FeedbackItem) -> Annotation:
            content = path.read_bytes()
            assert not content or content.endswith(b"}\n")
            self.seen.append(content.count(b"\n"))
            return super().annotate(item)

    annotator = WatchingAnnotator()
    label_samples(read_samples(samples), path, annotator)
    assert annotator.seen == [0, 1, 2, 3]


def test_resumption_asks_only_for_what_is_missing(samples: Path, tmp_path: Path) -> None:
    path = tmp_path / "labels.jsonl"
    with pytest.raises(KeyboardInterrupt):
        label_samples(read_samples(samples), path, CountingAnnotator(dies_after=1))
    second, third = CountingAnnotator(), CountingAnnotator()
    label_samples(read_samples(samples), path, second)
    label_samples(read_samples(samples), path, third)
    assert second.asked == [row["response"] for row in ROWS[1:]] and third.asked == []
    assert len(read_labels(samples, path)) == len(ROWS)


def change(path: Path, number: int, **fields: object) -> None:
    """Rewrite some fields of one line (counted from 0)."""
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    rows[number] |= fields
    write_jsonl(path, rows)


@pytest.mark.parametrize(
    ("file", "number", "fields", "message"),
    [
        ("samples", 1, {"response": "coin price"}, "labels.jsonl:2: label 'münze-0#0' belongs to another sample file"),
        ("samples", 1, {"id": "münze-9#0"}, "labels.jsonl:2: label 'münze-0#0' belongs to another sample file"),
        ("labels", 2, {"id": ["x"]}, "labels.jsonl:3: label ['x'] belongs to another sample file"),
        ("labels", 3, {"annotator": "simulated"}, "labels.jsonl:4: labelled by 'simulated', not by 'lexical'"),
        ("labels", 0, {"words": [[2, 2], [2, 2]]}, "labels.jsonl:1: 2 word scores for the 3 words of line 2"),
        ("labels", 0, {"queries": [2, 3]}, "labels.jsonl:1: score 3 is none of 0, 1, 2"),
        ("labels", 0, {"words": [2, 2]}, "labels.jsonl:1: a label needs a list 'queries' and a list of lists"),
        ("samples", 0, {"origin": None}, "samples.jsonl:1: a sample needs a text 'origin'"),
        ("samples", 2, {"history": None}, "samples.jsonl:3: a sample needs a list 'history'"),
        ("samples", 2, {"targets": [1]}, "samples.jsonl:3: the targets of a sample must be texts"),
        ("samples", 2, {"id": ROWS[0]["id"]}, "samples.jsonl:3: sample 'münze-0#gold' occurs twice"),
    ],
)
def test_files_that_do_not_belong_together_are_refused_and_left_alone(
    samples: Path, labels: Path, file: str, number: int, fields: dict, message: str
) -> None:
    change(labels.with_name(f"{file}.jsonl"), number, **fields)
    before = labels.read_bytes()
    with pytest.raises(InputError, match=re.escape(message)):
        label_samples(read_samples(samples), labels, LexicalAnnotator())
    with pytest.raises(InputError, match=re.escape(message)):
        read_labels(samples, labels)
    assert labels.read_bytes() == before


def test_a_sample_labelled_twice_is_refused(samples: Path, labels: Path) -> None:
    lines = labels.read_bytes().splitlines(keepends=True)
    labels.write_bytes(b"".join([*lines, lines[1]]))
    with pytest.raises(InputError, match=re.escape("labels.jsonl:5: sample 'münze-0#0' is labelled twice")):
        read_labels(samples, labels)


def test_missing_labels_are_refused_when_read(samples: Path, labels: Path) -> None:
    lines = labels.read_bytes().splitlines(keepends=True)
    labels.write_bytes(b"".join([lines[0], lines[3]]))
    with pytest.raises(InputError, match="2 of 4 samples have no label, the first is 'münze-0#0'"):
        read_labels(samples, labels)


def test_a_file_that_holds_no_labels_is_left_alone(samples: Path, tmp_path: Path) -> None:
    path = tmp_path / "notes.txt"
    path.write_text("buy milk")
    with pytest.raises(InputError, match="the last line is none of"):
        label_samples(read_samples(samples), path, LexicalAnnotator())
    assert path.read_text() == "buy milk"
    content = samples.read_bytes().rstrip()
    samples.write_bytes(content)
    with pytest.raises(InputError, match="belongs to another sample file"):
        label_samples(read_samples(samples), samples, LexicalAnnotator())
    assert samples.read_bytes().rstrip() == content


def test_event_that_is_none_names_the_sample(samples: Path, tmp_path: Path) -> None:
    change(samples, 1, history=[{"type": "search"}])
    with pytest.raises(InputError, match="sample 'münze-0#0': a search event needs"):
        label_samples(read_samples(samples), tmp_path / "labels.jsonl", LexicalAnnotator())


def test_empty_sample_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "samples.jsonl").write_text("")
    with pytest.raises(InputError, match="no samples"):
        read_samples(tmp_path / "samples.jsonl")


def test_command_says_what_it_labelled(
    samples: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """By hand over LABELS: 3 words score 0, 1 scores 1, 10 score 2; 5 of 7 queries are relevant, 3 of 4 gold ones."""
    path = tmp_path / "deep" / "labels.jsonl"
    flags = ["label.py", f"--samples={samples}", f"--labels={path}", "--annotator=lexical"]
    monkeypatch.setattr(sys, "argv", flags)
    main()
    assert capsys.readouterr().out.splitlines() == [
        "words: 3 score 0, 1 score 1, 10 score 2",
        "relevant queries: 0.714 of 7 (all), 0.750 of 4 (gold), 0.667 of 3 (sample)",
        f"labels by lexical: {path}",
        f"next: bash scripts/run_step2.sh --samples {samples} --labels {path} "
        f"--output_dir {path.parent / 'reward'} --model_name_or_path ...",
    ]
    assert len(read_labels(samples, path)) == 4


def test_command_names_missing_flags(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["label.py", "--samples=samples.jsonl"])
    with pytest.raises(InputError, match="--samples and --labels are needed"):
        main()
