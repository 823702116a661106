"""Which files of histories are read, and how those that are not are refused."""

from __future__ import annotations

import gzip
import json
import os
from pathlib import Path

import pytest

from common.data.records import Event, Example
from common.errors import InputError
from common.files import write_jsonl
from common.prediction.histories import History, read_histories, survey_histories

HISTORY = (Event("search", query="red hat", ts=1.0), Event("click", query="red hat", title="Hats", ts=2.0))
RECORD = {"user_id": "u1", "events": [event.to_dict() for event in HISTORY]}


def test_records_of_the_generic_log(tmp_path: Path) -> None:
    rows = [RECORD, {**RECORD, "user_id": "u2", "session_id": "s9", "source": "shop"}]
    write_jsonl(tmp_path / "history.jsonl", rows)
    expected = [History("history/u1", "u1", HISTORY), History("shop/u2/s9", "u2", HISTORY)]
    assert list(read_histories(tmp_path / "history.jsonl")) == expected
    (tmp_path / "history.jsonl.gz").write_bytes(gzip.compress((tmp_path / "history.jsonl").read_bytes()))
    assert list(read_histories(tmp_path / "history.jsonl.gz")) == expected


def test_prepared_examples(tmp_path: Path) -> None:
    example = Example("shop/u1@3", "u1", "u1", "shop", "test", HISTORY, ("blue hat",))
    write_jsonl(tmp_path / "test.jsonl", [example.to_dict()])
    assert list(read_histories(tmp_path / "test.jsonl")) == [History("shop/u1@3", "u1", HISTORY)]


def test_other_formats_by_their_name() -> None:
    (folder,) = Path("tests/fixtures").glob("aol")
    histories = list(read_histories(folder))
    assert len(histories) > 1 and all(history.events for history in histories)


def test_texts_are_tidied_as_in_training_and_events_without_one_are_left_out(tmp_path: Path) -> None:
    events = [{"type": "search", "query": "red\x00hat\nnow"}, {"type": "click", "title": "\x07 ", "query": "red"}]
    write_jsonl(tmp_path / "h.jsonl", [{"user_id": "u", "events": [*events, {"type": "visit", "url": "\x01"}]}])
    (history,) = read_histories(tmp_path / "h.jsonl")
    assert history.events == (Event("search", query="red hat now"), Event("click", query="red"))


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([json.dumps(RECORD), "{nonsense"], r"h.jsonl:2: not valid JSON"),
        (["{nonsense"], r"h.jsonl:1: not valid JSON"),
        (["[1]"], r"h.jsonl:1: a record must be an object"),
        ([json.dumps(RECORD), '{"user_id": "u"}'], r"h.jsonl:2: a record needs a list 'events'"),
        (['{"history": []}'], r"h.jsonl:1: not an example \(an example needs the field 'id'\)"),
        ([json.dumps(RECORD), json.dumps({"user_id": "u\x1b", "events": []})], r"history 2 \(id 'h/u\\x1b'\) holds no"),
        ([json.dumps({"user_id": "u", "events": [{"type": "search", "query": "\x01"}]})], r"history 1 .*holds no"),
        ([], r"h.jsonl: holds no record"),
    ],
)
def test_what_cannot_be_read_is_refused_with_its_place(tmp_path: Path, lines: list[str], message: str) -> None:
    (tmp_path / "h.jsonl").write_text("".join(f"{line}\n" for line in lines))
    with pytest.raises(InputError, match=message):
        list(read_histories(tmp_path / "h.jsonl"))


def test_bad_lines_may_be_skipped(tmp_path: Path) -> None:
    (tmp_path / "h.jsonl").write_text(f"{json.dumps(RECORD)}\n{{nonsense\n")
    assert len(list(read_histories(tmp_path / "h.jsonl", max_bad_lines=1))) == 1
    with pytest.raises(InputError, match="no such file; check --history"):
        list(read_histories(tmp_path / "nowhere.jsonl"))


def test_a_survey_counts_histories_and_tells_other_ones_apart(tmp_path: Path) -> None:
    found = []
    for rows in ([RECORD, RECORD], [RECORD, RECORD, RECORD], [RECORD, {**RECORD, "user_id": "u2"}], [RECORD, RECORD]):
        write_jsonl(tmp_path / "h.jsonl", rows)
        found.append(survey_histories(read_histories(tmp_path / "h.jsonl")))
    assert [survey.count for survey in found] == [2, 3, 2, 2]
    assert found[0] == found[3] and len({survey.digest for survey in found}) == 3


def test_what_cannot_be_read_twice_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(InputError, match="cannot be read twice; write it to a file first"):
        list(read_histories(tmp_path / "pipe"))
