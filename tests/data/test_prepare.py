"""The command from logs to examples: what it writes, what it counts, and what it refuses."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from common.data import prepare
from common.data.examples import load_examples
from common.errors import InputError
from tests.data.log_files import SHARED, SHIPPED

ALL_OFF = (
    "--windows 0 --min_chars 0 --max_chars 0 --max_words 0 --no_pii_filter --no_merge_repeats --min_queries 1 "
    "--max_queries 0 --max_queries_per_day 0 --navigational_targets --max_test_examples 0"
).split()


def run(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> None:
    monkeypatch.setattr(sys, "argv", ["prepare", *map(str, arguments)])
    prepare.main()


def write_log(path: Path, users: dict[str, list[str]], **fields: str) -> Path:
    rows = (
        {"user_id": user, "events": [{"type": "search", "query": query} for query in queries], **fields}
        for user, queries in users.items()
    )
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def log(tmp_path: Path) -> Path:
    users = {f"u{n}": ["tea", "green tea", "tea pot", "tea", "tea cup", "-"] for n in range(60)}
    return write_log(tmp_path / "log.jsonl", users | {"short": ["tea"]})


def test_files_and_report(log: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    out = tmp_path / "data"
    run(monkeypatch, "--log", log, "--output_dir", out, "--max_test_examples", 5)
    report = json.loads((out / "data_report.json").read_text())
    splits = {split: load_examples(out, split) for split in ("train", "dev", "test")}
    (source,) = report["logs"]
    assert source["format"] == "jsonl"
    assert (source["records"], source["bad_lines"]) == (61, 0)
    assert source["events"] == {"search": 361, "click": 0, "purchase": 0, "visit": 0}
    assert source["rules"]["no_words"] == {"unit": "events", "kept": 301, "dropped": 60}
    assert source["rules"]["min_queries"] == {"unit": "records", "kept": 60, "dropped": 1}
    assert source["rules"]["windows"] == {"unit": "windows", "kept": 60, "dropped": 60}
    offered = source["examples"]["test"]
    assert report["rules"]["max_test_examples"] == {"unit": "test examples", "kept": 5, "dropped": offered - 5}
    assert sum(source["examples"].values()) == 60
    for split, examples in splits.items():
        row = report["splits"][split]
        assert row["examples"] == row["users"] == row["groups"] == len(examples) > 0
        assert {example.split for example in examples} == {split}
        # Histories are "tea", "green tea"; of the targets "tea pot", "tea", "tea cup" the second repeats.
        assert row["history_events"] == dict.fromkeys(("min", "p25", "median", "p75", "p95", "max"), 2)
        assert row["share_of_targets_in_history"] == pytest.approx(1 / 3)
    assert len(splits["test"]) == 5
    printed = capsys.readouterr().out.splitlines()
    assert printed[0] == f"{log}: read as jsonl (by its name)"
    assert printed[-2].endswith(str(out / "data_report.json"))


def test_the_same_settings_write_the_same_bytes(log: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("one", "two"):
        run(monkeypatch, "--log", log, "--output_dir", tmp_path / name, "--seed", 3)
    run(monkeypatch, "--log", log, "--output_dir", tmp_path / "three", "--seed", 4)
    train = [(tmp_path / name / "train.jsonl").read_bytes() for name in ("one", "two", "three")]
    assert train[0] == train[1] != train[2]


def test_several_logs_in_one_flag_or_many(log: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    users = {f"v{n}": ["a a", "b b", "c c", "d d"] for n in range(3)}
    other = write_log(tmp_path / "other.jsonl", users, split="train")
    run(monkeypatch, "--log", log, other, "--output_dir", tmp_path / "one")
    run(monkeypatch, "--log", log, "--log", other, "--output_dir", tmp_path / "two")
    reports = [json.loads((tmp_path / name / "data_report.json").read_text()) for name in ("one", "two")]
    assert reports[0] == reports[1]
    assert [source["records"] for source in reports[0]["logs"]] == [61, 3]
    assert reports[0]["logs"][1]["examples"] == {"train": 3, "dev": 0, "test": 0}
    assert reports[0]["rules"]["min_queries"] == {"unit": "records", "kept": 63, "dropped": 1}
    assert {e.user_id for e in load_examples(tmp_path / "one", "train")} >= {"v0", "v1", "v2"}


def test_k_anonymity_reads_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    users = {f"u{n}": ["tea", f"secret word {n}", "green tea", "tea pot", "tea cup"] for n in range(40)}
    log = write_log(tmp_path / "log.jsonl", users)
    run(monkeypatch, "--log", log, "--output_dir", tmp_path / "data", "--k_anonymity", 2)
    report = json.loads((tmp_path / "data" / "data_report.json").read_text())
    assert report["rules"]["k_anonymity"] == {"unit": "events", "kept": 160, "dropped": 40}
    assert report["logs"][0]["records"] == 40
    assert "secret" not in (tmp_path / "data" / "train.jsonl").read_text()


def test_occupied_folder_resume_and_overwrite(
    log: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    out = tmp_path / "data"
    arguments = ("--log", log, "--output_dir", out)
    run(monkeypatch, *arguments)
    with pytest.raises(InputError, match="holds another run"):
        run(monkeypatch, *arguments)
    before = (out / "train.jsonl").stat()
    capsys.readouterr()
    run(monkeypatch, *arguments, "--resume")
    assert "is complete already" in capsys.readouterr().out
    assert (out / "train.jsonl").stat() == before
    with pytest.raises(InputError, match="seed: was 0, now 1"):
        run(monkeypatch, *arguments, "--resume", "--seed", 1)
    # An unfinished folder has no report: resume makes it again.
    (out / "data_report.json").unlink()
    (out / "train.jsonl").write_text("half")
    run(monkeypatch, *arguments, "--resume")
    assert len(load_examples(out, "train")) > 0
    run(monkeypatch, *arguments, "--overwrite", "--num_targets", 2)
    assert {len(example.targets) for example in load_examples(out, "train")} == {2}


def test_a_bad_log_leaves_the_folder_free(log: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "data"
    lines = log.read_text().splitlines()
    log.write_text("\n".join([*lines[:2], "not json", *lines[2:]]))
    with pytest.raises(InputError, match=r"log\.jsonl:3: not valid JSON"):
        run(monkeypatch, "--log", log, "--output_dir", out)
    assert not out.exists()
    run(monkeypatch, "--log", log, "--output_dir", out, "--max_bad_lines", 1)
    assert json.loads((out / "data_report.json").read_text())["logs"][0]["bad_lines"] == 1


def test_no_examples_says_which_rule(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = write_log(tmp_path / "log.jsonl", {f"u{n}": ["tea", "green tea", "tea pot"] for n in range(9)})
    with pytest.raises(InputError, match=r"no example for train, dev, test .*min_queries 9 of 9 records"):
        run(monkeypatch, "--log", log, "--output_dir", tmp_path / "data")
    log = write_log(tmp_path / "log2.jsonl", {"u": ["a a", "b b", "c c", "d d"]}, split="train")
    with pytest.raises(InputError, match=r"no example for dev, test .*'train': 1.*Dropped by rule: nothing"):
        run(monkeypatch, "--log", log, "--output_dir", tmp_path / "data")


def test_a_split_that_a_later_step_needs_is_not_left_empty(
    log: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for share, split in (("--dev_share", "dev"), ("--test_share", "test")):
        with pytest.raises(InputError, match=rf"no example for {split} .*--dev_share"):
            run(monkeypatch, "--log", log, "--output_dir", tmp_path / "data", share, 0)
        assert not (tmp_path / "data").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--output_dir", "x"], "--log is missing"),
        (["--log", "{log}"], "--output_dir is missing"),
        (["--log", "{log}", "{log}", "--output_dir", "x"], "twice"),
        (["--log", "none.jsonl", "--output_dir", "x"], "none.jsonl: no such log"),
        (["--log", "{log}", "--output_dir", "x", "--max_bad_lines", "-1"], "--max_bad_lines must not be negative"),
        (["--log", "{log}", "--output_dir", "x", "--window", "3"], "did you mean '--windows'"),
        (["--log", "{log}", "--output_dir", "x", "--num_targets", "0"], "--num_targets must be 1 or more"),
    ],
)
def test_bad_arguments_before_any_work(
    log: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=message):
        run(monkeypatch, *(argument.format(log=log) for argument in arguments))
    assert not (tmp_path / "x").exists()


def test_quantiles_are_nearest_ranks() -> None:
    assert prepare.quantiles(list(range(101))) == {"min": 0, "p25": 25, "median": 50, "p75": 75, "p95": 95, "max": 100}
    assert prepare.quantiles([7]) == dict.fromkeys(prepare.QUANTILES, 7)


@pytest.mark.parametrize(
    ("path", "windows"),
    [(SHARED / "trec_session/sessions.jsonl", 244), (SHARED / "searchx_sal/users.jsonl", 725), (SHIPPED, 1333)],
    ids=lambda value: value.stem if isinstance(value, Path) else str(value),
)
def test_real_logs(path: Path, windows: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With every rule off, the places for three targets are those that the data's README counts."""
    if not path.is_file():
        pytest.skip("needs the real data in ../shared/data")
    run(monkeypatch, "--log", path, "--output_dir", tmp_path / "all", *ALL_OFF)
    report = json.loads((tmp_path / "all" / "data_report.json").read_text())
    assert sum(row["examples"] for row in report["splits"].values()) == windows
    run(monkeypatch, "--log", path, "--output_dir", tmp_path / "default")
    named = {row["group"]: row["split"] for row in map(json.loads, path.read_text().splitlines())}
    examples = [e for split in ("train", "dev", "test") for e in load_examples(tmp_path / "default", split)]
    assert len({example.id for example in examples}) == len(examples)
    assert all(example.split == named[example.group] for example in examples)
    for example in examples:
        times = [event.ts for event in example.history if event.ts is not None]
        assert times == sorted(times)


def test_the_shipped_log_reads_without_flags_and_has_what_its_readme_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(monkeypatch, "--log", SHIPPED, "--windows", 0, "--output_dir", tmp_path / "data")
    report = json.loads((tmp_path / "data" / "data_report.json").read_text())
    (log,) = report["logs"]
    assert (log["format"], log["records"], log["bad_lines"]) == ("jsonl", 189, 0)
    assert log["events"] == {"search": 1900, "click": 0, "purchase": 0, "visit": 0}
    assert (log["rules"]["max_chars"]["dropped"], log["rules"]["max_words"]["dropped"]) == (363, 3)
    assert log["rules"]["pii_filter"]["dropped"] == 0
    assert log["examples"] == {"train": 696, "dev": 99, "test": 178}

    options = ("--max_chars", 500, "--max_words", 100)
    run(monkeypatch, "--log", SHIPPED, "--windows", 0, "--output_dir", tmp_path / "long", *options)
    report = json.loads((tmp_path / "long" / "data_report.json").read_text())
    assert report["logs"][0]["examples"] == {"train": 946, "dev": 123, "test": 264}

    records = [json.loads(line) for line in SHIPPED.read_text(encoding="utf-8").splitlines()]
    found = Counter(record["split"] for record in records)
    topics = Counter(split for split, _ in {(record["split"], record["group"]) for record in records})
    assert (found, topics) == ({"train": 132, "dev": 21, "test": 36}, {"train": 114, "dev": 20, "test": 32})
    readme = (SHIPPED.parent / "README.md").read_text(encoding="utf-8")
    assert hashlib.sha256(SHIPPED.read_bytes()).hexdigest() in readme


def test_the_shipped_log_carries_the_licenses_of_its_sources() -> None:
    text = (SHIPPED.parent / "LICENSE.cast_ikat").read_text(encoding="utf-8")
    assert "(c) 2019 Jeffrey Dalton" in text and "(c) 2023 IRLab Amsterdam" in text
    assert text.count("The above copyright notice and this permission notice shall be included in all") == 2


def test_a_log_whose_name_the_terminal_lacks_is_prepared(tmp_path: Path) -> None:
    log = write_log(tmp_path / "журнал.jsonl", {f"u{n}": ["tea", "green tea", "tea pot"] * 3 for n in range(40)})
    command = ["-m", "common.data.prepare", "--log", str(log), "--output_dir", str(tmp_path / "data"), *ALL_OFF]
    ended = subprocess.run(
        [sys.executable, *command], env=os.environ | {"PYTHONIOENCODING": "latin-1"}, capture_output=True, text=True,
        encoding="latin-1",
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr
    assert "\\u0436\\u0443\\u0440\\u043d\\u0430\\u043b.jsonl: read as jsonl" in ended.stdout
    assert load_examples(tmp_path / "data", "train")
