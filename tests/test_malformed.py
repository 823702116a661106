"""Malformed files of every kind: one clear error that names the file, a counted skip, or records that are sound.

Never a traceback from inside a library, never a hang, never a record that our own validation would refuse. A file is a
fixture with random edits: bytes changed, cut out, doubled, inserted; lines swapped; the end cut off. In a campaign:

    bash scripts/run_tests.sh tests/test_malformed.py --hypothesis-profile=campaign
"""

from __future__ import annotations

import csv
import gzip
import io
import shutil
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.config import option, parse_config
from common.data.examples import load_examples
from common.data.readers import read_log
from common.data.records import Example, Record
from common.errors import InputError
from common.feedback.annotator import check_annotation
from common.feedback.labels import read_existing_labels, read_quarantine, read_samples, sample_item
from common.feedback.simulated import read_truth
from common.files import read_json
from step2_token_reward.gold import read_gold, write_gold
from tests.data.log_files import FIXTURES
from tests.data.test_readers_of_tables import AMAZON_TRAIN, write_parquet
from tests.labelled_samples import RESPONSES, labelled, write_files

# What breaks parsers: ends of things, other encodings, numbers that are none, deep nesting, marks of other formats.
SNIPPETS = [
    b"\x00", b"\xff\xfe", b"\xed\xa0\x80", b"\r", b"\n", b"\t", b'"', b"'", b"\\", b"{", b"}", b"[", b"]", b",", b":",
    b"<", b">", b"&", b"<![CDATA[", b"<!ENTITY a 'b'>", b"null", b"NaN", b"Infinity", b"-1", b"1e999", b"true", b"{}",
    b"[]", b"[" * 3000, b"9" * 400, b"\xe2\x80\xa8", b"=1+1", b"!!python/object:os.system", b"\x1f\x8b",
]  # fmt: skip

Edit = tuple[str, float, float, bytes]
edits = st.lists(
    st.tuples(
        st.sampled_from(["insert", "replace", "cut", "double", "swap", "end"]),
        st.floats(0, 1),
        st.floats(0, 1),
        st.one_of(st.sampled_from(SNIPPETS), st.binary(min_size=1, max_size=4)),
    ),
    min_size=1,
    max_size=5,
)


def edited(content: bytes, changes: list[Edit]) -> bytes:
    """`content` after the edits; places are shares of its length."""
    for kind, at, to, snippet in changes:
        start, end = sorted((int(at * len(content)), int(to * len(content))))
        short = min(end, start + 40)
        if kind == "insert":
            content = content[:start] + snippet + content[start:]
        elif kind == "replace":
            content = content[:start] + snippet + content[start + len(snippet) :]
        elif kind == "cut":
            content = content[:start] + content[short:]
        elif kind == "double":
            content = content[:short] + content[start:short] + content[short:]
        elif kind == "end":
            content = content[:start]
        else:
            lines = content.splitlines(keepends=True)
            if lines:
                first, second = int(at * (len(lines) - 1)), int(to * (len(lines) - 1))
                lines[first], lines[second] = lines[second], lines[first]
            content = b"".join(lines)
    return content


def ends_well(read: Callable[[], object], path: Path) -> None:
    """`read()` returns, or raises an `InputError` of one paragraph that names the file."""
    try:
        read()
    except InputError as error:
        message = str(error)
        assert path.name.split(".")[0] in message and "\n" not in message.strip(), message
        assert len(message) < 2000


def read_records(path: Path, log_format: str, max_bad_lines: int) -> list[Record]:
    counter: Counter[str] = Counter()
    records = list(read_log(path, log_format, max_bad_lines, counter))
    for record in records:
        assert Record.from_dict(record.to_dict()) == record
    assert counter["bad_lines"] <= max_bad_lines
    return records


@pytest.mark.parametrize("packed", [False, True])
@given(changes=edits, max_bad_lines=st.sampled_from([0, 3, 1000]))
def test_generic_log(tmp_path: Path, packed: bool, changes: list[Edit], max_bad_lines: int) -> None:
    path = tmp_path / ("log.jsonl.gz" if packed else "log.jsonl")
    content = (FIXTURES / "generic.jsonl").read_bytes()
    path.write_bytes(edited(gzip.compress(content), changes) if packed else edited(content, changes))
    ends_well(lambda: read_records(path, "jsonl", max_bad_lines), path)


@given(changes=edits)
def test_lines_that_were_not_touched_keep_their_records(tmp_path: Path, changes: list[Edit]) -> None:
    """With bad lines skipped, every line of the generic log that the edits left whole gives the record it gave."""
    source, path = FIXTURES / "generic.jsonl", tmp_path / "generic.jsonl"  # its name is the records' source
    lines = [line for line in source.read_bytes().split(b"\n") if line.strip()]
    whole = dict(zip(lines, read_records(source, "jsonl", 0), strict=True))
    content = edited(source.read_bytes(), [change for change in changes if change[3] != b"\r"])
    path.write_bytes(content)
    left = [line for line in content.split(b"\n") if line in whole]
    try:
        found = read_records(path, "jsonl", 1000)
    except InputError:
        return
    for line in left:
        assert whole[line] in found


@given(changes=edits, max_bad_lines=st.sampled_from([0, 1000]))
def test_aol(tmp_path: Path, changes: list[Edit], max_bad_lines: int) -> None:
    path = tmp_path / "user-ct-test-collection-01.txt"
    path.write_bytes(edited((FIXTURES / "aol" / path.name).read_bytes(), changes))
    ends_well(lambda: read_records(path, "aol", max_bad_lines), path)


@pytest.mark.parametrize("name", ["data.csv", "query.csv", "doc.csv"])
@given(changes=edits, max_bad_lines=st.sampled_from([0, 1000]))
def test_aol4ps(tmp_path: Path, name: str, changes: list[Edit], max_bad_lines: int) -> None:
    folder = tmp_path / "aol4ps"
    shutil.copytree(FIXTURES / "aol4ps", folder, dirs_exist_ok=True)
    (folder / name).write_bytes(edited((FIXTURES / "aol4ps" / name).read_bytes(), changes))
    ends_well(lambda: read_records(folder, "aol4ps", max_bad_lines), folder)


@pytest.mark.parametrize("year", ["2012", "2013", "2014"])
@given(changes=edits, max_bad_lines=st.sampled_from([0, 1000]))
def test_trec(tmp_path: Path, year: str, changes: list[Edit], max_bad_lines: int) -> None:
    path = tmp_path / f"sessiontrack{year}.xml"
    path.write_bytes(edited((FIXTURES / "trec" / path.name).read_bytes(), changes))
    ends_well(lambda: read_records(path, "trec", max_bad_lines), path)


@given(changes=edits, max_bad_lines=st.sampled_from([0, 1000]))
def test_samples_and_labels(tmp_path: Path, changes: list[Edit], max_bad_lines: int) -> None:
    rows = labelled("train", RESPONSES)
    samples_path, labels_path = map(Path, write_files(tmp_path, rows))
    whole = read_samples(samples_path)
    broken = labels_path if max_bad_lines else samples_path
    broken.write_bytes(edited(broken.read_bytes(), changes))

    def read() -> None:
        samples = read_samples(samples_path)
        for sample in samples.values():
            sample_item(sample)
        for id_, annotation in read_existing_labels(labels_path, whole).items():
            check_annotation(annotation, whole[id_]["response"])

    try:
        read()
    except InputError as error:  # an event names its sample, all else the file
        assert "\n" not in str(error) and any(name in str(error) for name in ("samples", "labels", "sample"))


@given(changes=edits)
def test_quarantine(tmp_path: Path, changes: list[Edit]) -> None:
    path = tmp_path / "labels.quarantine.jsonl"
    row = b'{"id": "train0#0", "sample_digest": "00", "annotator": "a", "reason": "HTTP 500"}\n'
    path.write_bytes(edited(row, changes))
    samples = {row["id"]: row for row, _ in labelled("train", RESPONSES)}
    ends_well(lambda: read_quarantine(tmp_path / "labels.jsonl", samples), path)


@given(changes=edits)
def test_gold(tmp_path: Path, changes: list[Edit]) -> None:
    rows = [row for row, _ in labelled("train", RESPONSES[:2])]
    path = tmp_path / "gold.tsv"
    write_gold(path, rows)
    table = list(csv.DictReader(io.StringIO(path.read_text()), dialect="excel-tab"))
    with path.open("w", newline="") as stream:
        writer = csv.DictWriter(stream, table[0], dialect="excel-tab")
        writer.writeheader()
        writer.writerows({**row, "score": "1"} for row in table)
    path.write_bytes(edited(path.read_bytes(), changes))
    samples = {row["id"]: row for row in rows}

    def read() -> None:
        for id_, annotation in read_gold(path, samples).items():
            check_annotation(annotation, samples[id_]["response"])

    ends_well(read, path)


@given(changes=edits)
def test_truth(tmp_path: Path, changes: list[Edit]) -> None:
    path = tmp_path / "truth.jsonl"
    rows = b'{"user_id": "u", "words": {"tea": 2}}\n{"user_id": "v", "words": {"pot": 1}}\n'
    path.write_bytes(edited(rows, changes))
    ends_well(lambda: read_truth(path), path)


@given(changes=edits)
def test_examples(tmp_path: Path, changes: list[Edit]) -> None:
    path = tmp_path / "train.jsonl"
    row = b'{"id": "a@1", "user_id": "a", "group": "a", "source": "log", "split": "train", "history": '
    row += b'[{"type": "search", "query": "tea", "ts": 1.5}], "targets": ["green tea", "tea pot"]}\n'
    path.write_bytes(edited(row + row.replace(b"a@1", b"b@1"), changes))

    def read() -> None:
        for example in load_examples(tmp_path, "train"):
            assert Example.from_dict(example.to_dict()) == example
            assert all(isinstance(target, str) for target in example.targets)

    ends_well(read, path)


@dataclass
class SomeConfig:
    """A config of each type of field."""

    steps: int = option(1, "A number.")
    rate: float = option(0.5, "A rate.")
    resume: bool = option(False, "A switch.")
    names: list[str] = option([], "Names.")


@given(changes=edits)
def test_config(tmp_path: Path, changes: list[Edit]) -> None:
    path = tmp_path / "config.yaml"
    path.write_bytes(edited(b"steps: 3\nrate: 1e-4\nresume: true\nnames: [a, b]\n", changes))

    def read() -> None:
        config = parse_config(SomeConfig, ["--config", str(path)])
        assert type(config.steps) is int and type(config.rate) is float and type(config.resume) is bool

    try:
        read()
    except InputError as error:
        assert len(str(error)) < 2000


@given(changes=edits)
def test_json(tmp_path: Path, changes: list[Edit]) -> None:
    path = tmp_path / "report.json"
    path.write_bytes(edited(b'{"step1_sft": 61.5, "deep": {"list": [1, 2, 3]}}', changes))
    ends_well(lambda: read_json(path), path)


@given(changes=edits)
def test_parquet(tmp_path: Path, changes: list[Edit]) -> None:
    path = write_parquet(tmp_path / "train.parquet", AMAZON_TRAIN)
    path.write_bytes(edited(path.read_bytes(), changes))
    ends_well(lambda: read_records(path, "amazonqac", 1000), path)
