"""Times in other units than seconds: refused by name, in every reader alike, and never taken for a far future."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from common.data.examples import ExampleBuilder, ExampleOptions
from common.data.readers import read_log
from common.data.records import Event, parse_time
from common.errors import InputError

SECONDS = 1_700_000_000  # 2023-11-14T22:13:20 UTC
FINER = {"milliseconds": 10**3, "microseconds": 10**6, "nanoseconds": 10**9}


@pytest.mark.parametrize(("unit", "factor"), FINER.items())
@pytest.mark.parametrize("kind", [int, float])
def test_a_number_in_a_finer_unit_is_refused_by_name(unit: str, factor: int, kind: type) -> None:
    with pytest.raises(ValueError, match=rf"looks like {unit} \(2023-11-14\): divide all times by {factor}"):
        parse_time(kind(SECONDS * factor))
    with pytest.raises(ValueError, match=unit):
        parse_time(-kind(SECONDS * factor))


def test_the_border_lies_between_all_times_of_logs() -> None:
    assert parse_time(SECONDS) == SECONDS
    assert parse_time(99_999_999_999) == 99_999_999_999  # the year 5138
    with pytest.raises(ValueError, match=r"milliseconds \(1973-03-03\)"):
        parse_time(100_000_000_000)
    with pytest.raises(ValueError, match="too large for a time in seconds"):
        parse_time(1e21)


@pytest.mark.parametrize("text", ["1612123051123", "1700000000", "1700000000000000"])
def test_digits_in_quotes_are_no_time(text: str) -> None:
    # `datetime.fromisoformat` alone would read the first as 11:23 on a day of the year 1612.
    with pytest.raises(ValueError, match="without quotes"):
        parse_time(text)
    assert parse_time("20231114") == datetime(2023, 11, 14, tzinfo=UTC).timestamp()


def test_jsonl(tmp_path: Path) -> None:
    event = {"type": "search", "query": "tea", "ts": SECONDS * 1000}
    path = tmp_path / "log.jsonl"
    path.write_text(json.dumps({"user_id": "u", "events": [event]}) + "\n")
    with pytest.raises(InputError, match=r"log\.jsonl:1: time 1700000000000 .*milliseconds \(2023-11-14\)"):
        list(read_log(path))


def amazon_log(path: Path, times: pyarrow.Array) -> Path:
    columns = {"session_id": ["s"] * len(times), "final_search_term": ["tea"] * len(times), "search_time": times}
    pyarrow.parquet.write_table(pyarrow.table(columns), path)
    return path


@pytest.mark.parametrize(("unit", "factor"), FINER.items())
def test_parquet_numbers_are_refused_and_timestamps_are_read(tmp_path: Path, unit: str, factor: int) -> None:
    numbers = amazon_log(tmp_path / "numbers.parquet", pyarrow.array([SECONDS * factor], pyarrow.int64()))
    with pytest.raises(InputError, match=rf"numbers\.parquet:1: .*{unit}"):
        list(read_log(numbers))
    column = pyarrow.array([SECONDS * factor], pyarrow.timestamp({"mill": "ms", "micr": "us", "nano": "ns"}[unit[:4]]))
    (record,) = read_log(amazon_log(tmp_path / "timestamps.parquet", column))
    assert record.events == (Event("search", query="tea", ts=float(SECONDS)),)


def test_parquet_timestamps_of_a_wrong_unit_past_all_calendars(tmp_path: Path) -> None:
    path = amazon_log(tmp_path / "a.parquet", pyarrow.array([SECONDS * 1000], pyarrow.timestamp("s")))
    with pytest.raises(InputError, match=r"a\.parquet:1: "):
        list(read_log(path))


@pytest.mark.parametrize("time", [str(SECONDS * 1000), "nan", "inf"])
def test_trec(tmp_path: Path, time: str) -> None:
    path = tmp_path / "log.xml"
    path.write_text(
        f"<sessiontrack2013><session num='1' starttime='{time}'><interaction starttime='{time}'><query>tea</query>"
        "</interaction></session></sessiontrack2013>"
    )
    with pytest.raises(InputError, match=r"log\.xml:1: session '1' ends here; time (1700000000000|nan|inf)"):
        list(read_log(path))


def test_split_time(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"--split_time: .*milliseconds \(2023-11-14\)"):
        ExampleBuilder(ExampleOptions(split_time=str(SECONDS * 1000)), 0)
    for same in ("20231114", "2023-11-14", "1699920000"):
        assert ExampleBuilder(ExampleOptions(split_time=same), 0)._split_time == 1_699_920_000
