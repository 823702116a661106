"""The generic and the TREC reader against their fixtures, and what all readers say of lines that they cannot read."""

from __future__ import annotations

import gzip
import json
from collections import Counter
from pathlib import Path

import pytest

from common.data.readers import detect_format, read_log
from common.data.records import Event, Record
from common.errors import InputError
from tests.data.log_files import FIXTURES, SHARED, pack, seconds

GENERIC = [
    Record(
        "u1",
        (
            Event("visit", title="Home", ts=seconds("2024-03-01T10:00:00")),
            Event("search", query="cake tin", ts=seconds("2024-03-01T10:00:05")),
            Event(
                "click", query="cake tin", title="Round tin", url="https://shop.example/tins/round-tin",
                ts=1709287210.5, rank=2,
            ),
            Event("purchase", title="Round tin"),
        ),
        source="shop", group="g1", session_id="s1", split="train", task="bake a cake", persona=("likes cakes",),
    ),
    Record(
        "u2", (Event("search", query="null"), Event("search", query="crème brûlée 🍮")), source="generic", group="u2"
    ),
]


@pytest.mark.parametrize("packed", [False, True])
def test_generic_jsonl(tmp_path: Path, packed: bool) -> None:
    path = FIXTURES / "generic.jsonl"
    path = pack(path, tmp_path / "generic.jsonl.gz") if packed else path
    assert detect_format(path) == "jsonl"
    assert list(read_log(path)) == GENERIC


def test_byte_order_mark_and_windows_line_ends(tmp_path: Path) -> None:
    path = tmp_path / "generic.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + (FIXTURES / "generic.jsonl").read_bytes().replace(b"\n", b"\r\n"))
    assert list(read_log(path)) == GENERIC


STARTER = "sourdough & starter"
TREC_2012 = Record(
    "trec2012-s1",
    (
        Event("search", query=STARTER, ts=60.0),
        Event("click", query=STARTER, url="http://bread.example/2", ts=89.75, rank=2),
        Event(
            "click", query=STARTER, title='Starter "Emma" / a guide', url="http://bread.example/starter?a=1&copy=2",
            ts=130.0, rank=1,
        ),
        Event("click", query=STARTER, title="Page two", url="http://bread.example/11", ts=210.0, rank=11),
        Event("search", query="bread flour £5", ts=240.0),
    ),
    source="trec_session_2012",
    group="trec2012-t5",
    session_id="trec2012-s1",
    task="You bake bread at home. Find out why a loaf & its crust may fail.",
)
TREC_2013 = [
    Record(
        "trec2013-s8",
        (
            Event("search", query="bicycle chain repair", ts=12.5),
            Event("search", query="null", ts=60.125),
            Event("click", "bicycle chain repair", title="Chains", url="http://bikes.example/chain", ts=70.25, rank=1),
        ),
        source="trec_session_2013", group="trec2013-t2", session_id="trec2013-s8", task="You want to mend a bicycle.",
    ),
    Record(
        "trec2013-s9", (Event("search", query="spoke key", ts=5.5),),
        source="trec_session_2013", group="trec2013-s9", session_id="trec2013-s9",
    ),
]
TREC_2014 = Record(
    "trec2014-u77",
    (
        Event("search", query="mountain huts", ts=4.0),
        Event("click", query="mountain huts", title="Huts", url="http://huts.example", ts=9.0, rank=3),
    ),
    source="trec_session_2014",
    group="trec2014-t61",
    session_id="trec2014-s3",
    task="Plan a trip to the mountains.",
)


@pytest.mark.parametrize(
    ("year", "records", "counts"),
    [
        (2012, [TREC_2012], {"bare_ampersands": 1, "next_page_interactions": 1, "clicks_without_result": 1}),
        (2013, TREC_2013, {"interactions_without_query": 1}),
        (2014, [TREC_2014], {}),
    ],
)
def test_trec(tmp_path: Path, year: int, records: list[Record], counts: dict[str, int]) -> None:
    path = FIXTURES / "trec" / f"sessiontrack{year}.xml"
    for source in (path, pack(path, tmp_path / f"{path.name}.gz")):
        counter: Counter[str] = Counter()
        assert detect_format(source) == "trec"
        assert list(read_log(source, counter=counter)) == records
        assert counter == counts


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("<sessiontrack2013>\n<session num='1'>\n</topic>", ":3: not well-formed XML"),
        ("<page>\n</page>", ":1: root element <page>"),
        ("<?xml version='1.0'?>\n<!DOCTYPE sessiontrack2013>\n<sessiontrack2013/>", ":2: declares a DTD"),
        (
            "<sessiontrack2013>\n<session num='1'>\n<interaction starttime='soon'><query>a</query></interaction>\n"
            "</session>\n</sessiontrack2013>",
            ":4: session '1' ends here; time 'soon'",
        ),
        ("<sessiontrack2013>\n</sessiontrack2013>", ": holds no record"),
    ],
)
def test_trec_bad_file(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "log.xml"
    path.write_text(text)
    with pytest.raises(InputError) as error:
        list(read_log(path))
    assert str(error.value).startswith(f"{path}{message}")


@pytest.mark.parametrize("year", [2012, 2013])
def test_trec_samples_equal_the_shared_log(year: int) -> None:
    folder = SHARED / "trec_session"
    if not folder.is_dir():
        pytest.skip("needs the real data in ../shared/data")
    shared = {record.session_id: record for record in read_log(folder / "sessions.jsonl")}
    records = list(read_log(folder / f"sample_{year}.xml"))
    assert len(records) == {2012: 3, 2013: 2}[year]
    for record in records:
        other = shared[record.session_id]
        assert (record.group, record.source, record.task) == (other.group, other.source, other.task)
        assert [event.ts for event in record.events] == pytest.approx([event.ts for event in other.events], abs=0.0051)
        for mine, theirs in zip(record.events, other.events, strict=True):
            title = " ".join((theirs.title or "").split()) or None
            assert (mine.type, mine.query, mine.title, mine.url, mine.rank) == (
                theirs.type, theirs.query, title, theirs.url, theirs.rank
            )


GOOD_LINE = json.dumps({"user_id": "u", "events": [{"type": "search", "query": "tea"}]})


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ('{"user_id": "u", ', "not valid JSON (Expecting property name enclosed in double quotes at column 18)"),
        ("[1]", "a record must be an object, found list"),
        ('{"events": []}', "a record needs a non-empty 'user_id'"),
        ('{"user_id": "u", "events": [{"type": "search", "query": " "}]}', "a search event needs a non-empty 'query'"),
        ('{"user_id": "u", "events": [{"type": "tap", "query": "a"}]}', "event type 'tap'"),
        ('{"user_id": "u", "events": [{"type": "search", "query": "a", "ts": NaN}]}', "time nan"),
        ('{"user_id": "u", "events": [{"type": "search", "query": "a", "ts": 1' + "0" * 400 + "}]}", "time 1000000"),
        ('{"user_id": "u", "events": [{"type": "search", "query": "\\ud800"}]}', "a text holds half"),
        (
            '{"user_id": "u", "events": [{"type": "search", "query": "a", "ts": 5}, {"type": "click", "title": "t"}, '
            '{"type": "search", "query": "b", "ts": 4}]}',
            "events[2] is earlier than an event before it",
        ),
        ("[" * 100_000, "maximum recursion depth"),
    ],
)
def test_jsonl_bad_line(tmp_path: Path, line: str, reason: str) -> None:
    path = tmp_path / "log.jsonl"
    path.write_text(f"{GOOD_LINE}\n\n{line}\n{GOOD_LINE}\n")
    with pytest.raises(InputError, match="--max_bad_lines") as error:
        list(read_log(path))
    assert str(error.value).startswith(f"{path}:3: {reason}")
    counter: Counter[str] = Counter()
    assert len(list(read_log(path, max_bad_lines=1, counter=counter))) == 2
    assert counter["bad_lines"] == 1


def test_bytes_that_are_not_text(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    path.write_bytes(GOOD_LINE.encode() + b"\n\xff\xfe\n")
    with pytest.raises(InputError, match=r"log\.jsonl:2: byte 1 is not UTF-8"):
        list(read_log(path))


def test_only_max_bad_lines_are_skipped(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    path.write_text("bad\nbad\n" + GOOD_LINE + "\nbad\n")
    assert len(list(read_log(path, max_bad_lines=3))) == 1
    with pytest.raises(InputError, match=r"log\.jsonl:4: .*now 2"):
        list(read_log(path, max_bad_lines=2))


def test_broken_gzip_names_the_line(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl.gz"
    lines = "".join(json.dumps({"user_id": f"u{n}", "events": []}) + "\n" for n in range(2000))
    path.write_bytes(gzip.compress(lines.encode(), mtime=0)[:-2000])
    with pytest.raises(InputError, match=r"log\.jsonl\.gz:\d+: not a whole gzip file"):
        list(read_log(path))


def test_missing_empty_and_unknown_logs(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such log"):
        read_log(tmp_path / "none.jsonl")
    empty = tmp_path / "empty.jsonl"
    empty.write_text("\n")
    with pytest.raises(InputError, match="holds no record"):
        list(read_log(empty))
    odd = tmp_path / "log.csv"
    odd.write_text(GOOD_LINE)
    with pytest.raises(InputError, match=r"its name tells no format.*jsonl.*aol.*aol4ps.*trec.*amazonqac"):
        read_log(odd)
    with pytest.raises(InputError, match="its name tells no format"):
        read_log(tmp_path)
    with pytest.raises(InputError, match="none of auto, jsonl"):
        read_log(odd, "csv")
    assert [record.user_id for record in read_log(odd, "jsonl")] == ["u"]
