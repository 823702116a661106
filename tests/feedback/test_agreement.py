"""Agreement of annotators: hand numbers, scikit-learn, and the table that people fill in."""

from __future__ import annotations

import csv
import json
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import cohen_kappa_score, confusion_matrix

from common.errors import InputError
from common.feedback.agreement import measure_agreement, quadratic_kappa, render_agreement
from common.feedback.annotator import Annotation
from common.feedback.labels import label_row, read_samples
from common.files import read_json, write_jsonl
from step2_token_reward import agreement, gold
from step2_token_reward.gold import read_gold, write_gold
from tests.labelled_samples import annotate, sample

ratings = st.lists(st.tuples(st.integers(0, 2), st.integers(0, 2)), min_size=1, max_size=40)


@settings(max_examples=200, deadline=None)
@given(ratings)
def test_counts_and_kappa_equal_those_of_scikit_learn(pairs: list[tuple[int, int]]) -> None:
    first, second = (list(scores) for scores in zip(*pairs, strict=True))
    measured = measure_agreement([(Annotation((tuple(first),), (0,)), Annotation((tuple(second),), (0,)))])
    assert (measured.words == confusion_matrix(first, second, labels=[0, 1, 2])).all()
    kappa = quadratic_kappa(measured.words)
    if kappa is None:
        assert len({*first, *second}) == 1
    else:
        assert kappa == pytest.approx(cohen_kappa_score(first, second, labels=[0, 1, 2], weights="quadratic"))


def test_measures_by_hand() -> None:
    """Words 0 0 1 2 2 against 0 1 1 2 0: three of five equal.

    Squared differences: 0 1 0 0 4, mean 1. Chance: the first rater's shares are .4 .2 .4, the second's .4 .4 .2:
    .4(.4*0 + .4*1 + .2*4) + .2(.4*1 + .4*0 + .2*1) + .4(.4*4 + .4*1 + .2*0) = .48 + .12 + .8 = 1.4; kappa 1 - 1/1.4.
    """
    first = Annotation(((0, 0, 1), (2, 2)), (2, 0))
    second = Annotation(((0, 1, 1), (2, 0)), (1, 1))
    measures = measure_agreement([(first, second)]).to_dict()
    assert measures["words"]["n"] == 5
    assert measures["words"]["counts"] == [[1, 1, 0], [0, 1, 0], [1, 0, 1]]
    assert measures["words"]["agreement"]["value"] == pytest.approx(0.6)
    assert measures["words"]["quadratic_kappa"] == pytest.approx(1 - 1 / 1.4)
    assert measures["words"]["shares"] == [pytest.approx([0.4, 0.2, 0.4]), pytest.approx([0.4, 0.4, 0.2])]
    assert measures["queries"]["agreement"]["value"] == 0
    assert measures["queries"]["relevant_agreement"] == pytest.approx(0.5)  # 2 and 1 are both relevant, 0 and 1 not


def test_labels_that_hardly_agree_are_warned_of() -> None:
    one_class = measure_agreement([(Annotation(((1, 1),), (1,)), Annotation(((1, 1),), (1,)))])
    assert quadratic_kappa(one_class.words) is None
    text = render_agreement(one_class, "a", "b", 1)
    assert "undefined (one score only)" in text and "warning" not in text
    opposed = measure_agreement([(Annotation(((0, 2),), (2,)), Annotation(((2, 0),), (2,)))])
    assert "warning: kappa below 0.4" in render_agreement(opposed, "a", "b", 1)
    assert quadratic_kappa(opposed.words) == pytest.approx(-1)


ROWS = [
    sample(0, "train", "best shoes\n\n=1+1 red, red"),
    sample(1, "train", "boots"),
    sample(2, "train", ""),
]  # fmt: skip
SAMPLES = {row["id"]: row for row in ROWS}


def fill(path: Path, scores: list[str]) -> None:
    """Put `scores` into the column score, row by row, as a spreadsheet saves it (with a byte order mark)."""
    with path.open(encoding="utf-8", newline="") as stream:
        rows = list(csv.DictReader(stream, dialect="excel-tab"))
    with path.open("w", encoding="utf-8-sig", newline="") as stream:
        writer = csv.DictWriter(stream, gold.COLUMNS, dialect="excel-tab")
        writer.writeheader()
        writer.writerows({**row, "score": score} for row, score in zip(rows, scores, strict=True))


def test_the_table_and_back(tmp_path: Path) -> None:
    path = tmp_path / "gold.tsv"
    assert write_gold(path, ROWS) == 9
    with path.open(encoding="utf-8", newline="") as stream:
        rows = list(csv.DictReader(stream, dialect="excel-tab"))
    assert [row["text"] for row in rows[:6]] == ["best shoes", "best", "shoes", "'=1+1 red, red", "'=1+1", "red"]
    assert rows[0]["history"].startswith("search: running shoes for flat feet | click: Boots and shoes")
    assert not any(row["history"] for row in rows[1:7])
    fill(path, ["2", "1", "2", "0", "0", " 1", "1", "", ""])
    assert read_gold(path, SAMPLES) == {"train0#0": Annotation(((1, 2), (), (0, 1, 1)), (2, 0, 0))}


@pytest.mark.parametrize(
    ("scores", "message"),
    [
        (["2", "", "2", "0", "0", "1", "1", "", ""], r"gold\.tsv:3: sample 'train0#0' is scored in part"),
        (["2", "3", "2", "0", "0", "1", "1", "", ""], r"gold\.tsv:3: score '3' is none of 0, 1, 2"),
        ([""] * 9, "no sample is scored yet"),
    ],
)
def test_scores_that_cannot_be_used(scores: list[str], message: str, tmp_path: Path) -> None:
    path = tmp_path / "gold.tsv"
    write_gold(path, ROWS)
    fill(path, scores)
    with pytest.raises(InputError, match=message):
        read_gold(path, SAMPLES)


def test_a_table_that_is_not_of_these_samples(tmp_path: Path) -> None:
    path = tmp_path / "gold.tsv"
    write_gold(path, ROWS)
    fill(path, ["1"] * 9)
    with pytest.raises(InputError, match=r"gold\.tsv:2: sample 'train0#0' belongs to another sample file"):
        read_gold(path, {"train0#0": {**ROWS[0], "response": "best boots"}})
    lines = path.read_text(encoding="utf-8-sig").splitlines()
    path.write_text("\n".join([lines[0], *lines[2:]]) + "\n")
    with pytest.raises(InputError, match="the rows of sample 'train0#0' are not those that were written"):
        read_gold(path, SAMPLES)
    path.write_text("sample,score\n")
    with pytest.raises(InputError, match="is it tab-separated"):
        read_gold(path, SAMPLES)


def test_the_commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """People score like the labels but for one word of the first sample's ten."""
    samples, labels, table = (tmp_path / name for name in ("samples.jsonl", "labels.jsonl", "gold.tsv"))
    rows = [sample(0, "train", "best running shoes\nred boots"), sample(1, "train", "me"), sample(2, "train", "boots")]
    write_jsonl(samples, rows)
    write_jsonl(labels, (label_row(row, "invented", annotate(row["response"])) for row in rows))
    monkeypatch.setattr(sys, "argv", ["gold", "--samples", str(samples), "--gold", str(table), "--count", "2"])
    gold.main()
    with pytest.raises(InputError, match="may hold labels"):
        gold.main()
    with table.open(newline="") as stream:
        drawn = list(csv.DictReader(stream, dialect="excel-tab"))
    by_id = {row["id"]: annotate(row["response"]) for row in read_samples(samples).values()}
    scores = []
    for row in drawn:
        annotation, line = by_id[row["sample"]], int(row["query"]) - 1
        word = int(row["word"] or 0)
        scores.append(annotation.word_scores[line][word - 1] if word else annotation.query_scores[line])
    changed = next(place for place, row in enumerate(drawn) if row["word"])
    scores[changed] = (scores[changed] + 1) % 3
    fill(table, list(map(str, scores)))
    output = tmp_path / "agreement.json"
    flags = ["--samples", str(samples), "--labels", str(labels), "--reference", str(table), "--output", str(output)]
    monkeypatch.setattr(sys, "argv", ["agreement", *flags])
    capsys.readouterr()
    agreement.main()
    words = sum(bool(row["word"]) for row in drawn)
    assert f"words: {words}, equal {1 - 1 / words:.2%}" in capsys.readouterr().out
    written = read_json(output)
    assert (written["first"], written["second"], written["responses"]) == ("invented", "people (gold.tsv)", 2)
    assert np.trace(written["words"]["counts"]) == words - 1
    assert json.dumps(written["queries"]["agreement"]["value"]) == "1.0"
