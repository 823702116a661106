"""Rows that do not say whose they are: refused or counted, in every reader, and never gathered into one user."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from common.data.readers import read_log
from common.data.records import MissingId, Record, is_missing_id, parse_id
from common.errors import InputError
from tests.data.log_files import FIXTURES

MISSING = [None, float("nan"), "", "  ", "nan", "NaN", "None", "null", "NULL", "<NA>", "NaT", "\\N"]


def read_counting(path: Path, rows_without_id: int) -> list[Record]:
    """The records of a log in which so many rows have no id; each must be refused, and counted where it is skipped."""
    with pytest.raises(InputError, match="--max_bad_lines"):
        list(read_log(path, max_bad_lines=rows_without_id - 1))
    counter: Counter[str] = Counter()
    records = list(read_log(path, max_bad_lines=rows_without_id, counter=counter))
    assert (counter["bad_lines"], counter["rows_without_id"]) == (rows_without_id, rows_without_id)
    return records


@pytest.mark.parametrize("value", MISSING)
def test_values_that_are_no_id(value: Any) -> None:
    assert is_missing_id(value)
    with pytest.raises(MissingId, match="session_id is missing"):
        parse_id(value, "session_id")


def test_values_that_are_an_id() -> None:
    assert [parse_id(value, "x") for value in ("nancy", "0", 0, 12, 12.0, "Nonesuch")] == [
        "nancy", "0", "0", "12", "12", "Nonesuch"
    ]
    for value in (True, 1.5, 2.0**53, float("inf"), b"a", [1]):
        with pytest.raises(ValueError, match="neither a text nor a whole number"):
            parse_id(value, "x")


def amazon_log(path: Path, sessions: pyarrow.Array, *, test: bool = False) -> Path:
    count = len(sessions)
    columns = {
        "session_id": sessions, "final_search_term": [f"tea {place}" for place in range(count)],
        "search_time": ["2023-09-01 08:00:00"] * count,
    }
    if test:
        columns["past_search_terms"] = [[["pot", "2023-09-01 07:00:00"]]] * count
    pyarrow.parquet.write_table(pyarrow.table(columns), path)
    return path


@pytest.mark.parametrize("test", [False, True])
def test_amazonqac(tmp_path: Path, test: bool) -> None:
    texts = amazon_log(tmp_path / "texts.parquet", pyarrow.array(["s1", *(m for m in MISSING if m == m)]), test=test)
    (record,) = read_counting(texts, len(MISSING) - 1)
    assert (record.user_id, record.events[-1].query) == ("amazonqac-s1", "tea 0")
    # A column of whole numbers becomes one of floats where pandas met a row without an id.
    floats = amazon_log(tmp_path / "floats.parquet", pyarrow.array([7.0, float("nan"), 8.0, float("nan")]), test=test)
    assert [record.user_id for record in read_counting(floats, 2)] == ["amazonqac-7", "amazonqac-8"]


def test_jsonl(tmp_path: Path) -> None:
    rows = [{"user_id": value, "events": []} for value in ("u1", *MISSING)]
    path = tmp_path / "log.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert [record.user_id for record in read_counting(path, len(MISSING))] == ["u1"]
    others = [{"user_id": f"u{n}", "group": m, "session_id": m, "events": []} for n, m in enumerate(MISSING)]
    path.write_text("".join(json.dumps(row) + "\n" for row in others))
    assert [(record.group, record.session_id) for record in read_log(path)] == [
        (f"u{n}", None) for n in range(len(MISSING))
    ]


def test_aol(tmp_path: Path) -> None:
    path = tmp_path / "user-ct-test-collection-01.txt"
    rows = [f"{user}\ttea {place}\t2006-03-01 10:00:00\t\t" for place, user in enumerate(("7", "", "nan", "null"))]
    path.write_text("\n".join(rows) + "\n")
    assert [record.user_id for record in read_counting(path, 3)] == ["aol-7"]


def test_aol4ps_user_without_id(tmp_path: Path) -> None:
    shutil.copytree(FIXTURES / "aol4ps", tmp_path / "log")
    before = list(read_log(tmp_path / "log"))
    with (tmp_path / "log" / "data.csv").open("a") as stream:
        for user in ("", "nan"):
            stream.write(f"{user}\tq-0\t2006-03-05 10:00:00\t2\t3\td-10\td-10\t0\n")
    assert read_counting(tmp_path / "log", 2) == before


def test_aol4ps_text_without_id_is_nobodys_query(tmp_path: Path) -> None:
    shutil.copytree(FIXTURES / "aol4ps", tmp_path / "log")
    before = list(read_log(tmp_path / "log"))
    with (tmp_path / "log" / "query.csv").open("a") as stream:
        stream.write("stray query\tnan\n")
    assert read_counting(tmp_path / "log", 1) == before
    with (tmp_path / "log" / "data.csv").open("a") as stream:
        stream.write("7\tnan\t2006-03-05 10:00:00\t2\t3\td-10\td-10\t0\n")
    with pytest.raises(InputError, match="QueryIndex 'nan' is not in the query table"):
        list(read_log(tmp_path / "log", max_bad_lines=1))


def test_trec(tmp_path: Path) -> None:
    sessions = "".join(
        f"<session num='{num}' userid='{user}'><topic num='{topic}'/>"
        "<interaction starttime='1'><query>tea</query></interaction></session>\n"
        for num, user, topic in (("1", "nan", "null"), ("2", "", "NaN"), ("nan", "u", "t"), ("3", "u", "t"))
    )
    path = tmp_path / "log.xml"
    path.write_text(f"<sessiontrack2014>\n{sessions}</sessiontrack2014>")
    assert [(record.user_id, record.group) for record in read_counting(path, 1)] == [
        ("trec2014-s1", "trec2014-s1"), ("trec2014-s2", "trec2014-s2"), ("trec2014-uu", "trec2014-tt")
    ]  # fmt: skip
