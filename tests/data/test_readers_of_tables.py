"""The readers of AOL, AOL4PS and AmazonQAC against their fixtures, with the exact records and the errors' places."""

from __future__ import annotations

import shutil
import tarfile
from collections import Counter
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from common.data.readers import detect_format, read_log
from common.data.readers.grouping import group_rows
from common.data.records import Event, Record
from common.errors import InputError
from tests.data.log_files import FIXTURES, pack, seconds

AOL_USER_11 = Record(
    "aol-11",
    (
        Event("search", query="garden shed plans", ts=seconds("2006-03-01 23:58:10")),
        Event("click", "garden shed plans", url="http://www.sheds.example", ts=seconds("2006-03-01 23:58:10"), rank=1),
        Event("click", "garden shed plans", url="http://www.plans.example", ts=seconds("2006-03-01 23:58:10"), rank=4),
        Event("click", "garden shed plans", url="http://timber.example", ts=seconds("2006-03-02 00:01:30"), rank=12),
        Event("search", query="shed roof felt", ts=seconds("2006-03-02 09:00:00")),
        Event("search", query="null", ts=seconds("2006-03-03 08:00:00")),
        Event("search", query="-", ts=seconds("2006-03-03 08:05:00")),
        Event("search", query="say \"hello\" '", ts=seconds("2006-03-03 08:07:00")),
    ),
    source="aol",
    group="aol-11",
)
AOL_USER_42 = Record(
    "aol-42", (Event("search", query="nan", ts=seconds("2006-05-31 23:59:59")),), source="aol", group="aol-42"
)
AOL_USER_305 = Record(
    "aol-305",
    (
        Event("search", query="www.sheds.example", ts=seconds("2006-04-01 12:00:00")),
        Event("click", "www.sheds.example", url="http://www.sheds.example", ts=seconds("2006-04-01 12:00:00"), rank=1),
    ),
    source="aol",
    group="aol-305",
)


@pytest.mark.parametrize("packed", [False, True])
def test_aol_folder_merges_a_user_over_files(tmp_path: Path, packed: bool) -> None:
    for path in (FIXTURES / "aol").iterdir():
        if packed:
            pack(path, tmp_path / f"{path.name}.gz")
        else:
            shutil.copy(path, tmp_path)
    counter: Counter[str] = Counter()
    assert detect_format(tmp_path) == "aol"
    assert list(read_log(tmp_path, counter=counter)) == [AOL_USER_11, AOL_USER_42, AOL_USER_305]
    assert counter == {"next_page_rows": 1, "empty_query_rows": 1}


def test_aol_single_file() -> None:
    path = FIXTURES / "aol" / "user-ct-test-collection-01.txt"
    assert detect_format(path) == "aol"
    first, second = read_log(path)
    # Without the second file, the search that it holds is missing and nothing else.
    assert first.events == tuple(event for event in AOL_USER_11.events if event.query != "shed roof felt")
    assert second == AOL_USER_305


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("12\tquery", "2 tab-separated fields"),
        ("12\ta\t2006-03-01 00:00:00\t1\thttp://a.example\tmore", "6 tab-separated fields"),
        ("x\tquery\t2006-03-01 00:00:00\t\t", "AnonID 'x' is no number"),
        ("12\tquery\t2006-13-01 00:00:00\t\t", "time '2006-13-01 00:00:00'"),
        ("12\tquery\t2006-03-01 00:00:00\tfirst\thttp://a.example", "ItemRank 'first'"),
    ],
)
def test_aol_bad_line(tmp_path: Path, line: str, reason: str) -> None:
    path = tmp_path / "user-ct-test-collection-03.txt"
    good = "12\tfine\t2006-03-01 00:00:00\t\t"
    path.write_text(f"AnonID\tQuery\tQueryTime\tItemRank\tClickURL\n{good}\n{line}\n")
    with pytest.raises(InputError, match="--max_bad_lines") as error:
        list(read_log(path))
    assert str(error.value).startswith(f"{path}:3: {reason}")
    counter: Counter[str] = Counter()
    (record,) = read_log(path, max_bad_lines=1, counter=counter)
    assert [event.query for event in record.events] == ["fine"]
    assert counter["bad_lines"] == 1


def test_aol_must_be_sorted_and_not_doubled(tmp_path: Path) -> None:
    path = tmp_path / "user-ct-test-collection-03.txt"
    path.write_text("7\ta\t2006-03-01 00:00:00\t\t\n5\tb\t2006-03-01 00:00:00\t\t\n")
    with pytest.raises(InputError, match=r"03\.txt:2: AnonID 5 after 7"):
        list(read_log(path))
    pack(path, tmp_path / f"{path.name}.gz")
    with pytest.raises(InputError, match="count twice"):
        list(read_log(tmp_path))


def aol4ps_search(query: str, time: str, title: str | None, url: str, rank: int) -> tuple[Event, Event]:
    ts = seconds(time)
    return Event("search", query=query, ts=ts), Event("click", query=query, title=title, url=url, ts=ts, rank=rank)


AOL4PS = [
    Record(
        "aol4ps-7",
        (
            *aol4ps_search(
                "tomato seeds", "2006-03-01 09:05:00", "Tomato seeds, all kinds", "http://seeds.example/tomato", 2
            ),
            Event("click", "tomato seeds", url="http://null.example", ts=seconds("2006-03-01 09:06:30"), rank=1),
            *aol4ps_search(
                'the "best" trowel', "2006-03-05 10:00:00", "Tools\tfor gardens", "http://tools.example", 3
            ),
        ),
        source="aol4ps",
        group="aol4ps-7",
    ),
    Record(
        "aol4ps-9", aol4ps_search("null", "2006-03-01 13:47:00", None, "http://null.example", 1),
        source="aol4ps", group="aol4ps-9",
    ),
]


@pytest.mark.parametrize("packed", [False, True])
def test_aol4ps(tmp_path: Path, packed: bool) -> None:
    for name in ("data", "query", "doc"):
        source = FIXTURES / "aol4ps" / f"{name}.csv"
        if packed:
            with tarfile.open(tmp_path / f"{name}.tar.gz", "w:gz") as archive:
                archive.add(source, f"AOL4PS/{name}.csv")
        else:
            shutil.copy(source, tmp_path)
    assert detect_format(tmp_path) == "aol4ps"
    assert list(read_log(tmp_path)) == AOL4PS


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ("7\tq-9\t2006-03-05 10:00:00\t2\t3\td-10\td-10\t0", "QueryIndex 'q-9'"),
        ("7\tq-8\t2006-03-05 10:00:00\t2\t3\td-10\td-10\t0", "QueryIndex 'q-8' has an empty query"),
        ("7\tq-0\t2006-03-05 10:00:00\t2\t3\td-99\td-99\t0", "DocIndex 'd-99'"),
        # A copy that counts from 1 must not pass for one that counts from 0.
        ('7\tq-0\t2006-03-05 10:00:00\t2\t3\td-10\t"d-10\td-11"\t1', "ClickPos 1 (counted from 0)"),
        ("7\tq-0\t13/1/2006 10:00\t2\t3\td-10\td-10\t0", "time data '13/1/2006 10:00'"),
        ("7\tq-0\t2006-03-05 10:00:00\t2\t3\td-10", "6 tab-separated fields, the header has 8"),
        ("7\udcff\tq-0\t2006-03-05 10:00:00\t2\t3\td-10\td-10\t0", "not UTF-8"),
    ],
)
def test_aol4ps_bad_line(tmp_path: Path, row: str, reason: str) -> None:
    shutil.copytree(FIXTURES / "aol4ps", tmp_path / "log")
    with (tmp_path / "log" / "query.csv").open("a") as stream:
        stream.write(" \tq-8\n")
    path = tmp_path / "log" / "data.csv"
    with path.open("a", encoding="utf-8", errors="surrogateescape") as stream:
        stream.write(row + "\n")
    with pytest.raises(InputError) as error:
        list(read_log(tmp_path / "log"))
    assert str(error.value).startswith(f"{path}:6: {reason}")
    counter: Counter[str] = Counter()
    assert list(read_log(tmp_path / "log", max_bad_lines=1, counter=counter)) == AOL4PS
    assert counter["bad_lines"] == 1


def test_aol4ps_missing_or_wrong_tables(tmp_path: Path) -> None:
    shutil.copytree(FIXTURES / "aol4ps", tmp_path / "log")
    (tmp_path / "log" / "doc.csv").unlink()
    with pytest.raises(InputError, match=r"missing: doc\.csv or doc\.tar\.gz"):
        list(read_log(tmp_path / "log", "aol4ps"))
    (tmp_path / "log" / "doc.tar.gz").write_bytes(b"no archive")
    with pytest.raises(InputError, match=r"doc\.tar\.gz: not a whole tar\.gz"):
        list(read_log(tmp_path / "log"))
    with tarfile.open(tmp_path / "log" / "doc.tar.gz", "w:gz") as archive:
        archive.add(FIXTURES / "aol4ps" / "query.csv", "query.csv")
    with pytest.raises(InputError, match=r"holds no doc\.csv"):
        list(read_log(tmp_path / "log"))
    (tmp_path / "log" / "doc.csv").write_text("Url,DocIndex,Title\n")
    with pytest.raises(InputError, match=r"doc\.csv:1: the header lacks Url, DocIndex, Title"):
        list(read_log(tmp_path / "log"))


def write_parquet(path: Path, rows: list[dict]) -> Path:
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return path


def train_row(session: str, term: str, time: str) -> dict:
    return {
        "query_id": "1", "session_id": session, "prefixes": ["s", "se"], "first_prefix_typed_time": time,
        "final_search_term": term, "search_time": time, "popularity": 3,
    }


def amazon_record(session: str, *searches: tuple[str, str]) -> Record:
    events = tuple(Event("search", query=term, ts=seconds(time)) for term, time in searches)
    return Record(f"amazonqac-{session}", events, source="amazonqac", group=f"amazonqac-{session}")


AMAZON_TRAIN = [
    train_row("s1", "sink rack", "2023-09-04 20:46:27"),
    train_row("s2", "null", "2023-09-01T08:00:00"),
    train_row("s1", "sink", "2023-09-04 20:40:00"),
]
AMAZON_TEST = {
    "query_id": "9", "session_id": "t1", "past_search_terms": [["toy bear", "2023-10-07 13:03:54"]], "prefix": "b",
    "prefix_typed_time": "2023-10-11T16:42:30.256Z", "final_search_term": "bear costume",
    "search_time": "2023-10-11 16:42:34",
}
AMAZON_SESSION_1 = amazon_record("s1", ("sink", "2023-09-04 20:40:00"), ("sink rack", "2023-09-04 20:46:27"))
AMAZON_SESSION_2 = amazon_record("s2", ("null", "2023-09-01 08:00:00"))


def test_amazonqac_file_and_folder(tmp_path: Path) -> None:
    train = write_parquet(tmp_path / "part-0.parquet", AMAZON_TRAIN)
    assert detect_format(train) == "amazonqac"
    assert list(read_log(train)) == [AMAZON_SESSION_1, AMAZON_SESSION_2]
    write_parquet(tmp_path / "part-1.parquet", [train_row("s2", "kettle", "2023-09-01T09:00:00")])
    write_parquet(tmp_path / "part-2.parquet", [AMAZON_TEST])
    assert detect_format(tmp_path) == "amazonqac"
    assert list(read_log(tmp_path)) == [
        amazon_record("t1", ("toy bear", "2023-10-07 13:03:54"), ("bear costume", "2023-10-11 16:42:34")),
        AMAZON_SESSION_1,
        amazon_record("s2", ("null", "2023-09-01 08:00:00"), ("kettle", "2023-09-01 09:00:00")),
    ]


def test_amazonqac_bad_rows_and_files(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "a.parquet", [*AMAZON_TRAIN, train_row("s3", " ", "2023-09-01 08:00:00")])
    with pytest.raises(InputError, match=r"a\.parquet:4: row 4: search term ' ' is no text"):
        list(read_log(path))
    counter: Counter[str] = Counter()
    assert list(read_log(path, max_bad_lines=1, counter=counter)) == [AMAZON_SESSION_1, AMAZON_SESSION_2]
    assert counter["bad_lines"] == 1
    path = write_parquet(tmp_path / "b.parquet", [AMAZON_TEST | {"past_search_terms": [["no time"]]}])
    with pytest.raises(InputError, match=r"b\.parquet:1: row 1: past_search_terms must hold \[term, time\]"):
        list(read_log(path))
    path = write_parquet(tmp_path / "c.parquet", [{"term": "x"}])
    with pytest.raises(InputError, match="lacks the columns session_id, final_search_term, search_time"):
        list(read_log(path))
    path.write_bytes(b"PAR1 but no more")
    with pytest.raises(InputError, match="not a readable parquet file"):
        list(read_log(path))


def test_grouping_on_disk_equals_grouping_in_memory() -> None:
    rows = [(f"key {number % 7}", f"term {number} é", float(number)) for number in range(50)]
    in_memory = dict(group_rows(iter(rows), len(rows)))
    on_disk = [(key, [tuple(row) for row in group]) for key, group in group_rows(iter(rows), len(rows), 10)]
    assert len(on_disk) == 7
    assert dict(on_disk) == in_memory == {f"key {key}": rows[key::7] for key in range(7)}
